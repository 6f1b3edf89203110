"""Parts of a grid, by a mask, and how much of another mask lies in each.

A score of the volumes of parts is proper only if the parts do not depend on the outcome that is scored. The evaluation
takes them from the reference, or from the union of the raters' masks, so that they are the same for every model that is
compared: the comparison is of equals, but strictly proper it is not.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

Parts = tuple[np.ndarray, int]
"""The index of each voxel's part, from 0 on, in the grid's shape, and the number of parts."""


def octants(foreground: np.ndarray) -> Parts:
    """The grid split at the centre of a mask's bounding box along every axis.

    Voxels outside of the box belong to the octant on their side; the middle voxel of an odd side, and the only slice of
    an image, to the upper half.

    Args:
        foreground: bool, any number of axes. Of an empty mask everything is in part 0.

    Returns:
        Index uint8 of the mask's shape, and 2^axes parts (4 in 2D, 8 in 3D); of a single slice in 3D, 4 are empty.
    """
    index = np.zeros(foreground.shape, np.uint8)
    for axis, side in enumerate(bounding_box(foreground) or ()):
        along = np.arange(foreground.shape[axis]).reshape([-1 if a == axis else 1 for a in range(foreground.ndim)])
        index += (2 * along + 1 >= side.start + side.stop).astype(np.uint8) << axis
    return index, 2 ** foreground.ndim


def nearest_component(foreground: np.ndarray, spacing: Sequence[float]) -> Parts:
    """One part for each connected component of a mask; every voxel belongs to the nearest.

    Neighbours share a face, an edge or a corner.

    Args:
        foreground: bool, any number of axes. Of an empty mask everything is in part 0. Cropping the grid leaves the
            index as it is, as long as the mask is inside.
        spacing: mm per axis.

    Returns:
        Index int32 of the mask's shape, and as many parts as components, at least 1.
    """
    labelled, count = components(foreground)
    if count < 2:
        return np.zeros(foreground.shape, np.int32), 1
    nearest = ndimage.distance_transform_edt(labelled == 0, sampling=spacing, return_distances=False,
                                             return_indices=True)
    return labelled[tuple(nearest)] - 1, count


def volumes_of_parts(mask: np.ndarray, index: np.ndarray, number: int) -> np.ndarray:
    """Voxels (number,) of a bool mask in each part; `index` is of the mask's shape, with values below `number`.

    Raises:
        ValueError: if mask and index differ in shape, or an index of the mask's voxels is not below `number`.
    """
    if mask.shape != index.shape:
        raise ValueError(f'a mask of shape {mask.shape} has no parts on a grid of shape {index.shape}.')
    counts = np.bincount(index[mask], minlength=number)
    if len(counts) > number:
        raise ValueError(f'voxels belong to part {len(counts) - 1}, but there are only {number} parts.')
    return counts


def components(mask: np.ndarray) -> Parts:
    """Connected components of a bool mask: index int32, 0 outside and from 1 on inside, and their number."""
    return ndimage.label(mask, np.ones((3,) * mask.ndim))


def bounding_box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Slices along every axis; None of an empty mask."""
    found = ndimage.find_objects(mask.astype(np.uint8))
    return found[0] if found else None


@dataclass(frozen=True)
class Measurements:
    """What is measured of n masks of a label.

    Attributes:
        volume: (n,) ml.
        octants: (n, 2^axes) ml in the octants of the observations' union.
        parts: (n, parts) ml nearest to each component of that union.
        components: (n,) number of connected components.
    """
    volume: np.ndarray
    octants: np.ndarray
    parts: np.ndarray
    components: np.ndarray


def measure(samples: np.ndarray, observations: np.ndarray, spacing: Sequence[float],
            voxel_ml: float) -> tuple[Measurements, Measurements]:
    """Measurements of samples and observations by the parts of the observations' union.

    Args:
        samples: (n, ...) bool.
        observations: (m, ...) bool, masks of the same shape: the reference, or several raters'.
        spacing: mm per axis.
        voxel_ml: volume of a voxel in ml.
    """
    union = np.any(observations, axis=0)
    box = bounding_box(np.any(samples, axis=0) | union) or (slice(0, 1),) * union.ndim
    octant, number = octants(union)
    by_octants, by_component = (octant[box], number), nearest_component(union[box], spacing)

    def measured(masks: np.ndarray) -> Measurements:
        inside = [mask[box] for mask in masks]
        in_octants, in_parts = (np.stack([volumes_of_parts(mask, *parts) for mask in inside]) * voxel_ml
                                for parts in (by_octants, by_component))
        volume = np.array([np.count_nonzero(mask) for mask in inside]) * voxel_ml
        return Measurements(volume, in_octants, in_parts, np.array([components(mask)[1] for mask in inside]))
    return measured(samples), measured(observations)
