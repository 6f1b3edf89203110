"""The parts of a volume: its objects, and what is drawn by thresholds of its own, one part around each object."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import max_pool3d

POSSIBLE = 0.1
"""Probability of foreground above which there may be an object."""
EXACT = 2 ** 20
"""Voxels of a volume up to which exact distances cost nothing beside the networks; on a GPU these are fast."""


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
    """One part for each object of `objects_in`: every voxel belongs to the nearest of them, by distance in voxels.

    In a volume of more than EXACT voxels distances are those of blocks of two voxels: an object farther by up to 3.5
    voxels may then be taken for the nearest.
    """
    if objects.index is None or objects.number < 3:
        return WHOLE
    index = known = objects.index.cpu()
    block = 1 if index.numel() <= EXACT else 2
    if block > 1:
        known = max_pool3d(index[None].float(), block, ceil_mode=True)[0].int()
    nearest = ndimage.distance_transform_edt(known.numpy() == 0, return_distances=False, return_indices=True)
    part = known[tuple(torch.from_numpy(index) for index in nearest)] - 1
    if block > 1:
        for axis, size in enumerate(index.shape):
            part = part.repeat_interleave(block, axis).narrow(axis, 0, size)
        part = torch.where(index > 0, index - 1, part)
    return Parts(part.to(objects.index.device), objects.number - 1)
