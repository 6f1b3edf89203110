"""Samples of a model against the masks of several raters, by matrices of intersection over union.

`cross` is (samples, raters), `of_samples` (samples, samples), `of_raters` (raters, raters), each from
`overlap.iou_matrix`, in which two empty masks agree: 1.
"""
from __future__ import annotations

import math

import numpy as np
from scipy.optimize import linear_sum_assignment

from nnunet_pdddpm.evaluation.overlap import dice_of_iou


def ged_squared(cross: np.ndarray, of_samples: np.ndarray, of_raters: np.ndarray) -> float:
    """Squared generalised energy distance with d = 1 - IoU (Kohl et al., arXiv 1806.05034).

    2 E[d(S, Y)] - E[d(S, S')] - E[d(Y, Y')]: the expectations run over all pairs, each mask with itself included. 0
    for equal distributions, lower is better. With a single rater the last term is 0 while the spread of the samples is
    still subtracted: samples that err in different directions then score better than equally good ones that agree.
    """
    return float(2 * (1 - cross).mean() - (1 - of_samples).mean() - (1 - of_raters).mean())


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
