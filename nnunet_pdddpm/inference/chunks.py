"""A volume goes through arithmetic in chunks of slices: few calls, and little memory beside the volume itself."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK_BYTES = 2 ** 26
"""Of a chunk of a volume in float32. A handful of arrays of this size are there at a time."""


def slices_in_chunk(shape: Sequence[int]) -> int:
    """How many slices of a volume (C, Z, Y, X) make a chunk: at least one."""
    return max(1, min(shape[1], CHUNK_BYTES // (4 * shape[0] * shape[2] * shape[3])))


def chunks(shape: Sequence[int], first: int = 0, end: int | None = None) -> Iterator[slice]:
    """The slices `first` to `end` (default: all) of a volume (C, Z, Y, X), in order, in chunks of slices."""
    size, end = slices_in_chunk(shape), shape[1] if end is None else end
    for start in range(first, end, size):
        yield slice(start, min(start + size, end))


def in_chunks(volume: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A volume (C, Z, Y, X) in chunks: slices, and its values in them."""
    return ((z, volume[:, z]) for z in chunks(volume.shape))


def all_finite(volume: Tensor) -> Tensor:
    """Whether all values of a volume (C, Z, Y, X) are numbers, () bool where the volume is."""
    return torch.stack([torch.isfinite(values).all() for _, values in in_chunks(volume)]).all()


def inside(z: slice, box: slice) -> tuple[slice, slice]:
    """Where the slices `z` of a volume lie in a box of slices: places among those of `z`, and in the box.

    Both are empty if none of them do.
    """
    first, end = max(z.start, box.start), min(z.stop, box.stop)
    if first >= end:
        return slice(0, 0), slice(0, 0)
    return slice(first - z.start, end - z.start), slice(first - box.start, end - box.start)
