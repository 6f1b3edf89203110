"""Masks of samples in the grid of the image: nnU-Net's resampling of all logits, computed only where labels meet.

nnU-Net interpolates every channel everywhere, linearly. Where all neighbours of a voxel have the same label, so has the
voxel. Only the others are interpolated, in the channels of the labels that the sample has. The labels that it has
nowhere are one channel, their largest logit, which interpolates to no less than each of them. Where that wins, which it
may between two labels, all channels are interpolated.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)

from nnunet_pdddpm.diffusion.coding import class_map
from nnunet_pdddpm.inference.chunks import chunks

POINTS_AT_ONCE = 2 ** 20
"""Voxels of the image's grid that are looked at at a time, about."""


class Axis(NamedTuple):
    """Where the places of a new axis lie on an old one, between two of its places: arrays (new size,)."""
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    """Of the higher place, in [0, 1)."""


def linear(old: int, new: int) -> Axis:
    """Linear interpolation between the centres of voxels, from one size to another."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    low = np.floor(at).astype(np.intp)
    high = np.where(at > low, low + 1, low)
    return Axis(np.clip(low, 0, old - 1), np.clip(high, 0, old - 1), at - low)


def nearest(old: int, new: int) -> Axis:
    """The nearest voxel, from one size to another."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    low = np.clip(np.floor(at + 0.5), 0, old - 1).astype(np.intp)
    return Axis(low, low, np.zeros(new))


def axes_of(resample: Callable[..., Any], old: Sequence[int], new: Sequence[int], old_spacing: Sequence[float],
            new_spacing: Sequence[float]) -> list[Axis] | None:
    """What nnU-Net's resampling of probabilities does along each axis; None if it is another one than its default.

    Args:
        resample: `ConfigurationManager.resampling_fn_probabilities`.
        old, new: sizes of the axes.
        old_spacing, new_spacing: of the axes, in mm.
    """
    if not isinstance(resample, partial) or resample.func is not resample_data_or_seg_to_shape:
        return None
    asked = {'is_seg': False, 'order': 3, 'order_z': 0, 'force_separate_z': False, **resample.keywords}
    if asked['is_seg'] or asked['order'] != 1 or asked['order_z'] != 0:
        return None
    thresholds = {key: value for key, value in asked.items() if key == 'separate_z_anisotropy_threshold'}
    separate, axis = determine_do_sep_z_and_axis(asked['force_separate_z'], old_spacing, new_spacing, **thresholds)
    return [(nearest if separate and i == axis else linear)(*sizes)
            for i, sizes in enumerate(zip(old, new, strict=True))]


def resampled_classes(logits: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """The class with the largest logit after interpolation, the first of several.

    Args:
        logits: (C, Z, Y, X) of classes; the largest of a voxel is 0.
        axes: of Z, Y and X, see `axes_of`.

    Returns:
        (Z', Y', X') uint8, int16 from 256 classes on.
    """
    classes = np.concatenate([class_map(torch.from_numpy(logits[None, :, z]))[0].numpy() for z in chunks(logits.shape)])
    classes = np.minimum(classes, len(logits) - 1)  # of NaN
    present = np.flatnonzero(np.bincount(classes.ravel(), minlength=len(logits)))
    absent = np.setdiff1d(np.arange(len(logits)), present)
    resampled = np.empty([len(axis.low) for axis in axes], classes.dtype)
    others = _largest(logits, absent)
    for z, same, points in _where_labels_meet(classes, axes):
        resampled[z] = same
        values = interpolated(logits, present, points, axes)
        winner = present[values.argmax(0)]
        if others is not None:
            open_ = interpolated(others[None], [0], points, axes)[0] >= values.max(0)
            open_points = tuple(at_point[open_] for at_point in points)
            winner[open_] = interpolated(logits, range(len(logits)), open_points, axes).argmax(0)
        resampled[points] = winner
    return resampled


def resampled_regions(logits: np.ndarray, axes: Sequence[Axis]) -> Iterator[np.ndarray]:
    """One region after the other after interpolation, (Z', Y', X') bool.

    Args:
        logits: (R, Z, Y, X).
        axes: of Z, Y and X, see `axes_of`.
    """
    for i, region in enumerate(logits):
        resampled = np.empty([len(axis.low) for axis in axes], bool)
        for z, same, points in _where_labels_meet(_inside(region), axes):
            resampled[z] = same
            resampled[points] = _inside(interpolated(logits, [i], points, axes)[0])
        yield resampled


def _inside(logits: np.ndarray) -> np.ndarray:
    """Whether a voxel is in the region, by nnU-Net's rule."""
    return (torch.from_numpy(logits).float().sigmoid_() > 0.5).numpy()


def _largest(logits: np.ndarray, channels: np.ndarray) -> np.ndarray | None:
    """Largest logit of some channels, (Z, Y, X); None if there are none."""
    if not len(channels):
        return None
    largest = torch.from_numpy(logits[channels[0]].copy())
    for channel in channels[1:]:
        torch.maximum(largest, torch.from_numpy(logits[channel]), out=largest)
    return largest.numpy()


def _where_labels_meet(labels: np.ndarray, axes: Sequence[Axis]
                       ) -> Iterator[tuple[slice, np.ndarray, tuple[np.ndarray, ...]]]:
    """For slices of the new grid: their labels where all neighbours agree, and the points (z, y, x) where they do not.

    `labels`: (Z, Y, X).
    """
    new = [len(axis.low) for axis in axes]
    size = max(1, POINTS_AT_ONCE // (new[1] * new[2]))
    for start in range(0, new[0], size):
        z = slice(start, min(start + size, new[0]))
        least = most = labels
        for i, (low, high, _) in enumerate(axes):
            at = (low[z], high[z]) if i == 0 else (low, high)
            least, most = (pick(extreme.take(at[0], i), extreme.take(at[1], i))
                           for pick, extreme in ((np.minimum, least), (np.maximum, most)))
        found_z, *found = np.nonzero(least != most)
        yield z, least, (found_z + start, *found)


def interpolated(logits: np.ndarray, channels: Sequence[int] | np.ndarray, points: Sequence[np.ndarray],
                 axes: Sequence[Axis]) -> np.ndarray:
    """Channels of logits (C, Z, Y, X) at points (z, y, x) of the new grid, in the order of scipy's own sums: (channels,
    points) in the logits' precision."""
    values = np.empty((len(channels), len(points[0])), logits.dtype)
    ends = [((axis.low[at], 1 - axis.weight[at]), (axis.high[at], axis.weight[at]))
            for axis, at in zip(axes, points, strict=True)]
    corners = [(np.ravel_multi_index([at for at, _ in corner], logits.shape[1:]), [weight for _, weight in corner])
               for corner in product(*ends)]
    for value, channel in zip(values, channels, strict=True):
        flat, total = logits[channel].reshape(-1), np.zeros(value.shape)
        for place, weights in corners:
            values_at = flat.take(place).astype(float)
            for weight in weights:
                values_at *= weight
            total += values_at
        value[:] = total
    return values
