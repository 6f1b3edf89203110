"""Truncated diffusion on a whole volume: one noise field, x0 fused over tiles at every step, one update per step.

Volumes are (C, Z, Y, X); a configuration that segments slices (2d) tiles every slice of the volume. Noise and updates
go through the volume in chunks of slices, and an estimate takes the place of the state as soon as no tile needs that
any more: nothing but the state itself is as large as the volume.
"""
from __future__ import annotations

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from nnunet_pdddpm.cpu import available_cpus
from nnunet_pdddpm.diffusion.levels import CLEAN
from nnunet_pdddpm.diffusion.process import ForwardProcess
from nnunet_pdddpm.inference.chunks import chunks, slices_in_chunk

Tile = tuple[slice | int, ...]
"""Index into a volume (C, Z, Y, X), as nnU-Net's sliding window makes it."""
NoiseField = Callable[[int], Tensor]
"""A noise field that comes in order: the next so many slices of it, (C, slices, Y, X)."""
SliceValues = tuple[slice, Tensor]
"""Slices of a volume, and values (C, slices, Y, X) in them."""
MOST_THREADS = 8
"""That draw noise for a GPU: each keeps a slice in memory."""


def volume_noise(shape: Sequence[int], seed: int, sample: int, device: torch.device,
                 correlation: float = 0.0) -> Callable[[], NoiseField]:
    """Source of standard normal noise fields for one sample of a volume; a field comes in chunks of slices.

    The same arguments give the same fields, whatever the chunks, the tiles, the device and the number of threads: they
    are drawn on the CPU, every slice by a generator of its own, by several threads, which are ahead of what is asked
    for by a slice each. Neighbouring slices of a field have the given correlation (an autoregressive chain of order
    one):

        eps_z = rho eps_(z-1) + sqrt(1 - rho^2) xi_z,      xi_z ~ N(0, I)

    Every slice for itself is white noise, as in training; so a 2d configuration may share noise along the slice axis.

    Args:
        shape: (C, Z, Y, X).
        seed: of the prediction.
        sample: number of the sample.
        device: on which the slices are wanted.
        correlation: rho in [0, 1]; 1 is one noise for all slices.

    Returns:
        A function that starts the next field.
    """
    numbers, slice_shape = itertools.count(), (shape[0], *shape[2:])
    # nnU-Net sets one for a GPU; each thread draws a slice ahead, which stays in memory
    threads = torch.get_num_threads() if device.type == 'cpu' else min(available_cpus(), MOST_THREADS)
    pool = ThreadPoolExecutor(threads) if threads > 1 else None  # ends with the last field

    def start() -> NoiseField:
        number = next(numbers)
        seeds = iter([_seed_of_slice(seed, sample, number, z) for z in range(shape[1])])
        before: list[Tensor] = []  # the last slice
        ahead: deque[Future[Tensor]] = deque()

        def field(count: int) -> Tensor:
            xi = torch.empty((count, *slice_shape), pin_memory=device.type == 'cuda')  # a copy is then not waited for
            if pool is not None:
                ahead.extend(pool.submit(_drawn, slice_shape, slice_seed)
                             for slice_seed in itertools.islice(seeds, count + threads - len(ahead)))
            for xi_z in xi:
                xi_z.copy_(_drawn(slice_shape, next(seeds)) if pool is None else ahead.popleft().result())
            if correlation > 0:
                for eps in xi:
                    if before:
                        eps.copy_(correlation * before[0] + math.sqrt(1 - correlation ** 2) * eps)
                    before[:] = [eps]
                before[:] = [before[0].clone()]  # not the whole chunk
            return xi.to(device, non_blocking=True).movedim(0, 1)
        return field
    return start


def _seed_of_slice(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), 'big')


