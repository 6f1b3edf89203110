"""The parts of a volume: its objects, and what is drawn by thresholds of its own, one part around each object."""
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

    def at(self, z: int | slice) -> Tensor | None:
        """(Y, X) of a slice, (slices, Y, X) of several."""
        return None if self.index is None else self.index[z]


WHOLE = Parts(None, 1)
"""A volume that is drawn as one."""


def objects_in(foreground: Tensor) -> Parts:
    """Part 0 is where no object may be; each connected component of {p > POSSIBLE} is a further one.

    Neighbours share a face, an edge or a corner.

    Args:
        foreground: (Z, Y, X) probabilities p of anything but background.
    """
    index, number = ndimage.label((foreground > POSSIBLE).cpu().numpy(), np.ones((3,) * foreground.ndim))
    return Parts(torch.from_numpy(index.astype(np.int32)).to(foreground.device), number + 1)


def parts_around(objects: Parts) -> Parts:
    """One part for each object of `objects_in`: every voxel belongs to the nearest of them, by distance in voxels."""
    if objects.index is None or objects.number < 3:
        return WHOLE
    index = objects.index.cpu().numpy()
    nearest = ndimage.distance_transform_edt(index == 0, return_distances=False, return_indices=True)
    return Parts(torch.from_numpy(index[tuple(nearest)] - 1).to(objects.index.device), objects.number - 1)
