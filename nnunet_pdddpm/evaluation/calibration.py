"""Calibration of probabilities, and how well the uncertainty finds where the mask is wrong.

All functions take voxels as one axis.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

NUM_BINS = 15
CELL_BITS = 12
"""Last binary digits of a float32 that make no difference to a cell."""
NUM_CELLS = (int(np.float32(1).view(np.int32)) >> CELL_BITS) + 1


@dataclass(frozen=True)
class Reliability:
    """Sums over the voxels of each confidence bin; those of several cases can be added.

    Each field is (bins,): number of voxels, sum of their confidences, number of them that are correct.
    """
    count: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.count + other.count, self.confidence + other.confidence, self.correct + other.correct)

    @property
    def expected_calibration_error(self) -> float:
        """ECE (Guo et al., arXiv 1706.04599): |accuracy - mean confidence| of the bins, weighted by their voxels."""
        return float(np.abs(self.correct - self.confidence).sum() / self.count.sum())


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = NUM_BINS) -> Reliability:
    """Voxels in bins of equal width in confidence, ]0, 1/bins], ..., ]1 - 1/bins, 1].

    Args:
        confidence: (N,) probability of the predicted class.
        correct: (N,) bool, whether that class is true.
        bins: number of them.
    """
    index = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    return Reliability(np.bincount(index, minlength=bins), np.bincount(index, confidence, bins),
                       np.bincount(index, correct, bins))


class Cells:
    """Sums over any number of voxels, in cells of confidence so fine that they stand for the voxels in order.

    A cell holds the voxels whose 1 - confidence has the same twelve leading binary digits.
    """

    def __init__(self) -> None:
        self.count, self.confidence, self.correct = np.zeros((3, NUM_CELLS))
        """(NUM_CELLS,) of each cell, the most confident first: voxels, sum of confidences, voxels that are correct."""

    def add(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        """Further voxels, as `reliability` takes them."""
        doubt = np.clip(1 - np.asarray(confidence, np.float32), 0, 1)
        cell = doubt.view(np.int32) >> CELL_BITS
        self.count += np.bincount(cell, minlength=NUM_CELLS)
        self.confidence += np.bincount(cell, confidence, NUM_CELLS)
        self.correct += np.bincount(cell, correct, NUM_CELLS)

    def adaptive_calibration_error(self, bins: int = NUM_BINS) -> float:
        """ECE with bins of equal numbers of voxels (adaptive ECE, Nguyen and O'Connor, arXiv 1508.05154).

        Voxels of a cell that straddle two bins are shared between them.
        """
        gaps = np.concatenate([[0], np.cumsum((self.correct - self.confidence)[::-1])])
        voxels = np.concatenate([[0], np.cumsum(self.count[::-1])])
        number = min(bins, int(voxels[-1]))
        gap_sums = np.diff(np.interp(np.linspace(0, voxels[-1], number + 1), voxels, gaps))
        return float(np.abs(gap_sums).sum() / voxels[-1])


def area_under_risk_coverage(uncertainty: np.ndarray, wrong: np.ndarray) -> float:
    """AURC (Geifman et al., arXiv 1805.08206): mean error rate when the k most certain voxels are kept, over all k.

    Args:
        uncertainty: (N,) any scale, higher is less certain. Voxels of equal uncertainty come in random order: the
            result is the expectation over it.
        wrong: (N,) bool; or of whole cases their risk in [0, 1].

    Returns:
        Value in [0, 1], lower is better; it can be no better than the error rate allows.
    """
    _, shared = _sorted_and_shared(uncertainty, wrong)
    return float((np.cumsum(shared) / np.arange(1, len(shared) + 1)).mean())


def _sorted_and_shared(key: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order by `key`, and `values` in that order, each replaced by the mean over equal keys; both (N,)."""
    order = np.argsort(key, kind='stable')
    in_order = key[order]
    starts = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1]]))
    counts = np.diff(starts, append=len(key))
    return order, np.repeat(np.add.reduceat(values[order].astype(np.float64), starts) / counts, counts)


def area_under_roc(uncertainty: np.ndarray, wrong: np.ndarray) -> float:
    """Chance that a wrong voxel is less certain than a correct one; nan if all are wrong or none is.

    Arguments as `area_under_risk_coverage`.
    """
    if wrong.all() or not wrong.any():
        return float('nan')
    return float(roc_auc_score(wrong, uncertainty))


def correlation(estimated: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """`spearman` and `pearson` over the n cases in which neither is nan, and that `n`; nan if n < 3 or one is constant.

    Args:
        estimated: (cases,).
        true: (cases,).
    """
    both = ~np.isnan(estimated) & ~np.isnan(true)
    x, y = estimated[both], true[both]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {'n': len(x), 'spearman': float('nan'), 'pearson': float('nan')}
    return {'n': len(x), 'spearman': float(stats.spearmanr(x, y).statistic),
            'pearson': float(stats.pearsonr(x, y).statistic)}
