"""Truncated diffusion on a whole volume: one noise field, x0 fused over tiles at every step, one update per step.

Volumes are (C, Z, Y, X); a configuration that segments slices (2d) tiles every slice of the volume. Noise and updates
go through the volume slice by slice, so that nothing but the state itself is as large as the volume.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.levels import CLEAN
from nnunet_pdddpm.diffusion.process import ForwardProcess
from nnunet_pdddpm.diffusion.sampling import seeded_noise
from nnunet_pdddpm.inference.tiling import Tile


def volume_noise(shape: Sequence[int], seed: int, sample: int, device: torch.device,
                 correlation: float = 0.0) -> Callable[[], Iterator[Tensor]]:
    """Source of standard normal noise fields for one sample of a volume; a field comes slice by slice.

    The same arguments give the same fields, whatever the tiles, the device and the number of processes: they are drawn
    on the CPU. Neighbouring slices of a field have the given correlation (an autoregressive chain of order one):

        eps_z = rho eps_(z-1) + sqrt(1 - rho^2) xi_z,      xi_z ~ N(0, I)

    Every slice for itself is white noise, as in training; so a 2d configuration may share noise along the slice axis.

    Args:
        shape: (C, Z, Y, X).
        seed: of the prediction.
        sample: number of the sample.
        device: on which the slices are wanted.
        correlation: rho in [0, 1]; 1 is one noise for all slices.

    Returns:
        A function that starts the next field: an iterator over its Z slices (C, Y, X).
    """
    draw = seeded_noise((shape[0], *shape[2:]), seed, sample, device)

    def field() -> Iterator[Tensor]:
        eps = draw()
        yield eps
        for _ in range(shape[1] - 1):
            eps = draw() if correlation == 0 else correlation * eps + math.sqrt(1 - correlation ** 2) * draw()
            yield eps
    return field


def refine_volume(denoise: Callable[[Tensor, float], Tensor], process_at: Callable[[int], ForwardProcess],
                  mask_at: Callable[[int], Tensor], shape: Sequence[int], device: torch.device, levels: Sequence[float],
                  noise: Callable[[], Iterator[Tensor]]) -> Tensor:
    """One sample of a volume: `diffusion.sampling.refine`, in the same order of draws, slice by slice.

    Args:
        denoise: (x_t, log SNR) -> estimate of the clean coded mask x0 of the whole volume.
        process_at: z -> the forward process whose chain is reversed in that slice.
        mask_at: z -> the coded mask (C, Y, X) of that slice that is noised first.
        shape: (C, Z, Y, X).
        device: of the volume.
        levels: log SNRs from the start to `CLEAN`, see `LevelTable.chain`.
        noise: source of noise fields, see `volume_noise`.

    Returns:
        The last estimate of the coded mask, (C, Z, Y, X) float32.
    """
    x = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    for z, eps in enumerate(noise()):
        x[:, z] = process_at(z).start(mask_at(z)[None], levels[0], eps)[0]
    for level, lower in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = denoise(x, level)
        if lower == CLEAN:
            return x0_hat
        for z, eps in enumerate(noise()):
            x[:, z] = process_at(z).step(x[None, :, z], x0_hat[None, :, z], level, lower, eps)[0]
    return x


def fuse_tiles(estimates: Iterable[tuple[Tile, Tensor]], shape: Sequence[int], weight: Tensor, device: torch.device,
               elsewhere: Callable[[int], Tensor] | None = None) -> Tensor:
    """Weighted mean over overlapping tiles, (C, Z, Y, X) float32 on `device`.

    Args:
        estimates: tile, as nnU-Net's sliding window makes it, and values (C, ...) in it; a tile may come several times.
        shape: (C, Z, Y, X).
        weight: of the voxels of a tile, positive: nnU-Net's Gaussian, or 1.
        device: of the volume.
        elsewhere: z -> values (C, Y, X) of that slice, which stand where no tile is; None if tiles cover the volume.
    """
    total = torch.zeros(tuple(shape), device=device)
    total_weight = torch.zeros(tuple(shape[1:]), device=device)
    for tile, values in estimates:
        total[tile] += weight * values.to(device)
        total_weight[tile[1:]] += weight
    if elsewhere is None:
        return total.div_(total_weight)
    for z in range(shape[1]):
        total[:, z] = torch.where(total_weight[z] > 0, total[:, z] / total_weight[z], elsewhere(z))
    return total


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
