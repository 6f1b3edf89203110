"""The order in which cases are to be looked at, and how well it worked on validation cases.

The regression of `dice_regression` is compared with the estimate that the probabilities alone give. The better one
sorts the cases.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import expit

from nnunet_pdddpm.inference.dice_regression import (
    ALL_FEATURES,
    BOUND_COVERAGE,
    CASE,
    DICE,
    EXPECTED_DICE,
    KIND,
    UNALTERED,
    Bound,
    Estimates,
    LabelModel,
    bootstrap_interval,
    case_estimates,
    cross_validated,
    expected_dice,
    lower_quantile,
    rank_correlation,
    true_dice,
)
from nnunet_pdddpm.inference.quality import FEATURES, LabelQuality, logit

FLAG_DISTANCE = 3.0
"""Standard deviations from the validation cases from which on a feature is told."""
MIN_RANKING_CASES = 9
"""Validation cases with a label below which there is no order."""
REGRESSION, PROBABILITIES, NOTHING, FOLDS, UNMEASURED = 'regression', 'probabilities', 'nothing', 'folds', 'unmeasured'
"""What cases are sorted by."""


@dataclass(frozen=True)
class Scores:
    """How well cases were ranked in validation: rank correlation of their Dice with the regression's lower bound, in
    cross-validation, or with the expected Dice; and 95 % intervals over cases."""
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
    always: frozenset[str] = frozenset()
    """Labels that every validation case as it is has, in mask or samples."""

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
            f' and {scores.copies} copies of them with simulated artefacts' if scores.copies else '')
        correlation = f'{scores.correlation:.2f} ({scores.interval[0]:.2f} to {scores.interval[1]:.2f})'
        if self.by == NOTHING:
            return (f'Cases are not ranked: on {number} no estimate of the Dice has a rank correlation with it that is '
                    f'above 0 ({correlation}).')
        if self.by == REGRESSION:
            how = (f'a lower bound of the Dice, by a regression on what the prediction says. Rank correlation with the '
                   f'Dice {correlation} on {number}{" of kinds that it was not fitted on" if scores.copies else ""}; '
                   f'by the probabilities alone {scores.probabilities:.2f}')
        else:
            how = (f'a lower bound of the Dice that is expected from the probabilities; a regression on more features '
                   f'did not rank better. Rank correlation of the expected Dice with the true one {correlation} on '
                   f'{number}')
        held = '' if bound.held is None else f'; in validation it held in {100 * bound.held:.0f} %'
        return (f'Cases are sorted by {how}; {scores.clean:.2f} on the unchanged cases. The lower bound should hold '
                f'in {100 * BOUND_COVERAGE:.0f} % of images{held}.')

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
                if name in self.always:
                    found.append(f'{name}: neither in the mask nor in a sample, but every validation case has it')
                continue
            far = np.abs(self.models[name].distances(features)) > FLAG_DISTANCE
            for i in np.flatnonzero(far & ((features < low) | (features > high))):
                if flag := _flag(FEATURES[i], name, features[i], low[i], high[i]):
                    found.append(flag)
        return list(dict.fromkeys(found))


def _flag(feature: str, label: str, value: float, low: float, high: float) -> str:
    """What is odd about a feature of a label, a clause; empty where that is not worth a word."""
    if feature in ('volume', 'components'):
        number, least, most = (round(math.expm1(logarithm)) for logarithm in (value, low, high))
        what = f'{number} voxels' if feature == 'volume' else f'{number} {"component" if number == 1 else "components"}'
        return f'{label}: {what}, validation cases have {least} to {most}'
    if feature == 'stock' and value < low:
        return (f'{label}: mask and stock mask overlap with Dice {expit(value):.2f}, in validation at least '
                f'{expit(low):.2f}')
    if feature == 'expected' and value < low:
        return f'{label}: less sure than in any validation case'
    if feature in ('brightness', 'contrast'):
        return f'{label}: other intensities than in validation'
    if feature == 'roughness':
        return f'{label}: the image is {"rougher" if value > high else "smoother"} than in validation'
    return ''


NOT_MEASURED = Ranking(UNMEASURED, 'the model holds no Dice of validation cases')


def ranking_of(rows: np.ndarray, channels: Mapping[str, int], volumes: np.ndarray | None = None) -> Ranking:
    """The order that validation cases give.

    Args:
        rows: (rows, C, FIELDS) of cases and of copies with artefacts.
        channels: of each label.
        volumes: (cases, C, `intervals.FIELDS`), which tell what cases lack, also those that have no label at all.
    """
    known = rows[(rows[..., KIND] > 0).any(1)].astype(float)
    enough = {name: channel for name, channel in channels.items()
              if (known[:, channel, KIND] == UNALTERED).sum() >= MIN_RANKING_CASES}
    if not enough:
        number = max([int((known[:, channel, KIND] == UNALTERED).sum()) for channel in channels.values()], default=0)
        return Ranking(UNMEASURED, f'the Dice is known of {number} validation cases, {MIN_RANKING_CASES} are needed'
                       ) if number else NOT_MEASURED
    known = known[:, list(enough.values())]
    known = known[(known[..., KIND] > 0).any(1)]
    ranking = _ranking(known, list(enough))
    if volumes is None:
        return ranking
    true, mask, counted = np.moveaxis(volumes, -1, 0)
    lacking = ((counted > 0) & (true == 0) & (mask == 0)).any(0)
    return replace(ranking, always=frozenset(name for name in ranking.always if not lacking[enough[name]]))


def _lower_bounds(estimates: Estimates, true: np.ndarray, kinds: np.ndarray, cases: np.ndarray
                  ) -> tuple[np.ndarray, Bound]:
    """Lower bounds of the cases' Dice as logits (rows,), and what they are made of."""
    logits, units = case_estimates(estimates.logits, estimates.units)
    bound = Bound.from_errors((logit(true) - logits) / units, kinds, cases)
    return logits + bound.quantile * units, bound


