"""Volumes of voxels in ml."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PLACEHOLDER_THICKNESS = 999
"""nnU-Net reads a 2D image as one slice that is this many times as thick as its pixels are wide."""


def voxel_volume_ml(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Volume of a voxel in ml.

    Args:
        shape: (z, y, x) voxels.
        spacing: (z, y, x) in mm as nnU-Net's readers give it. A 2D image has no thickness, only nnU-Net's placeholder:
            it counts as 1 mm thick.
    """
    is_2d = len(shape) == 3 and shape[0] == 1 and np.isclose(spacing[0], PLACEHOLDER_THICKNESS * max(spacing[1:]))
    return float(np.prod(spacing[1:] if is_2d else spacing)) / 1000


def image_voxel_ml(properties: Mapping[str, Any], transpose_backward: Sequence[int]) -> float:
    """Volume of a voxel of the original image in ml.

    Args:
        properties: of the preprocessed image, as nnU-Net's preprocessor gives them.
        transpose_backward: of the plans.
    """
    shape = properties['shape_before_cropping']
    return voxel_volume_ml([shape[axis] for axis in transpose_backward], properties['spacing'])


def grid_voxel_ml(properties: Mapping[str, Any], transpose_backward: Sequence[int], shape: Sequence[int]) -> float:
    """Volume of a voxel of the network's grid in ml.

    Args:
        properties, transpose_backward: as for `image_voxel_ml`.
        shape: (Z, Y, X) of the preprocessed image.
    """
    cropped = properties['shape_after_cropping_and_before_resampling']
    resampled = float(np.prod(np.asarray(cropped, float)) / np.prod(np.asarray(shape, float)))
    return image_voxel_ml(properties, transpose_backward) * resampled
