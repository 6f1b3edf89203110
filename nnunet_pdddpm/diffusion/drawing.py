"""The last step of a sample: a mask drawn from the probabilities that the chain ends with, not their mode."""
from __future__ import annotations

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import probabilities_to_logits
from nnunet_pdddpm.diffusion.schedule import NUM_TIMESTEPS


def draw_shifts(num_channels: int, regions: bool, sample: int, samples: int, seed: int, level: int = 0) -> Tensor:
    """Constants to add to a sample's logits, so that nnU-Net's rule then draws a mask instead of taking the likeliest.

    The Gumbel-max trick (Maddison et al., arXiv 1411.0030, section 2): argmax_c (log p_c + g_c) with Gumbel g_c is a
    draw from p. Every voxel is drawn with its own probabilities, but with the same g_c for the whole volume: so a mask
    has no speckle, and margins move together. For two classes and for regions that is a threshold: p > u with one
    uniform u for all voxels and regions (of which nested ones stay nested).

    The uniforms are stratified over the samples: of n samples each has another of the quantiles (i + 1/2) / n. So the
    mean of the n masks is the samples' mean probability as nearly as n masks can give it; and a single sample has
    u = 1/2, the likeliest mask. Between the steps of a chain they are (i + v) / n with one uniform v for all samples
    (systematic sampling), so that a mask is a draw also where there are few.

    Args:
        num_channels: C.
        regions: whether the channels are regions.
        sample: number of the sample, 0 to samples - 1.
        samples: n.
        seed: of the prediction.
        level: noise level at which a chain goes on with the mask, 0 at its end; other uniforms at each.

    Returns:
        (C,) float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed * (NUM_TIMESTEPS + 1) + level)
    columns = 1 if regions or num_channels == 2 else num_channels
    order = torch.stack([torch.randperm(samples, generator=generator) for _ in range(columns)])
    u = (order[:, sample] + (torch.rand(columns, generator=generator) if level else 0.5)) / samples
    if columns == num_channels and not regions:
        return -torch.log(-torch.log(u))
    threshold = -torch.logit(u)
    return threshold.expand(num_channels) if regions else torch.cat([torch.zeros(1), threshold])


def drawn_logits(probabilities: Tensor, regions: bool, shifts: Tensor) -> Tensor:
    """Logits of a sample's probabilities (C, ...) with the shifts (C,) that draw its mask added, float32."""
    logits = probabilities_to_logits(probabilities[None], regions)[0]
    return logits + shifts.to(logits.device).reshape(-1, *[1] * (logits.ndim - 1))
