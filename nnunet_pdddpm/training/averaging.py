"""Exponential moving average of the denoiser's weights, on `torch.optim.swa_utils.AveragedModel`."""
from __future__ import annotations

from collections.abc import Callable
from typing import Union

import torch
from torch import Tensor, nn

ParameterList = Union[tuple[Tensor, ...], list[Tensor]]


def average_weights(decay: float) -> Callable[[ParameterList, ParameterList, Tensor | int], None]:
    """Update rule average <- d average + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)) at update n.

    The rising decay lets an average over a short training forget the weights it started from.
    """
    @torch.no_grad()
    def update(averaged: ParameterList, current: ParameterList, num_averaged: Tensor | int) -> None:
        n = float(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
    return update


def swap_parameters(one: nn.Module, other: nn.Module) -> None:
    """Exchange the parameter values of two modules of the same architecture, without copying them."""
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        p.data, q.data = q.data, p.data
