"""The sampling loop of truncated diffusion: from the noised pre-segmentation down to the clean mask."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.levels import CLEAN
from nnunet_pdddpm.diffusion.process import ForwardProcess


def refine(denoise: Callable[[Tensor, float], Tensor], process: ForwardProcess, mask: Tensor, levels: Sequence[float],
           draw: Callable[[], Tensor], callback: Callable[[float, Tensor, Tensor], None] | None = None) -> Tensor:
    """One sample: PD-DDPM (Guo et al., arXiv 2210.17408), algorithm 2, between any levels.

    Args:
        denoise: (x_t, log SNR) -> estimate of the clean coded mask x0, shape of x_t.
        process: the forward process whose chain is reversed.
        mask: coded mask (B, C, ...) that is noised first: the pre-segmentation, or a draw from it.
        levels: log SNRs from the start to `CLEAN`, as `LevelTable.chain` gives them.
        draw: returns standard normal noise that broadcasts to the mask's shape; called for the start and for every step
            but the last.
        callback: told (log SNR, x_t, x0_hat) before every step.

    Returns:
        The last estimate, shape of `mask`. With levels = [CLEAN] this is `mask` bit for bit.
    """
    if levels[0] == CLEAN:
        return mask.clone()
    x = process.start(mask, levels[0], draw())
    for level, lower in zip(levels[:-1], levels[1:], strict=True):
        x0_hat = denoise(x, level)
        if callback is not None:
            callback(level, x, x0_hat)
        x = process.step(x, x0_hat, level, lower, draw() if lower != CLEAN else torch.zeros_like(x))
    return x


def seeded_noise(shape: Sequence[int], seed: int, sample: int, device: torch.device) -> Callable[[], Tensor]:
    """Source of standard normal noise for one sample: the same on every device, run and tile for the same arguments.

    The noise is drawn on the CPU, since each device's own generator would give other numbers.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + sample)
    return lambda: torch.randn(tuple(shape), generator=generator).to(device)


class NoiseCache:
    """`seeded_noise`, kept on its device: a network that predicts tile by tile asks for the same at every tile."""

    def __init__(self, max_bytes: int = 2 ** 30) -> None:
        """`max_bytes`: that are kept, enough for one draw of 117 classes at 128^3; what is more is drawn every time.
        """
        self.max_bytes = max_bytes
        self.fields: dict[int, list[Tensor]] = {}
        """Of each sample."""
        self._kept_for: tuple[tuple[int, ...], int, str, int] | None = None

    def source(self, shape: Sequence[int], seed: int, sample: int, device: torch.device, draws: int
               ) -> Callable[[], Tensor]:
        """As `seeded_noise`, for at most so many draws."""
        wanted = tuple(shape), seed, str(device), draws
        if wanted != self._kept_for:
            self._kept_for, self.fields = wanted, {}
        if sample not in self.fields:
            draw = seeded_noise(shape, seed, sample, device)
            # the first ones stay: every tile asks for all samples in turn, and if new ones took their place none would
            # be there when it is asked for again
            if 4 * prod(shape) * draws * (len(self.fields) + 1) > self.max_bytes:
                return draw
            self.fields[sample] = [draw() for _ in range(draws)]
        return iter(self.fields[sample]).__next__
