"""The parts of a volume that are drawn by thresholds of their own: one around each object that there may be."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

POSSIBLE = 0.1
"""Probability of foreground above which there may be an object."""


@dataclass(frozen=True)
class Parts:
    """Which part each voxel belongs to."""
    index: Tensor | None
    """(Z, Y, X) int32; None if there is one part."""
    number: int

    def at(self, z: int) -> Tensor | None:
        """(Y, X) of a slice."""
        return None if self.index is None else self.index[z]


WHOLE = Parts(None, 1)
"""A volume that is drawn as one."""


def parts_around_objects(foreground: Tensor) -> Parts:
    """One part for each connected component of {p > POSSIBLE}; every voxel belongs to the nearest of them.

    Neighbours share a face, an edge or a corner. Distances are in voxels.

    Args:
        foreground: (Z, Y, X) probabilities p of anything but background.
    """
    objects, number = ndimage.label((foreground > POSSIBLE).cpu().numpy(), np.ones((3,) * foreground.ndim))
    if number < 2:
        return WHOLE
    nearest = ndimage.distance_transform_edt(objects == 0, return_distances=False, return_indices=True)
    index = objects[tuple(nearest)] - 1
    return Parts(torch.from_numpy(index.astype(np.int32)).to(foreground.device), number)
