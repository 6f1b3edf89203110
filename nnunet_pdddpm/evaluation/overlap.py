"""Overlap of masks: volumes, intersection over union of many pairs at once, lesion-wise F1."""
from __future__ import annotations

import numpy as np
from scipy import ndimage

PRODUCT_VOXELS = 2 ** 20
"""Voxels that one matrix product takes: their count is exact in float32."""


def iou_matrix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Intersection over union of every mask of one set with every mask of another; 1 for two empty masks.

    Args:
        one: (n, ...) bool.
        other: (m, ...) bool, masks of the same shape.

    Returns:
        (n, m) float64 in [0, 1].

    Raises:
        ValueError: if the masks differ in shape.
    """
    if one.shape[1:] != other.shape[1:]:
        raise ValueError(f'masks of different shapes: {one.shape[1:]} and {other.shape[1:]}')
    first, second = one.reshape(len(one), -1), other.reshape(len(other), -1)
    intersection = np.zeros((len(one), len(other)))
    for start in range(0, first.shape[1], PRODUCT_VOXELS):
        a, b = (masks[:, start:start + PRODUCT_VOXELS].astype(np.float32) for masks in (first, second))
        intersection += a @ b.T
    union = np.count_nonzero(first, 1)[:, None] + np.count_nonzero(second, 1)[None] - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def dice_of_iou(iou: np.ndarray) -> np.ndarray:
    """The Dice coefficients that belong to intersections over union."""
    return 2 * iou / (1 + iou)


def mean_of_pairs(matrix: np.ndarray) -> float:
    """Mean over the pairs of different members of a symmetric (n, n) matrix; nan if n < 2."""
    pairs = matrix[np.triu_indices(len(matrix), 1)]
    return float(pairs.mean()) if pairs.size else float('nan')


def lesion_f1(reference: np.ndarray, prediction: np.ndarray) -> float:
    """F1 over connected components, as in the WMH challenge (Kuijf et al., arXiv 1904.00682).

    A component (neighbours share a face, an edge or a corner) is found if it shares at least one voxel with the other
    mask. Recall is the share of found components of the reference, precision that of the prediction.

    Args:
        reference: bool, any number of axes.
        prediction: bool, of the same shape.

    Returns:
        Harmonic mean of precision and recall in [0, 1]; 0 if one mask is empty or nothing is found, nan if both are
        empty.
    """
    if not reference.any() and not prediction.any():
        return float('nan')
    recall, precision = _share_found(reference, prediction), _share_found(prediction, reference)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _share_found(components_of: np.ndarray, other: np.ndarray) -> float:
    labelled, count = ndimage.label(components_of, np.ones((3,) * components_of.ndim))
    return len(np.unique(labelled[other & components_of])) / count if count else 0.0
