"""Samples of a model against the masks of several raters, by matrices of intersection over union.

`cross` is (samples, raters), `between_samples` (samples, samples), `between_raters` (raters, raters), each from
`overlap.iou_matrix`, in which two empty masks agree: 1.
"""
from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from nnunet_pdddpm.evaluation.overlap import dice_of_iou
from nnunet_pdddpm.evaluation.scores import kernel_score, mean_distance


def ged_squared(cross: np.ndarray, between_samples: np.ndarray, between_raters: np.ndarray) -> float:
    """Squared generalised energy distance with d = 1 - IoU (Kohl et al., arXiv 1806.05034).

    2 E[d(S, Y)] - E[d(S, S')] - E[d(Y, Y')]: the expectations run over all pairs, each mask with itself included. 0
    for equal distributions, lower is better. With a single rater the last term is 0 while the spread of the samples is
    still subtracted: samples that err in different directions then score better than equally good ones that agree.
    """
    return float(2 * (1 - cross).mean() - (1 - between_samples).mean() - (1 - between_raters).mean())


def fair_ged_squared(cross: np.ndarray, between_samples: np.ndarray, between_raters: np.ndarray) -> float:
    """`ged_squared` without the pairs of a mask with itself, so that its expectation does not depend on their number.

    It is unbiased for samples that are drawn independently of each other (Ferro 2014, doi 10.1002/qj.2270). d = 1 - IoU
    is negative definite (Jaccard's coefficient is a kernel), so the expectation over cases is lowest for samples of the
    raters' own distribution: 0 there, at most 2; a single case's value can be negative. With a single rater the last
    term is 0: a proper score, whose lowest expectation is E[d(Y, Y')]. With one sample the second term is 0: the score
    of a forecast without spread.

    Raises:
        ValueError: if there is no sample or no rater, or the matrices do not fit together.
    """
    if between_raters.shape != cross.shape[1:] * 2:
        raise ValueError(f'{cross.shape[1:]} raters do not fit distances of shape {between_raters.shape} between them.')
    return 2 * kernel_score(1 - cross, 1 - between_samples) - mean_distance(1 - between_raters)


def hungarian_matched_iou(cross: np.ndarray) -> float:
    """Mean IoU of the best one-to-one matching of samples and raters (HM-IoU; Kohl et al., arXiv 1905.13077).

    Both sets are first repeated to the least common multiple of their sizes. In [0, 1], higher is better.
    """
    samples, raters = cross.shape
    common = math.lcm(samples, raters)
    repeated = np.repeat(np.repeat(cross, common // samples, 0), common // raters, 1)
    return float(repeated[linear_sum_assignment(repeated, maximize=True)].mean())


def best_dice(cross: np.ndarray) -> np.ndarray:
    """For each rater the highest Dice of any sample, (raters,)."""
    return dice_of_iou(cross.max(0))
