"""The sampling loop of truncated diffusion: from the noised pre-segmentation down to level 0."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.process import ForwardProcess


def refine(denoise: Callable[[Tensor, int], Tensor], process: ForwardProcess, x_pre: Tensor, levels: Sequence[int],
           draw: Callable[[], Tensor], callback: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
    """One sample: PD-DDPM (Guo et al., arXiv 2210.17408), algorithm 2, with DDIM steps between any levels.

    Args:
        denoise: (x_t, t) -> estimate of the clean coded mask x0, shape of x_t.
        process: the forward process whose chain is reversed.
        x_pre: coded pre-segmentation (B, C, ...).
        levels: t_start = t_0 > ... > t_k = 0, as `schedule.truncated_levels` gives them.
        draw: returns standard normal noise that broadcasts to x_pre's shape; called for the start, and for every
            step but the last if the process is stochastic.
        callback: told (t, x_t, x0_hat) before every step.

    Returns:
        The coded mask at level 0, shape of x_pre. With levels = [0] this is x_pre bit for bit.
    """
    if levels[0] == 0:
        return x_pre.clone()
    x = process.start(x_pre, levels[0], draw())
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = denoise(x, t)
        if callback is not None:
            callback(t, x, x0_hat)
        x = process.step(x, x0_hat, x_pre, t, s, draw() if s > 0 and process.stochastic else torch.zeros_like(x))
    return x


def seeded_noise(shape: Sequence[int], seed: int, sample: int, device: torch.device) -> Callable[[], Tensor]:
    """Source of standard normal noise for one sample: the same on every device, run and tile for the same arguments.

    The noise is drawn on the CPU, since each device's own generator would give other numbers.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
    return lambda: torch.randn(tuple(shape), generator=generator).to(device)
