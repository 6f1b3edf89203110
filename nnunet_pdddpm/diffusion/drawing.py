"""A mask drawn from probabilities, not their mode: at the start of a chain, between its steps, and at its end."""
from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import class_map, harden

SMALLEST_DRAWN, LARGEST_DRAWN = 1e-30, 1 - 2 ** -24
"""Before a logarithm. With a larger floor a whole part would sometimes get a label that none of its voxels may have."""
END = 0
"""Stage of the draw that gives the sample's mask. The draws before it have the stages 1 (the start), 2, ..."""


@lru_cache(maxsize=64)  # a volume comes chunk by chunk, and asks for the same ones at each
def draw_shifts(num_channels: int, regions: bool, sample: int, samples: int, seed: int, stage: int = END,
                parts: int = 1, dependence: float = 1.0, central: bool = False) -> Tensor:
    """Constants to add to a sample's logits, so that nnU-Net's rule then draws a mask instead of taking the likeliest.

    The Gumbel-max trick (Maddison et al., arXiv 1411.0030, section 2): argmax_c (log p_c + g_c) with Gumbel g_c is a
    draw from p. Every voxel is drawn with its own probabilities, but with the same g_c in a whole part of the volume:
    so a mask has no speckle. For two classes and for regions that is a threshold: p > u with one uniform u for all
    voxels of the part and all regions (of which nested ones stay nested).

    Between the parts the uniforms depend on each other by a Gaussian copula with a shared part rho,

        u_j = Phi(sqrt(rho) g + sqrt(1 - rho) z_j),      g, z_j ~ N(0, 1):

    with rho = 1 the whole volume is drawn as one, with rho = 0 the parts are independent.

    Over the samples g and each z_j are stratified: of n samples each has another of the quantiles (i + v) / n, with one
    uniform v for all of them (Latin hypercube with a random offset). So every sample is a draw. For two classes and for
    regions, with rho 0 or 1, the mean of the n masks is the mean probability as nearly as n masks can give it. With rho
    between them or more classes it is less near, with many classes as near as that of independent draws.

    Args:
        num_channels: C.
        regions: whether the channels are regions.
        sample: number of the sample, 0 to samples - 1.
        samples: n.
        seed: of the prediction.
        stage: which draw of a sample; other uniforms at each.
        parts: J, number of parts of the volume.
        dependence: rho in [0, 1].
        central: v is 1/2, not drawn: for a mean that is made the same way everywhere.

    Returns:
        (C, J) float32 on the CPU.

    Raises:
        ValueError: if the dependence lies outside [0, 1].
    """
    if not 0 <= dependence <= 1:
        raise ValueError(f'dependence is {dependence}, it must lie in 0 to 1.')
    columns = 1 if regions or num_channels == 2 else num_channels
    generator = torch.Generator().manual_seed(seed * 1009 + stage)
    u = _stratified(columns, 1, sample, samples, generator, central).expand(columns, parts)
    if dependence < 1:
        z = torch.special.ndtri(_stratified(columns, parts, sample, samples, generator, central))
        shared = torch.special.ndtri(u)
        u = torch.special.ndtr(math.sqrt(dependence) * shared + math.sqrt(1 - dependence) * z)
    u = u.clamp(1e-9, 1 - 1e-9)
    if columns == num_channels and not regions:
        return (-torch.log(-torch.log(u))).float()
    threshold = -torch.logit(u).float()
    return threshold.expand(num_channels, parts) if regions else torch.cat([torch.zeros(1, parts), threshold])


def _stratified(columns: int, parts: int, sample: int, samples: int, generator: torch.Generator, central: bool
                ) -> Tensor:
    """(columns, parts) float64 uniforms of one of n samples, each stratified over the n."""
    order = torch.rand((samples, columns, parts), generator=generator).argsort(0)
    offset = torch.rand((columns, parts), generator=generator, dtype=torch.float64)
    return ((order[sample] + (0.5 if central else offset)) / samples).clamp(1e-9, 1 - 1e-9)


def drawn_logits(probabilities: Tensor, regions: bool, shifts: Tensor, parts: Tensor | None = None) -> Tensor:
    """Logits of probabilities with the shifts added that draw a mask, float32.

    Args:
        probabilities: (C, ...).
        regions: whether the channels are regions.
        shifts: (C, J), see `draw_shifts`.
        parts: (...) integers, which part each voxel belongs to; None if there is one part.
    """
    p = probabilities.float().clamp(SMALLEST_DRAWN, LARGEST_DRAWN)
    logits = p.logit_() if regions else p.log_()
    shifts = shifts.to(logits.device)
    if parts is None or shifts.shape[1] == 1:
        return logits.add_(shifts[:, 0].reshape(-1, *[1] * (logits.ndim - 1)))
    return logits.add_(shifts.index_select(1, parts.flatten()).reshape(logits.shape))


def hard_mask(logits: Tensor, regions: bool) -> Tensor:
    """The mask that logits (C, ...) stand for, small: classes (...) as `coding.class_map` has them, bool of regions
    (C, ...)."""
    return logits > 0 if regions else class_map(logits[None])[0]


def drawn_mask(probabilities: Tensor, regions: bool, shifts: Tensor, parts: Tensor | None = None) -> Tensor:
    """The mask (C, ...) of 0 and 1, float32, that `drawn_logits` with these arguments stand for."""
    return harden(drawn_logits(probabilities, regions, shifts, parts)[None], regions)[0]
