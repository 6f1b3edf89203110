"""The order in which cases are to be looked at: a regression of their Dice, and how well it ranks what it has not seen.

A model keeps a row of `FIELDS` for validation cases of its fold, and for copies of them with simulated artefacts. From
these rows the regression is fitted, cross-validated, and compared with the estimate that the probabilities alone give.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from nnunet_pdddpm.inference.quality import FEATURES, LabelQuality, logit

FIELDS = ('kind', 'case', 'dice', *FEATURES)
"""Of a predicted image and a label: 0 where the row is empty, CLEAN for a validation case as it is, above it for a copy
with an artefact, a number for each family; the number of the case; its Dice, and what tells it."""
KIND, CASE, DICE = range(3)
CLEAN = 1
MIN_RANKING_CASES = 9
"""Validation cases with a label below which there is no order."""
BOUND_COVERAGE = 0.9
"""Share of cases in which the Dice is to be at least its lower bound."""
RIDGE_PENALTY = 0.7
"""Of the ridge regression, for each row: far from what it was fitted on it should say little."""
MAX_DISTANCE = 6.0
"""Standard deviations from the validation cases beyond which a feature counts no more."""
FLAG_DISTANCE = 3.0
"""Standard deviations from the validation cases from which on a feature is told."""
TWO_SIDED = tuple(FEATURES.index(name) for name in ('volume', 'brightness', 'contrast', 'roughness'))
"""Features of which both large and small values are odd."""
MIN_SD = np.array([0.1, 0.1, 0.1, 0.01, 0.01, 0.02, 0.05, 0.2, 0.05, 0.02, 0.02])
"""Of each feature: validation cases may all be alike."""
EXPECTED_DICE = (FEATURES.index('expected'),)
ALL_FEATURES = tuple(range(len(FEATURES)))
NUM_PARTS = 5
"""Of the validation cases: each is estimated by the others."""
RESAMPLINGS, SEED = 400, 20
REGRESSION, PROBABILITIES, NOTHING, FOLDS, UNMEASURED = 'regression', 'probabilities', 'nothing', 'folds', 'unmeasured'
"""What cases are sorted by."""


@dataclass(frozen=True)
class LabelModel:
    """Ridge regression of the logit of a label's Dice."""
    columns: tuple[int, ...]
    """Features that it is made of."""
    mean: np.ndarray
    """Of the features in validation cases as they are, (FEATURES,)."""
    sd: np.ndarray
    centre: np.ndarray
    """Of the regressors, (columns,)."""
    target: float
    coefficients: np.ndarray
    inverse: np.ndarray
    """(columns, columns), of the penalised sums of squares."""

    @classmethod
    def fit(cls, rows: np.ndarray, columns: Sequence[int]) -> LabelModel:
        """Of rows (n, FIELDS) that are not empty."""
        usual = rows[rows[:, KIND] == CLEAN, DICE + 1:]
        model = cls(tuple(columns), usual.mean(0), np.maximum(usual.std(0), MIN_SD), np.zeros(0), 0.0, np.zeros(0),
                    np.zeros(0))
        x, y = model.regressors(rows[:, DICE + 1:]), logit(rows[:, DICE])
        centre, target = x.mean(0), float(y.mean())
        inverse = np.linalg.inv((x - centre).T @ (x - centre) + RIDGE_PENALTY * len(x) * np.eye(len(columns)))
        return cls(model.columns, model.mean, model.sd, centre, target, inverse @ (x - centre).T @ (y - target),
                   inverse)

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Of features (..., FEATURES) from those of validation cases, in standard deviations."""
        return (features - self.mean) / self.sd

    def regressors(self, features: np.ndarray) -> np.ndarray:
        """(n, FEATURES) -> (n, columns)"""
        z = np.clip(self.distances(features), -MAX_DISTANCE, MAX_DISTANCE)
        z[:, TWO_SIDED] = np.abs(z[:, TWO_SIDED])
        return z[:, self.columns]

    def estimate(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, FEATURES) -> logit of the Dice, and unit of its error, which grows away from what was fitted on; (n,)."""
        x = self.regressors(features) - self.centre
        return self.target + x @ self.coefficients, np.sqrt(1 + np.einsum('ni,ij,nj->n', x, self.inverse, x))


