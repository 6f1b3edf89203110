"""Distances between the surfaces of two masks, in mm.

A surface is the voxels of a mask that have a neighbour across a face outside of it, or lie on the border of the image;
each counts the same. MONAI 1.6 with its defaults gives the same figures.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage, spatial

SLACK = 1e-4
"""mm by which a distance may exceed the tolerance: NIfTI keeps spacings with seven digits."""


def surface_distances(reference: np.ndarray, prediction: np.ndarray,
                      spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each surface voxel to the nearest surface voxel of the other mask.

    Args:
        reference: bool, not empty. Axes of length 1 are left out: a single slice has a contour.
        prediction: bool, of the same shape, not empty.
        spacing: mm per axis.

    Returns:
        Distances in mm from the reference's surface and from the prediction's, one-dimensional.

    Raises:
        ValueError: if a mask is empty or the shapes differ.
    """
    if reference.shape != prediction.shape or len(spacing) != reference.ndim:
        raise ValueError(f'reference {reference.shape}, prediction {prediction.shape} and spacing {tuple(spacing)} do '
                         f'not fit together')
    if not reference.any() or not prediction.any():
        raise ValueError('an empty mask has no surface')
    axes = [axis for axis, length in enumerate(reference.shape) if length > 1] or [0]
    millimetres = np.asarray(spacing, float)[axes]
    lengths = [reference.shape[axis] for axis in axes]
    first, second = (surface_points(mask.reshape(lengths)) * millimetres for mask in (reference, prediction))
    return spatial.KDTree(second).query(first)[0], spatial.KDTree(first).query(second)[0]


def surface_points(mask: np.ndarray) -> np.ndarray:
    """(n, axes) integer positions of the surface voxels of a bool mask."""
    box = ndimage.find_objects(mask.astype(np.uint8))
    if not box:
        return np.zeros((0, mask.ndim), int)
    inside = mask[box[0]]
    return np.argwhere(inside & ~ndimage.binary_erosion(inside)) + [s.start for s in box[0]]


def hd95_and_surface_dice(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float],
                          tolerance: float) -> tuple[float, float]:
    """95th percentile of the Hausdorff distance, and normalised surface Dice (Nikolov et al., arXiv 1809.04430).

    Args:
        reference: bool. Axes of length 1 are left out.
        prediction: bool, of the same shape.
        spacing: mm per axis.
        tolerance: mm within which a surface counts as found.

    Returns:
        HD95 in mm, the greater of the two directed 95th percentiles, and the share of both surfaces within the
        tolerance of the other, in [0, 1]. Two empty masks: nan, nan. One empty mask: the diagonal of the image, 0.
    """
    if not reference.any() and not prediction.any():
        return float('nan'), float('nan')
    if not reference.any() or not prediction.any():
        sides = [length * mm for length, mm in zip(reference.shape, spacing, strict=True) if length > 1]
        return float(np.linalg.norm(sides)), 0.0
    distances = surface_distances(reference, prediction, spacing)
    within = sum(np.count_nonzero(d <= tolerance + SLACK) for d in distances)
    return max(float(np.percentile(d, 95)) for d in distances), float(within / sum(map(len, distances)))
