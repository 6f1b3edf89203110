"""Intervals of volumes by conformal prediction: from the errors on validation cases to the ends for a new case.

A model keeps a row of `FIELDS` for each validation case of its fold and each label. From these scores a rule is chosen
(`choose_rule`), and with it an interval is made (`Calibrated.interval`). Volumes are in ml.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FIELDS = ('true', 'mask', 'known')
"""Of a case and a label: the true volume, the volume of the mask, and 1, or 0 where the row is empty."""
COVERAGE = 0.95
MIN_INTERVAL_CASES = 9
"""Validation cases below which there is no interval: with n of them the widest honest level is n / (n + 1)."""
MIN_RULE_CASES = 39
"""Scores from which on the rule is chosen by them: chosen by 20 to 30, intervals hold 2 to 5 % fewer true volumes
than promised. From one more on each end can have a quantile of its own: 2.5 % of 40 is one."""


@dataclass(frozen=True)
class Rule:
    """How an error is measured: in which unit, and whether of the volume or of its logarithm."""
    square: float | None
    """Weight w of the square in the unit, the root of (1 - w) typical volume + w volume²; None for a constant unit."""
    typical: float = 1.0
    """Volume at which the two terms of the unit are equal, ml."""
    logarithm: bool = False
    own_tails: bool = False
    """Whether the two ends have quantiles of their own; else both are as far from the middle."""

    def unit(self, mask: np.ndarray) -> np.ndarray:
        """The unit of errors, ml, of masks with these volumes."""
        if self.square is None:
            return np.ones_like(mask)
        return np.sqrt((1 - self.square) * self.typical * mask + self.square * mask ** 2)

    def ends(self, errors: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Volumes at these errors, given in units; an infinite error stays infinite where the unit is 0."""
        unit = self.unit(mask)
        with np.errstate(invalid='ignore', over='ignore'):
            steps = np.where(unit > 0, errors * unit, np.where(np.isinf(errors), errors, 0))
            return mask * np.exp(steps / mask) if self.logarithm else mask + steps

    def describe(self) -> str:
        """For the summary and the log."""
        words = {None: 'constant', 1.0: 'the volume', 0.0: 'root of the volume', 0.5: 'root of volume + volume²'}
        return words[self.square] + (', of the logarithm' if self.logarithm else '')


RULES = tuple(Rule(square, 1.0, logarithm, own_tails) for own_tails in (False, True) for logarithm in (False, True)
              for square in (None, 1.0, 0.5, 0.0))
"""All of them, the simple ones first."""


@dataclass(frozen=True)
class Calibrated:
    """A rule, and the errors of validation cases by it."""
    rule: Rule
    errors: np.ndarray
    """(n,) signed, in the rule's unit; infinite where the unit is 0 and the error is not."""
    folds: np.ndarray
    """(n,) number of the model, among those that predict together, whose validation case it is."""

    @property
    def level(self) -> float:
        """What the interval promises: 95 %, or the n / (n + 1) that n errors can promise at most."""
        return attainable_level(len(self.errors))

    def interval(self, masks: np.ndarray) -> tuple[float, float] | None:
        """Ends in ml for a new case.

        Of one model it is a split conformal interval (Lei et al. 2018, arXiv 1604.04173): it holds the true volume
        with a probability of at least `level`, over draws of the new case and the validation cases. Of all K folds it
        is CV+ (Barber et al. 2021, arXiv 1905.02928, theorem 4): proven are 2 level - 1 less
        min(2 (1 - 1/K) / (n/K + 1), (1 - K/n) / (K + 1)), about `level` is found. Of some of the folds nothing is
        proven. Neither counts in that the rule was chosen on the same errors.

        Args:
            masks: volumes of the models' masks of the new case, (models,) ml.

        Returns:
            None where the rule has no interval: of a logarithm, for an empty mask.
        """
        mask = masks[self.folds]
        if self.rule.logarithm and not (mask > 0).all():
            return None
        lows, highs = (np.sort(self.rule.ends(self.errors if self.rule.own_tails else sign * np.abs(self.errors), mask))
                       for sign in (-1, 1))
        rank = conformal_rank(len(self.errors), self.rule.own_tails)
        return max(float(lows[rank - 1]), 0.0), max(float(highs[-rank]), 0.0)


@dataclass(frozen=True)
class ByMask:
    """Calibration of a label, apart for cases whose mask holds the label and for those whose mask does not.

    Taken together, a rare label would get its intervals from the many cases without it, which have no error: too narrow
    wherever the label is found. A string in the place of a calibration says why there is none.
    """
    with_label: Calibrated | str
    without_label: Calibrated | str

    def select(self, masks: np.ndarray) -> Calibrated | str:
        """The calibration for a new case, masks (models,) ml: one model that finds the label is enough."""
        return self.with_label if (masks > 0).any() else self.without_label


