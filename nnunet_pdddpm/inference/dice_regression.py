"""A regression of a label's Dice on what a prediction knows, cross-validated on validation cases.

A model keeps a row of `FIELDS` for validation cases of its fold, and for copies of them with simulated artefacts. The
regression is fitted to these rows. Its errors in cross-validation give a lower bound of a new case's Dice.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from nnunet_pdddpm.inference.quality import FEATURES, logit

FIELDS = ('kind', 'case', 'dice', *FEATURES)
"""Of a predicted image and a label: 0 where the row is empty, UNALTERED for a validation case as it is, above it for a
copy with an artefact, a number for each family; the number of the case; its Dice, and what tells it."""
KIND, CASE, DICE = range(3)
UNALTERED = 1
RANK_CONFIDENCE = 0.95
"""Of the bootstrap interval of a rank correlation."""
BOUND_COVERAGE = 0.9
"""Share of cases in which the Dice is to be at least its lower bound."""
RIDGE_PENALTY = 0.7
"""Of the ridge regression, for each row: far from what it was fitted on it should say little."""
MAX_DISTANCE = 6.0
"""Standard deviations from the validation cases beyond which a feature counts no more. The expected Dice always counts:
otherwise the worst cases would all be equal."""
TWO_SIDED = tuple(FEATURES.index(name) for name in ('volume', 'brightness', 'contrast', 'roughness'))
"""Features of which both large and small values are odd."""
MIN_SD = np.array([0.1, 0.1, 0.1, 0.01, 0.01, 0.02, 0.05, 0.2, 0.05, 0.02, 0.02])
"""Of each feature: validation cases may all be alike."""
EXPECTED_DICE = (FEATURES.index('expected'),)
ALL_FEATURES = tuple(range(len(FEATURES)))
NUM_PARTS = 5
"""Of the validation cases: each is estimated by the others."""
RESAMPLINGS, SEED = 400, 20


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
        """The regression on rows (n, FIELDS), none of them empty."""
        usual = rows[rows[:, KIND] == UNALTERED, DICE + 1:]
        model = cls(tuple(columns), usual.mean(0), np.maximum(usual.std(0), MIN_SD), np.zeros(0), 0.0, np.zeros(0),
                    np.zeros(0))
        x, y = model.regressors(rows[:, DICE + 1:]), logit(rows[:, DICE])
        centre, target = x.mean(0), float(y.mean())
        inverse = np.linalg.inv((x - centre).T @ (x - centre) + RIDGE_PENALTY * len(x) * np.eye(len(columns)))
        return cls(model.columns, model.mean, model.sd, centre, target, inverse @ (x - centre).T @ (y - target),
                   inverse)

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Distances of features (..., FEATURES) from those of validation cases, in standard deviations."""
        return (features - self.mean) / self.sd

    def regressors(self, features: np.ndarray) -> np.ndarray:
        """(n, FEATURES) -> (n, columns)"""
        distances = self.distances(features)
        z = np.clip(distances, -MAX_DISTANCE, MAX_DISTANCE)
        z[:, EXPECTED_DICE] = distances[:, EXPECTED_DICE]
        z[:, TWO_SIDED] = np.abs(z[:, TWO_SIDED])
        return z[:, self.columns]

    def estimate(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, FEATURES) -> logit of the Dice, and unit of its error, which grows away from what was fitted on; (n,)."""
        x = self.regressors(features) - self.centre
        return self.target + x @ self.coefficients, np.sqrt(1 + np.einsum('ni,ij,nj->n', x, self.inverse, x))


@dataclass(frozen=True)
class Estimates:
    """Estimates of images by a regression on other images, (rows, labels); NaN where a label has no row."""
    logits: np.ndarray
    units: np.ndarray


def cross_validated(rows: np.ndarray, columns: Sequence[int]) -> Estimates:
    """Every row (rows, labels, FIELDS) estimated by rows of other cases and of other families of artefacts.

    Cases as they are are estimated by all rows of other cases.
    """
    found = np.full((2, *rows.shape[:2]), np.nan)
    for i in range(rows.shape[1]):
        there = np.flatnonzero(rows[:, i, KIND] > 0)
        label = rows[there, i]
        kinds, parts = label[:, KIND], np.unique(label[:, CASE], return_inverse=True)[1] % NUM_PARTS
        for kind in np.unique(kinds):
            for part in np.unique(parts[kinds == kind]):
                others = (parts != part) & ((kinds != kind) | (kind == UNALTERED))
                if (kinds[others] == UNALTERED).sum() > 1:
                    asked = (kinds == kind) & (parts == part)
                    model = LabelModel.fit(label[others], columns)
                    found[:, there[asked], i] = model.estimate(label[asked, DICE + 1:])
    return Estimates(*found)


def case_estimates(logits: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Estimate of a case from those of its labels (rows, labels), by the mean of the Dice: logits and units (rows,)."""
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
    low, high = np.quantile(values, [(1 - RANK_CONFIDENCE) / 2, (1 + RANK_CONFIDENCE) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Bound:
    """Errors in cross-validation, in their units, and how often the lower bound that they give holds."""
    quantile: float
    held: float | None
    """Share of the rows, each by the errors of other cases and, of copies, of other families of artefacts; None where
    these are too few for a bound."""

    @classmethod
    def from_errors(cls, errors: np.ndarray, kinds: np.ndarray, cases: np.ndarray) -> Bound:
        """The bound that errors of rows give; all arguments (rows,)."""
        bounds = []
        for kind, case in zip(kinds, cases, strict=True):
            bound = lower_quantile(errors[(cases != case) & ((kinds != kind) | (kind == UNALTERED))])
            bounds.append(bound if math.isfinite(bound) else lower_quantile(errors[cases != case]))
        held = float((errors >= bounds).mean()) if np.isfinite(bounds).all() else None
        return cls(lower_quantile(errors), held)