@dataclass(frozen=True)
class Estimates:
    """Of predicted images, each estimated by others: arrays (rows, labels), NaN where a label has no row."""
    logits: np.ndarray
    units: np.ndarray


def cross_validated(rows: np.ndarray, columns: Sequence[int]) -> Estimates:
    """Every row (rows, labels, FIELDS) estimated by rows of other cases and of other families of artefacts.

    Cases as they are are estimated by all rows of other cases.
    """
    kinds, parts = rows[..., KIND].max(1), rows[..., CASE].max(1) % NUM_PARTS
    found = np.full((2, *rows.shape[:2]), np.nan)
    for kind in np.unique(kinds):
        for part in np.unique(parts):
            here, others = (kinds == kind) & (parts == part), parts != part
            if kind != CLEAN:
                others &= kinds != kind
            for i in range(rows.shape[1]):
                asked, known = here & (rows[:, i, KIND] > 0), rows[others & (rows[:, i, KIND] > 0), i]
                if asked.any() and (known[:, KIND] == CLEAN).sum() > 1:
                    found[:, asked, i] = LabelModel.fit(known, columns).estimate(rows[asked, i, DICE + 1:])
    return Estimates(*found)


def case_estimates(logits: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of estimates (rows, labels) of labels that of the case, the mean of the Dice: logits and units (rows,)."""
    with np.errstate(invalid='ignore'):
        known = ~np.isnan(logits)
        number = np.maximum(known.sum(1), 1)
        mean = np.where(known, expit(logits), 0).sum(1) / number
        return np.where(known.any(1), logit(mean), np.nan), np.where(known, units, 0).sum(1) / number


def true_dice(rows: np.ndarray) -> np.ndarray:
    """Mean Dice over the labels of rows (rows, labels, FIELDS), (rows,)."""
    known = rows[..., KIND] > 0
    return np.where(known, rows[..., DICE], 0).sum(1) / np.maximum(known.sum(1), 1)


def expected_dice(rows: np.ndarray) -> np.ndarray:
    """As `true_dice`, what the probabilities alone say."""
    known = rows[..., KIND] > 0
    return np.where(known, expit(rows[..., DICE + 1]), 0).sum(1) / np.maximum(known.sum(1), 1)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where all values of one are equal."""
    a, b = rankdata(one), rankdata(other)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def lower_quantile(errors: np.ndarray) -> float:
    """Conformal quantile: the error of rank floor((1 - BOUND_COVERAGE) (n + 1)), the smallest first.

    Minus infinity for fewer than nine errors.
    """
    rank = math.floor((1 - BOUND_COVERAGE) * (len(errors) + 1) + 1e-9)
    return float(np.sort(errors)[rank - 1]) if rank else -math.inf


def bootstrap_interval(cases: np.ndarray, value: Callable[[np.ndarray], float], resamplings: int = RESAMPLINGS
               ) -> tuple[float, float]:
    """95 % interval by a bootstrap over cases, all rows of a case together.

    Args:
        cases: (rows,) whose each row is.
        value: of the rows with these numbers.
        resamplings: how many.
    """
    rng, names = np.random.default_rng(SEED), np.unique(cases)
    rows = {name: np.flatnonzero(cases == name) for name in names}
    values = [value(np.concatenate([rows[name] for name in rng.choice(names, len(names))]))
              for _ in range(resamplings)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Bound:
    """Errors in cross-validation, in their units, and how often the lower bound that they give holds."""
    quantile: float
    held: float
    """Share of the rows, each by the errors of other families."""
    worst: int
    """Kind of the rows in which it holds least."""
    worst_held: float

    @classmethod
    def from_errors(cls, errors: np.ndarray, kinds: np.ndarray) -> Bound:
        """Of errors and kinds (rows,)."""
        several = np.ptp(kinds) > 0
        held = {int(kind): float((errors[kinds == kind] >= lower_quantile(
            errors[kinds != kind] if several else errors)).mean()) for kind in np.unique(kinds)}
        worst = min(held, key=lambda kind: held[kind])
        return cls(lower_quantile(errors), float(np.mean([held[int(kind)] for kind in kinds])), worst, held[worst])


@dataclass(frozen=True)
class Scores:
    """How well cases were ranked in validation: rank correlation with their Dice, and 95 % intervals over cases."""
    correlation: float
    interval: tuple[float, float]
    clean: float
    """Of the cases as they are."""
    probabilities: float
    """Of what the probabilities alone say."""
    cases: int
    copies: int
    bound: Bound


@dataclass(frozen=True)
class Judgement:
    """What an order says of one case."""
    estimate: float | None
    low: float | None
    labels: Mapping[str, tuple[float | None, float | None]]
    """Label -> estimated Dice and its lower bound; without those of which there is nothing but the probabilities."""
    flags: Sequence[str]


@dataclass(frozen=True)
class Ranking:
    """What cases are sorted by, and how well that works."""
    by: str
    reason: str = ''
    """Why nothing is measured."""
    models: Mapping[str, LabelModel] = field(default_factory=dict)
    bounds: Mapping[str, float] = field(default_factory=dict)
    """Label -> quantile of its errors."""
    scores: Scores | None = None
    ranges: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Label -> smallest and largest features in validation cases as they are, (2, FEATURES)."""

    @property
    def key(self) -> str | None:
        """Entry of the summary that cases are sorted by, the smallest first; None: by name."""
        return {REGRESSION: 'estimated_dice_low', PROBABILITIES: 'estimated_dice_low', FOLDS: 'folds_dice',
                UNMEASURED: 'estimated_dice', NOTHING: None}[self.by]

    def describe(self) -> str:
        """For the log, the summary and the report: the order, and how well it worked."""
        if self.by == FOLDS:
            return ("Cases are sorted by how far the models' masks agree (Dice). How well that works is not measured: "
                    'each model was trained on validation cases of the others.')
        if self.scores is None:
            return (f'Cases are sorted by the Dice that is expected from the probabilities. How well that works is not '
                    f'measured: {self.reason}.')
        scores, bound = self.scores, self.scores.bound
        number = f'{scores.cases} validation cases' + (
            f' and {scores.copies} copies of them with simulated artefacts of kinds that it was not fitted on'
            if scores.copies else '')
        correlation = f'{scores.correlation:.2f} ({scores.interval[0]:.2f} to {scores.interval[1]:.2f})'
        if self.by == NOTHING:
            return (f'Cases are not ranked: on {number} no estimate of the Dice has a rank correlation with it that is '
                    f'above 0 ({correlation}).')
        how = 'a lower bound of the Dice, by a regression on what the prediction says' if self.by == REGRESSION else \
            ('a lower bound of the Dice that is expected from the probabilities; a regression on more did not rank '
             'better')
        return (f'Cases are sorted by {how}. Rank correlation with the Dice {correlation} on {number}; '
                f'{scores.clean:.2f} on the cases as they are; by the probabilities alone {scores.probabilities:.2f}. '
                f'The lower bound is to hold in {100 * BOUND_COVERAGE:.0f} % and held in {100 * bound.held:.0f} %.')

    def judge(self, qualities: Mapping[str, LabelQuality]) -> Judgement:
        """What is said of a case, by what is known of its labels."""
        labels: dict[str, tuple[float | None, float | None]] = {}
        logits, units = [], []
        for name, model in self.models.items():
            features = qualities[name].features
            if features is not None:
                label_logit, unit = (float(values[0]) for values in model.estimate(features[None]))
                logits.append(label_logit)
                units.append(unit)
                labels[name] = float(expit(label_logit)), float(expit(label_logit + self.bounds[name] * unit))
        estimate = low = None
        if logits and self.scores is not None:
            case_logits, case_units = case_estimates(np.array([logits]), np.array([units]))
            estimate = float(expit(case_logits[0]))
            low = float(expit(case_logits[0] + self.scores.bound.quantile * case_units[0]))
        return Judgement(estimate, low, labels, self._flags(qualities))

    def _flags(self, qualities: Mapping[str, LabelQuality]) -> list[str]:
        """What is odd about a case, a clause each."""
        found = []
        for name, (low, high) in self.ranges.items():
            features = qualities[name].features
            if features is None:
                continue
            far = np.abs(self.models[name].distances(features)) > FLAG_DISTANCE
            for i in np.flatnonzero(far & ((features < low) | (features > high))):
                if said := _flag(FEATURES[i], name, features[i], low[i], high[i]):
                    found.append(said)
        return list(dict.fromkeys(found))


def _flag(feature: str, label: str, value: float, low: float, high: float) -> str:
    """What is odd about a feature of a label, a clause; empty where that is not worth a word."""
    if feature in ('volume', 'components'):
        number, least, most = (round(math.expm1(logarithm)) for logarithm in (value, low, high))
        what = f'{number} voxels' if feature == 'volume' else f'{number} {"component" if number == 1 else "components"}'
        return f'{label}: {what}, validation cases have {least} to {most}'
    if feature == 'stock' and value < low:
        return (f'{label}: stock and refined mask overlap with Dice {expit(value):.2f}, in validation at least '
                f'{expit(low):.2f}')
    if feature == 'expected' and value < low:
        return f'{label}: less sure than in any validation case'
    if feature in ('brightness', 'contrast'):
        return f'{label}: other intensities than in validation'
    if feature == 'roughness':
        return f'{label}: the image is {"rougher" if value > high else "smoother"} than in validation'
    return ''


NOT_MEASURED = Ranking(UNMEASURED, 'the model holds no Dice of validation cases (nnUNetv2_pdddpm_tune measures it, or '
                                   'nnUNetv2_train --val)')


def ranking_of(rows: np.ndarray, channels: Mapping[str, int]) -> Ranking:
    """The order that rows (rows, C, FIELDS) of validation cases give; `channels`: of each label."""
    known = rows[(rows[..., KIND] > 0).any(1)].astype(float)
    enough = {name: channel for name, channel in channels.items()
              if (known[:, channel, KIND] == CLEAN).sum() >= MIN_RANKING_CASES}
    if not enough:
        number = max([int((known[:, channel, KIND] == CLEAN).sum()) for channel in channels.values()], default=0)
        return Ranking(UNMEASURED, f'the Dice is known of {number} validation cases, {MIN_RANKING_CASES} are needed'
                       ) if number else NOT_MEASURED
    known = known[:, list(enough.values())]
    known = known[(known[..., KIND] > 0).any(1)]
    return _ranking(known, list(enough))


def _lower_bounds(estimates: Estimates, true: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, Bound]:
    """Lower bounds of the cases' Dice as logits (rows,), and what they are made of."""
    logits, units = case_estimates(estimates.logits, estimates.units)
    bound = Bound.from_errors((logit(true) - logits) / units, kinds)
    return logits + bound.quantile * units, bound


def _ranking(rows: np.ndarray, names: Sequence[str]) -> Ranking:
    """Of rows (rows, labels, FIELDS) of labels with these names."""
    kinds, cases = rows[..., KIND].max(1), rows[..., CASE].max(1)
    true, plain = true_dice(rows), expected_dice(rows)
    by, estimates = REGRESSION, cross_validated(rows, ALL_FEATURES)
    low, bound = _lower_bounds(estimates, true, kinds)

    def better(i: np.ndarray) -> float:
        return rank_correlation(low[i], true[i]) - rank_correlation(plain[i], true[i])
    if bootstrap_interval(cases, better)[0] <= 0:
        by, estimates = PROBABILITIES, cross_validated(rows, EXPECTED_DICE)
        low, bound = _lower_bounds(estimates, true, kinds)
    interval = bootstrap_interval(cases, lambda i: rank_correlation(low[i], true[i]))
    scores = Scores(rank_correlation(low, true), interval,
                    rank_correlation(low[kinds == CLEAN], true[kinds == CLEAN]), rank_correlation(plain, true),
                    len(np.unique(cases)), int((kinds != CLEAN).sum()), bound)
    models, bounds, ranges = {}, {}, {}
    for i, name in enumerate(names):
        there = rows[:, i, KIND] > 0
        label_rows = rows[there, i]
        models[name] = LabelModel.fit(label_rows, ALL_FEATURES if by == REGRESSION else EXPECTED_DICE)
        errors = logit(label_rows[:, DICE]) - estimates.logits[there, i]
        bounds[name] = lower_quantile(errors / estimates.units[there, i])
        clean = label_rows[label_rows[:, KIND] == CLEAN, DICE + 1:]
        ranges[name] = np.stack([clean.min(0), clean.max(0)])
    if interval[0] <= 0:
        by = NOTHING
    return Ranking(by, '', models, bounds, scores, ranges)