def _ranking(rows: np.ndarray, names: Sequence[str]) -> Ranking:
    """The ranking that rows (rows, labels, FIELDS) of labels with these names give."""
    kinds, cases = rows[..., KIND].max(1), rows[..., CASE].max(1)
    true, plain = true_dice(rows), expected_dice(rows)
    candidates = {by: cross_validated(rows, columns)
                  for by, columns in ((REGRESSION, ALL_FEATURES), (PROBABILITIES, EXPECTED_DICE))}
    bounds_of = {by: _lower_bounds(estimates, true, kinds, cases) for by, estimates in candidates.items()}

    def better(i: np.ndarray) -> float:
        return rank_correlation(bounds_of[REGRESSION][0][i], true[i]) - rank_correlation(plain[i], true[i])
    by = REGRESSION if bootstrap_interval(cases, better)[0] > 0 else PROBABILITIES
    estimates, (low, bound) = candidates[by], bounds_of[by]
    # The expected Dice itself stands for its bound: cross-validation would mix fits that are one in prediction.
    order = low if by == REGRESSION else plain
    interval = bootstrap_interval(cases, lambda i: rank_correlation(order[i], true[i]))
    unaltered = kinds == UNALTERED
    scores = Scores(rank_correlation(order, true), interval,
                    rank_correlation(order[unaltered], true[unaltered]), rank_correlation(plain, true),
                    len(np.unique(cases)), int((~unaltered).sum()), bound)
    models, bounds, ranges, always = {}, {}, {}, set()
    for i, name in enumerate(names):
        there = rows[:, i, KIND] > 0
        label_rows = rows[there, i]
        models[name] = LabelModel.fit(label_rows, ALL_FEATURES if by == REGRESSION else EXPECTED_DICE)
        errors = logit(label_rows[:, DICE]) - estimates.logits[there, i]
        bounds[name] = lower_quantile(errors / estimates.units[there, i])
        clean = label_rows[label_rows[:, KIND] == UNALTERED, DICE + 1:]
        ranges[name] = np.stack([clean.min(0), clean.max(0)])
        if len(clean) == np.count_nonzero(unaltered):
            always.add(name)
    if interval[0] <= 0:
        by = NOTHING
    return Ranking(by, '', models, bounds, scores, ranges, frozenset(always))
