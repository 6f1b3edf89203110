"""Intervals of volumes by conformal prediction: from the errors on validation cases to the ends for a new case.

A model keeps a row of `FIELDS` for each validation case of its fold and each label. From these scores a rule is chosen
(`choose_rule`), and with it an interval is made (`Calibrated.interval`). Volumes are in ml.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

FIELDS = ('true', 'mask', 'mean', 'sd', 'sum_of_squares', 'square_of_sum', 'samples')
"""Of a case and a label: the true volume; the volume of the mask; mean and standard deviation of the samples' volumes;
of the samples' standard deviations s_j in the single objects, sum s_j^2 and (sum s_j)^2; and the number of samples, 0
where the row is empty."""
COVERAGE = 0.95
MIN_INTERVAL_CASES = 9
"""Validation cases below which there is no interval: with n of them the widest honest level is n / (n + 1)."""
MIN_RULE_CASES = 39
"""Scores from which on the rule is chosen by them: chosen by 20 to 30, intervals hold 2 to 4 % fewer true volumes than
promised. From one more on each end can have a quantile of its own: 2.5 % of 40 is one."""


class Features(NamedTuple):
    """What a prediction knows of a label's volume, arrays of one shape (ml; the last two ml²)."""
    mask: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    sum_of_squares: np.ndarray
    square_of_sum: np.ndarray


@dataclass(frozen=True)
class Rule:
    """How an error is measured: from which volume, in which unit, and whether of the volume or of its logarithm."""
    scale: str
    """One of `SCALES`."""
    share: float = 0.0
    """Weight of the first term of the scales that have two."""
    typical: float = 1.0
    """Volume at which the two terms of the scale by volume are equal, ml."""
    logarithm: bool = False
    own_tails: bool = False
    """Whether the two ends have quantiles of their own; else both are as far from the middle."""

    @property
    def uses_samples(self) -> bool:
        """Whether the interval depends on the samples: it then holds only for samples drawn alike."""
        return self.scale in SAMPLE_SCALES

    def centre(self, features: Features) -> np.ndarray:
        """The volume that errors are measured from."""
        return features.mean if self.uses_samples else features.mask

    def unit(self, features: Features) -> np.ndarray:
        """The unit of errors, ml."""
        a, b = self.share, 1 - self.share
        if self.scale == 'constant':
            return np.ones_like(features.mask)
        if self.scale == 'volume':
            return np.sqrt(a * self.typical * features.mask + b * features.mask ** 2)
        if self.scale == 'samples':
            return features.sd
        return np.sqrt(a * features.sum_of_squares + b * features.square_of_sum)

    def ends(self, errors: np.ndarray, features: Features) -> np.ndarray:
        """Volumes at these errors, given in units; an infinite error stays infinite where the unit is 0."""
        centre, unit = self.centre(features), self.unit(features)
        with np.errstate(invalid='ignore', over='ignore'):
            steps = np.where(unit > 0, errors * unit, np.where(np.isinf(errors), errors, 0))
            return centre * np.exp(steps / centre) if self.logarithm else centre + steps

    def describe(self) -> str:
        """For the summary and the log."""
        words = {('constant', 0.0): 'constant', ('volume', 0.0): 'the volume', ('volume', 1.0): 'root of the volume',
                 ('volume', 0.5): 'root of volume + volume²', ('samples', 0.0): "the samples' sd",
                 ('objects', 0.0): "sum of the objects' sd", ('objects', 1.0): "root of the objects' summed variances",
                 ('objects', 0.5): "both of the objects' sds"}[self.scale, self.share]
        return words + (', of the logarithm' if self.logarithm else '')


SAMPLE_SCALES = ('samples', 'objects')
SCALES = ('constant', 'volume', *SAMPLE_SCALES)
_UNITS = (('constant', 0.0), ('volume', 0.0), ('volume', 0.5), ('volume', 1.0), ('samples', 0.0), ('objects', 0.0),
          ('objects', 0.5), ('objects', 1.0))
RULES = tuple(Rule(scale, share, 1.0, logarithm, own_tails) for own_tails in (False, True)
              for logarithm in (False, True) for scale, share in _UNITS)
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

    def lacks_unit(self, features: Features) -> bool:
        """Whether the unit of a new case, the spread of its samples, is 0 although there is something of the label: its
        interval would be a point."""
        return self.rule.uses_samples and bool((features.mask + features.mean).any() and not
                                               self.rule.unit(features).all())

    def interval(self, features: Features) -> tuple[float, float] | None:
        """Ends in ml for a new case.

        Of one model it is a split conformal interval (Lei et al. 2018, arXiv 1604.04173): it holds the true volume
        with a probability of at least `level`, over draws of the new case and the validation cases. Of all K folds it
        is CV+ (Barber et al. 2021, arXiv 1905.02928, theorem 4): proven are 2 level - 1 less
        min(2 (1 - 1/K) / (n/K + 1), (1 - K/n) / (K + 1)), about `level` is found. Of some of the folds nothing is
        proven. Neither counts in that the rule was chosen on the same errors.

        Args:
            features: of the new case, arrays (models,).

        Returns:
            None where the rule has no interval: of a logarithm, for an empty mask.
        """
        fold_features = Features(*(values[self.folds] for values in features))
        if self.rule.logarithm and not (self.rule.centre(fold_features) > 0).all():
            return None
        lows, highs = (np.sort(self.rule.ends(self.errors if self.rule.own_tails else sign * np.abs(self.errors),
                                              fold_features)) for sign in (-1, 1))
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

    def select(self, features: Features) -> Calibrated | str:
        """The calibration for a new case, arrays (models,): one model that finds the label is enough."""
        return self.with_label if (features.mask > 0).any() else self.without_label