@torch.inference_mode()  # which a thread does not have from the one that starts it
def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def refine_volume(denoise: Callable[[Tensor, float], Iterable[SliceValues]],
                  process_at: Callable[[slice], ForwardProcess], mask_at: Callable[[slice], Tensor],
                  shape: Sequence[int], device: torch.device, levels: Sequence[float],
                  noise: Callable[[], NoiseField]) -> Tensor:
    """One sample of a volume: `diffusion.sampling.refine`, chunk by chunk.

    Args:
        denoise: (x_t, log SNR) -> estimate of the clean coded mask x0, in order of slices. Slices of x_t change as soon
            as the estimate has reached them.
        process_at: slices -> the forward process whose chain is reversed in them.
        mask_at: slices -> the coded mask (C, slices, Y, X) that is noised first.
        shape: (C, Z, Y, X).
        device: of the volume.
        levels: log SNRs from the start to `CLEAN`, see `LevelTable.chain`.
        noise: source of noise fields, see `volume_noise`.

    Returns:
        The last estimate of the coded mask, (C, Z, Y, X) float32.
    """
    x, eps = torch.empty(tuple(shape), dtype=torch.float32, device=device), noise()
    for z in chunks(shape):
        x[:, z] = process_at(z).start(mask_at(z)[None], levels[0], eps(z.stop - z.start))[0]
    for level, lower in zip(levels[:-1], levels[1:], strict=True):
        eps = noise()
        for z, x0_hat in denoise(x, level):
            x[:, z] = x0_hat if lower == CLEAN else process_at(z).step(
                x[None, :, z], x0_hat[None], level, lower, eps(z.stop - z.start))[0]
    return x


def fuse_tiles(estimates: Iterable[tuple[Tile, Tensor]], shape: Sequence[int], weight: Tensor, device: torch.device
               ) -> Iterator[SliceValues]:
    """Weighted mean over tiles that cover a volume, float32 on `device`: slices in order, once all their tiles are in.

    What is kept is as many slices as a tile and a chunk have: slice z lies at place z modulo their number.

    Args:
        estimates: tile, as nnU-Net's sliding window makes it, and values (C, ...) in it; a tile may come several times,
            and none begins at a slice before that of an earlier one.
        shape: (C, Z, Y, X).
        weight: of the voxels of a tile, positive: nnU-Net's Gaussian, or 1.
        device: of the volume.

    Yields:
        Slices, and their values; these are overwritten when the next ones are asked for.
    """
    places = kept_slices(shape, weight.shape[0] if weight.ndim == 3 else 1)
    total = torch.zeros((shape[0], places, *shape[2:]), device=device)
    total_weight = torch.zeros((places, *shape[2:]), device=device)

    def finish(first: int, end: int) -> Iterator[SliceValues]:
        for whole in chunks(shape, first, end):
            for z, place in _in_ring(whole.start, whole.stop, places):
                values, weights = total[:, place], total_weight[place]
                values.div_(weights)
                yield z, values
                values.zero_()
                weights.zero_()

    first = 0  # the first slice that is not finished
    for (_, tile_z, y, x), values in estimates:
        tile_weight = weight
        if isinstance(tile_z, int):  # 2d
            tile_z, values, tile_weight = slice(tile_z, tile_z + 1), values[:, None], weight[None]
        if tile_z.start < first:
            raise ValueError(f'A tile begins at slice {tile_z.start}, where an earlier one began at {first} or behind.')
        ready = tile_z.start - (tile_z.start - first) % slices_in_chunk(shape)  # whole chunks
        yield from finish(first, ready)
        first = ready
        weighted = tile_weight * values.to(device)
        for z, place in _in_ring(tile_z.start, tile_z.stop, places):
            in_tile = slice(z.start - tile_z.start, z.stop - tile_z.start)
            total[:, place, y, x] += weighted[:, in_tile]
            total_weight[place, y, x] += tile_weight[in_tile]
    yield from finish(first, shape[1])


def kept_slices(shape: Sequence[int], slices_of_tile: int) -> int:
    """Number of slices of a volume (C, Z, Y, X) that `fuse_tiles` keeps at a time."""
    return min(shape[1], slices_of_tile + slices_in_chunk(shape) - 1)


def _in_ring(first: int, end: int, places: int) -> Iterator[tuple[slice, slice]]:
    """The slices `first` to `end` in pieces that lie together in a ring, and where: slice z is at z modulo `places`."""
    while first < end:
        place = first % places
        stop = min(end, first + places - place)
        yield slice(first, stop), slice(place, place + stop - first)
        first = stop


def mirrorings(axes: Sequence[int] | None) -> list[tuple[int, ...]]:
    """All combinations of mirrored axes, none first: 8 for three axes, as nnU-Net's test-time augmentation."""
    return [c for n in range(len(axes or ()) + 1) for c in itertools.combinations(axes or (), n)]


def mirrorings_of_sample(sample: int, samples: int, all_mirrorings: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The mirrorings under which a sample is denoised: all are spread over the samples, every sample has at least one.

    With at least as many samples as mirrorings each sample sees one, in turn; with fewer, each sees its share and
    denoising costs as many network calls as nnU-Net's own mirroring.
    """
    if samples >= len(all_mirrorings):
        return [all_mirrorings[sample % len(all_mirrorings)]]
    return list(all_mirrorings[sample % samples::samples])
