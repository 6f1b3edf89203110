"""Where to refine: tiles around the voxels that the stock model is unsure of, in the place of the whole volume's."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.inference.chunks import chunks

Tile = tuple[slice | int, ...]
"""Index into a volume (C, Z, Y, X), as nnU-Net's sliding window makes it."""


def unsure_voxels(stock_logits: Tensor, regions: bool, sure: float) -> Tensor:
    """Whether the stock model is unsure of a voxel, (Z, Y, X) bool.

    Args:
        stock_logits: (C, Z, Y, X).
        regions: whether the channels are regions (each a yes or no) or classes.
        sure: probability from which on a voxel's label (of every region: yes or no) is taken to be sure, above 0.5;
            from 1 on no voxel is sure.
    """
    unsure = torch.ones(stock_logits.shape[1:], dtype=torch.bool, device=stock_logits.device)
    if sure < 1:
        for z in chunks(stock_logits.shape):
            p = logits_to_probabilities(stock_logits[None, :, z], regions)[0]
            unsure[z] = torch.maximum(p, 1 - p).amin(0) < sure if regions else p.amax(0) < sure
    return unsure


def tiles_around(unsure: Tensor, patch_size: Sequence[int], tile: Callable[[tuple[int, ...]], list[Tile]]
                 ) -> list[Tile]:
    """Tiles of the smallest box around the unsure voxels that hold any of them.

    The box has a margin of a quarter tile, so that unsure voxels are not seen from the rim of a tile only: with
    nnU-Net's step of half a tile, none is nearer to the rim in all of its tiles than in the middle of a large volume.

    Args:
        unsure: (Z, Y, X) bool, not smaller than a tile.
        patch_size: of a tile; of two axes for a configuration that segments slices.
        tile: nnU-Net's sliding window: shape (Z, Y, X) -> tiles that cover it.

    Returns:
        None if no voxel is unsure, and never more than `tile` gives for the whole volume.
    """
    starts, shape = [], []
    sizes = [1] * (unsure.ndim - len(patch_size)) + list(patch_size)
    for axis, (size, whole) in enumerate(zip(sizes, unsure.shape, strict=True)):
        # axis by axis: the indices of all voxels would take 24 bytes a voxel
        found = unsure.any([other for other in range(unsure.ndim) if other != axis]).nonzero().flatten()
        if not len(found):
            return []
        low, high = int(found[0]), int(found[-1])
        margin = size // 4
        missing = max(size - (high + 1 - low + 2 * margin), 0)  # to a tile's size
        low = max(min(low - margin - missing // 2, whole - size), 0)
        high = min(max(high + 1 + margin, low + size), whole)
        starts.append(low)
        shape.append(high - low)
    moved = [(one[0], *(_moved(index, start) for index, start in zip(one[1:], starts, strict=True)))
             for one in tile(tuple(shape))]
    holds = torch.stack([unsure[one[1:]].any() for one in moved]).tolist()  # one wait for a GPU, not one a tile
    return [one for one, any_ in zip(moved, holds, strict=True) if any_]


def _moved(index: slice | int, by: int) -> slice | int:
    return index + by if isinstance(index, int) else slice(index.start + by, index.stop + by)
