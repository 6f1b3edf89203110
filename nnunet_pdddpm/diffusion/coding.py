"""Masks as the channels that diffusion works on, and back.

One channel per class (background included; exactly one is on) or per region (any number is on). "Off" and "on" are
`low` and `high` of a `MaskCoding`, -1 and +1 unless the paper-faithful trainer asks for 0 and 1. The coding is part of
what a noise level means: signal to noise at the same t is four times higher in power for -1/+1 than for 0/1.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PROBABILITY_FLOOR = 1e-6
"""Probabilities are kept this far from 0 and 1 before the logarithm, so that logits stay within +-14."""
LARGEST_LOGIT = math.log(1 / PROBABILITY_FLOOR)


@dataclass(frozen=True)
class MaskCoding:
    """Values of an "off" and an "on" voxel in a coded mask."""
    low: float = -1.0
    high: float = 1.0

    def encode(self, probabilities: Tensor) -> Tensor:
        """Probabilities (or hard 0/1 masks) in [0, 1] to coded values in [low, high], any shape, float32."""
        return self.low + (self.high - self.low) * probabilities.float()

    def decode(self, x: Tensor) -> Tensor:
        """Coded values to probabilities in [0, 1]; values outside [low, high] are clipped. Inverse of `encode`."""
        return ((x.float() - self.low) / (self.high - self.low)).clamp(0, 1)


def one_hot(labels: Tensor, num_channels: int) -> Tensor:
    """Label map (B, 1, ...) of integers in 0..num_channels-1 to a float32 one-hot (B, num_channels, ...).

    Raises:
        ValueError: if the label map has another than one channel.
    """
    if labels.shape[1] != 1:
        raise ValueError(f'A label map has one channel, got {labels.shape[1]} in shape {tuple(labels.shape)}.')
    hot = torch.zeros((labels.shape[0], num_channels, *labels.shape[2:]), device=labels.device)
    return hot.scatter_(1, labels.long(), 1)


def regions_to_channels(labels: Tensor, regions: list[tuple[int, ...]]) -> Tensor:
    """Label map (B, 1, ...) to float32 region masks (B, len(regions), ...): channel r is 1 where the label is in r."""
    return torch.cat([torch.isin(labels, torch.tensor(r, device=labels.device)) for r in regions], 1).float()


def harden(logits: Tensor, regions: bool) -> Tensor:
    """Logits (B, C, ...) to the hard mask nnU-Net makes of them, as float32 0/1 channels of the same shape.

    Softmax heads: the class with the largest logit, the first of several. Region heads: every channel with a sigmoid
    above 0.5.
    """
    if regions:
        return (logits > 0).float()
    places = _places(logits.shape[1], logits)
    return (places == _first_largest(logits, places)).float()


def class_map(logits: Tensor) -> Tensor:
    """Logits (B, C, ...) to the classes (B, ...) of `harden`'s mask, uint8 (int16 from 256 classes on).

    C where the logits are NaN, which are no mask.
    """
    return logits.shape[1] - _first_largest(logits, _places(logits.shape[1], logits))[:, 0]


def _places(channels: int, like: Tensor) -> Tensor:
    """(1, C, 1, ...): C for the first channel, down to 1 for the last."""
    dtype = torch.uint8 if channels < 256 else torch.int16
    return torch.arange(channels, 0, -1, dtype=dtype, device=like.device).reshape(1, -1, *[1] * (like.ndim - 2))


def _first_largest(logits: Tensor, places: Tensor) -> Tensor:
    """(B, 1, ...) place of the channel with the largest logit, the first of several; 0 where they are NaN.

    argmax over channels is a dozen times slower on a CPU.
    """
    return ((logits == logits.amax(1, keepdim=True)) * places).amax(1, keepdim=True)


def logits_to_probabilities(logits: Tensor, regions: bool) -> Tensor:
    """Network logits (B, C, ...) to float32 probabilities: softmax over C, or sigmoid per region."""
    return torch.sigmoid(logits.float()) if regions else torch.softmax(logits.float(), 1)


def probabilities_to_logits(probabilities: Tensor, regions: bool) -> Tensor:
    """Probabilities (B, C, ...) to bounded float32 logits that nnU-Net's softmax (sigmoid) turns back into them.

    The result lies within +-log(1 / PROBABILITY_FLOOR) = +-13.8: finite in fp16, also after nnU-Net's Gaussian
    weighting (factor 10) and the accumulation over tiles and mirrorings.
    """
    p = probabilities.float().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    return p.logit_() if regions else p.log_()