def attainable_level(number: int) -> float:
    """COVERAGE, or the n / (n + 1) that a small number n of errors can promise at most."""
    return min(COVERAGE, number / (number + 1))


def conformal_rank(number: int, own_tails: bool) -> int:
    """Which of the smallest (and which of the largest) of n ends is taken: floor(a (n + 1)), at least the first, where
    a = 5 % are to be missed, or half of them at each end."""
    share = (1 - COVERAGE) / (2 if own_tails else 1)
    return max(1, math.floor(share * (number + 1) + 1e-9))


def signed_errors(rule: Rule, true: np.ndarray, features: Features) -> np.ndarray | None:
    """Signed errors (n,) in the rule's unit; None if the rule cannot be used: a logarithm of 0."""
    centre, unit = rule.centre(features), rule.unit(features)
    if rule.logarithm and not ((centre > 0).all() and (true > 0).all()):
        return None
    difference = centre * np.log(true / centre) if rule.logarithm else true - centre
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(difference == 0, 0.0, difference / unit)


def interval_scores(rule: Rule, true: np.ndarray, features: Features) -> np.ndarray:
    """Interval score (Gneiting and Raftery 2007, equation 43) of each case by the errors of the others, (n,) ml.

    width + 2 / a (distance of the truth from the interval): a proper score, lower is better.

    Args:
        rule: one of `RULES`.
        true: (n,) ml.
        features: arrays (n,).

    Returns:
        Infinite where the rule cannot be used.
    """
    errors = signed_errors(rule, true, features)
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
    low, high = (np.maximum(rule.ends(end, features), 0) for end in ends)
    with np.errstate(invalid='ignore'):
        below, above = np.maximum(low - true, 0), np.maximum(true - high, 0)
        return high - low + 2 / miss * (below + above)


def choose_rule(true: np.ndarray, features: Features, with_samples: bool) -> Rule:
    """The rule with the lowest mean interval score, each case by the errors of the others; of equal ones the simpler.

    Fewer than MIN_RULE_CASES cases choose nothing: errors are relative to the volume, or constant where a mask is empty
    by mistake.

    Args:
        true: (n,) ml.
        features: arrays (n,).
        with_samples: whether rules that depend on the samples can be used.
    """
    typical = float(np.median(true[true > 0])) if (true > 0).any() else 1.0
    usable = [replace(rule, typical=typical) for rule in RULES if (with_samples or not rule.uses_samples)
              and (len(true) > MIN_RULE_CASES or not rule.own_tails)]
    if len(true) < MIN_RULE_CASES:
        constant, relative = usable[:2]
        errors = signed_errors(relative, true, features)
        return relative if errors is not None and np.isfinite(errors).all() else constant
    return min(usable, key=lambda rule: float(interval_scores(rule, true, features).mean()))


def calibrate_by_mask(scores: Sequence[np.ndarray], with_samples: bool) -> ByMask:
    """`calibrate` of the cases whose mask holds something of the label, and of the others."""
    made: list[Calibrated | str] = []
    for which, words in ((True, 'holds something of it'), (False, 'holds nothing of it')):
        selected = [rows[(rows[:, FIELDS.index('mask')] > 0) == which] for rows in scores]
        number = sum(int((rows[:, FIELDS.index('samples')] > 0).sum()) for rows in selected)
        made.append(calibrate(selected, with_samples) or
                    f'the true volume is known of {number} validation cases whose mask {words}, '
                    f'{MIN_INTERVAL_CASES} are needed')
    return ByMask(*made)


def calibrate(scores: Sequence[np.ndarray], with_samples: bool) -> Calibrated | None:
    """The rule and the errors of a label; None for fewer than MIN_INTERVAL_CASES.

    Args:
        scores: of each model that predicts, (cases, FIELDS); rows without samples are empty.
        with_samples: whether samples are drawn as the scores' were. Several models do not draw as each alone.
    """
    known = [rows[rows[:, FIELDS.index('samples')] > 0] for rows in scores]
    rows = np.concatenate(known).astype(float)
    if len(rows) < MIN_INTERVAL_CASES:
        return None
    true, features = rows[:, 0], Features(*rows[:, 1:6].T)
    rule = choose_rule(true, features, with_samples)
    errors = signed_errors(rule, true, features)
    if errors is None:  # the constant is always usable
        raise AssertionError(rule)
    return Calibrated(rule, errors, np.repeat(np.arange(len(known)), [len(model_rows) for model_rows in known]))
