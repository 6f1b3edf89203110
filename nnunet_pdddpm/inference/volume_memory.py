"""How much memory a volume takes, and whether the GPU has it."""
from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from nnunet_pdddpm.inference.chunks import slices_in_chunk
from nnunet_pdddpm.inference.volume_sampling import kept_slices

NETWORK_BYTES = 2 ** 30
"""Bytes that the networks take, about."""
CHUNK_ARRAYS = 6
"""Arrays of a chunk that are there at a time."""


def volume_bytes(image_channels: int, shape: Sequence[int], slices_of_tile: int, samples: int, folds: int,
                 regions: bool, mirrored: bool = False) -> int:
    """Bytes of the largest arrays that are there at a time when samples of a volume are drawn.

    A voxel takes 2 C for the logits of the stock model (2 C more for mirrored ones, if something is made of them),
    4 C for the state of a chain, 4 C for the mean probabilities, 1 C (2 C from 256 samples on) or of fewer samples
    than classes 1 a sample (2 from 256 classes on) to compare the samples, 4 a channel of the image, 12 for entropy
    and squares, 4 for parts, 4 C more with several folds; and in the slices that are fused at a time 4
    C + 4.

    Args:
        image_channels: of the image.
        shape: (C, Z, Y, X) of the padded volume.
        slices_of_tile: 1 in 2d.
        samples: their number.
        folds: number of models.
        regions: whether the channels are regions.
        mirrored: whether the stock model's mirrored logits are kept beside those that chains start from.
    """
    channels, slices, *_ = shape
    in_slice = prod(shape[2:])
    compared = channels * (1 if samples < 256 else 2) if regions or samples >= channels \
        else samples * (1 if channels < 256 else 2)
    a_voxel = 10 * channels + compared + 4 * image_channels + 16 + (4 * channels if folds > 1 else 0) \
        + (2 * channels if mirrored else 0)
    fused = (4 * channels + 4) * kept_slices(shape, slices_of_tile)
    chunks = CHUNK_ARRAYS * 4 * channels * slices_in_chunk(shape)
    return in_slice * (slices * a_voxel + fused + chunks)


def tile_bytes(channels: int, patch_size: Sequence[int]) -> int:
    """Bytes that the networks and one tile in them take, about: 28 C + 800 a voxel of the tile, which are features and
    seven float32 arrays of its mask. More tiles at a time are fewer where that is not enough."""
    return NETWORK_BYTES + prod(patch_size) * (28 * channels + 800)


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, with what torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