def attainable_level(number: int) -> float:
    """COVERAGE, or the n / (n + 1) that a small number n of errors can promise at most."""
    return min(COVERAGE, number / (number + 1))


def conformal_rank(number: int, own_tails: bool) -> int:
    """Which of the smallest (and which of the largest) of n ends is taken: floor(a (n + 1)), at least the first, where
    a = 5 % are to be missed, or half of them at each end."""
    share = (1 - COVERAGE) / (2 if own_tails else 1)
    return max(1, math.floor(share * (number + 1) + 1e-9))


def signed_errors(rule: Rule, true: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Signed errors (n,) in the rule's unit; None if the rule cannot be used: a logarithm of 0."""
    if rule.logarithm and not ((mask > 0).all() and (true > 0).all()):
        return None
    difference = mask * np.log(true / mask) if rule.logarithm else true - mask
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(difference == 0, 0.0, difference / rule.unit(mask))


def interval_scores(rule: Rule, true: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Interval score (Gneiting and Raftery 2007, equation 43) of each case by the errors of the others, (n,) ml.

    width + 2 / a (distance of the truth from the interval): a proper score, lower is better.

    Args:
        rule: one of `RULES`.
        true: (n,) ml.
        mask: (n,) ml.

    Returns:
        Infinite where the rule cannot be used.
    """
    errors = signed_errors(rule, true, mask)
    if errors is None:
        return np.full(len(true), np.inf)
    n, miss = len(true), 1 - attainable_level(len(true) - 1)
    ends = []
    for sign in (-1, 1):
        end_errors = sign * errors if rule.own_tails else np.abs(errors)  # the far end is always the largest
        order = np.sort(end_errors)
        position = n - 1 - conformal_rank(n - 1, rule.own_tails)  # among the n - 1 others, in ascending order
        # without case i: what stands there, or one further where i stands at or before it
        without = np.where(end_errors <= order[position], order[position + 1], order[position])
        ends.append(sign * without)
    low, high = (np.maximum(rule.ends(end, mask), 0) for end in ends)
    with np.errstate(invalid='ignore'):
        below, above = np.maximum(low - true, 0), np.maximum(true - high, 0)
        return high - low + 2 / miss * (below + above)


def choose_rule(true: np.ndarray, mask: np.ndarray) -> Rule:
    """The rule with the lowest mean interval score, each case by the errors of the others; of equal ones the simpler.

    Fewer than MIN_RULE_CASES cases choose nothing: errors are relative to the volume, or constant where a mask is empty
    by mistake.

    Args:
        true: (n,) ml.
        mask: (n,) ml.
    """
    typical = float(np.median(true[true > 0])) if (true > 0).any() else 1.0
    usable = [replace(rule, typical=typical) for rule in RULES if len(true) > MIN_RULE_CASES or not rule.own_tails]
    if len(true) < MIN_RULE_CASES:
        constant, relative = usable[:2]
        errors = signed_errors(relative, true, mask)
        return relative if errors is not None and np.isfinite(errors).all() else constant
    return min(usable, key=lambda rule: float(interval_scores(rule, true, mask).mean()))


def calibrate_by_mask(scores: Sequence[np.ndarray]) -> ByMask:
    """`calibrate` of the cases whose mask holds something of the label, and of the others."""
    made: list[Calibrated | str] = []
    for which, words in ((True, 'holds something of it'), (False, 'holds nothing of it')):
        selected = [rows[(rows[:, FIELDS.index('mask')] > 0) == which] for rows in scores]
        number = sum(int((rows[:, FIELDS.index('known')] > 0).sum()) for rows in selected)
        made.append(calibrate(selected) or
                    f'the true volume is known of {number} validation cases whose mask {words}, '
                    f'{MIN_INTERVAL_CASES} are needed')
    return ByMask(*made)


def calibrate(scores: Sequence[np.ndarray]) -> Calibrated | None:
    """The rule and the errors of a label; None for fewer than MIN_INTERVAL_CASES.

    Args:
        scores: of each model that predicts, (cases, FIELDS).
    """
    known = [rows[rows[:, FIELDS.index('known')] > 0] for rows in scores]
    rows = np.concatenate(known).astype(float)
    if len(rows) < MIN_INTERVAL_CASES:
        return None
    true, mask = rows[:, 0], rows[:, 1]
    rule = choose_rule(true, mask)
    errors = signed_errors(rule, true, mask)
    if errors is None:  # the constant is always usable
        raise AssertionError(rule)
    return Calibrated(rule, errors, np.repeat(np.arange(len(known)), [len(model_rows) for model_rows in known]))
