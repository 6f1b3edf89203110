"""The forward process and its reverse step. A process is one small class with three methods, so that trainer and
samplers do not know which they hold:

    marginal(x0, level, noise)                  a draw of the noisy mask in training
    start(mask, level, noise)                   the first state of a truncated reverse chain
    step(x, x0_hat, level, lower, noise)        from a level down to a lower one, given the denoiser's estimate of x0

`x0`, `mask` and `x` are coded masks (B, C, ...), `noise` is standard normal of the same shape. A level is a log SNR
lambda (Kingma et al. 2021, arXiv 2107.00630), a number or a tensor (B,), with abar = sigmoid(lambda); `CLEAN` is no
noise at all.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Union

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.levels import CLEAN

Level = Union[float, Tensor]


class ForwardProcess(Protocol):
    """What trainer and samplers ask of a process: see the module's docstring."""

    def marginal(self, x0: Tensor, level: Level, noise: Tensor) -> Tensor: ...

    def start(self, mask: Tensor, level: Level, noise: Tensor) -> Tensor: ...

    def step(self, x: Tensor, x0_hat: Tensor, level: Level, lower: Level, noise: Tensor) -> Tensor: ...


def signal(level: Level) -> Tensor:
    """sqrt(abar) at a log SNR, float64: what the mask is multiplied with."""
    return torch.sigmoid(_double(level)).sqrt()


def noise_scale(level: Level) -> Tensor:
    """sqrt(1 - abar) at a log SNR, float64: what the noise is multiplied with."""
    return torch.sigmoid(-_double(level)).sqrt()


def _double(level: Level) -> Tensor:
    """A level in float64, on its device: a copy would wait for a GPU. mps has no float64, so there it is on the CPU."""
    if isinstance(level, Tensor):
        return (level.cpu() if level.device.type == 'mps' else level).double()  # one step would ask mps for float64
    return torch.tensor(level, dtype=torch.float64)


def per_item(values: Tensor, like: Tensor) -> Tensor:
    """() or (B,) values on `like`'s device, float32, shaped (1 or B, 1, 1, ...) to multiply `like` (B, C, ...)."""
    return values.float().to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def q_sample(x0: Tensor, level: Level, noise: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps: Ho et al. 2020 (arXiv 2006.11239), eq. 4."""
    return per_item(signal(level), x0) * x0 + per_item(noise_scale(level), x0) * noise


def log_likelihood_ratio(x: Tensor, level: Level, low: float, high: float) -> Tensor:
    """What a noisy voxel says by itself of whether its channel is on, as a logit (B, C, ...) float32.

    With x = a x0 + s eps, a = sqrt(abar) and s = sqrt(1 - abar), it is the log-likelihood ratio

        log N(x; a high, s^2) - log N(x; a low, s^2) = a (high - low) (x - a (high + low) / 2) / s^2.

    The noise of the voxels is independent given the clean mask. So by Bayes' rule the posterior's log odds at a voxel
    are those given the image and all other voxels, plus this: exactly, and for classes, too, where a softmax of the
    channels' sums is the posterior.

    Args:
        x: (B, C, ...) noisy coded mask.
        level: log SNR, a number or (B,).
        low, high: coded values of an "off" and an "on" voxel.
    """
    a, s = signal(level), noise_scale(level)
    middle = per_item(a * (high + low) / 2, x)
    return per_item(a * (high - low) / s ** 2, x) * (x.float() - middle)


def eps_from_x0(x: Tensor, x0: Tensor, level: Level) -> Tensor:
    """The noise that makes x_t of x0: q_sample solved for eps. Only for levels with noise."""
    return (x - per_item(signal(level), x) * x0) / per_item(noise_scale(level), x)


def x0_from_eps(x: Tensor, eps: Tensor, level: Level) -> Tensor:
    """The clean mask under x_t for a given noise: q_sample solved for x0 (Ho et al. 2020, eq. 15)."""
    return (x - per_item(noise_scale(level), x) * eps) / per_item(signal(level), x)


def ancestral_step(x: Tensor, x0_hat: Tensor, level: Level, lower: Level, noise: Tensor) -> Tensor:
    """One reverse step from level t to any lower level s: Ho et al. 2020, eqs. 6 and 7, for any two levels.

        eps_hat = (x_t - sqrt(abar_t) x0_hat) / sqrt(1 - abar_t)
        sigma^2 = (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s)
        x_s     = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sigma z

    as Song et al. 2021 (arXiv 2010.02502), eqs. 12 and 16, write it with eta = 1. At `CLEAN` it is x0_hat itself.
    """
    high, low = noise_scale(level) ** 2, noise_scale(lower) ** 2
    variance = low / high * (1 - (signal(level) / signal(lower)) ** 2)
    eps_scale = (low - variance).clamp(min=0).sqrt()
    return (per_item(signal(lower), x) * x0_hat + per_item(eps_scale, x) * eps_from_x0(x, x0_hat, level)
            + per_item(variance.sqrt(), x) * noise)


class Ancestral:
    """Gaussian noise, taken away in the steps of DDPM.

    PD-DDPM (Guo et al., arXiv 2210.17408): the chain starts at x_t' = sqrt(abar_t') x_pre + sqrt(1 - abar_t') eps, on
    the assumption that at t' the noised pre-segmentation and the noised truth are hard to tell apart.
    """

    def marginal(self, x0: Tensor, level: Level, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x0)."""
        return q_sample(x0, level, noise)

    @torch.compiler.disable  # the level is a Python number: torch.compile would make a graph for every one
    def start(self, mask: Tensor, level: Level, noise: Tensor) -> Tensor:
        """The noised pre-segmentation."""
        return q_sample(mask, level, noise)

    @torch.compiler.disable
    def step(self, x: Tensor, x0_hat: Tensor, level: Level, lower: Level, noise: Tensor) -> Tensor:
        """`ancestral_step`."""
        return ancestral_step(x, x0_hat, level, lower, noise)


class Redrawing(Ancestral):
    """Steps from mask to mask: each but the last draws one and noises it as training does a truth.

        x0 ~ p(x0 | x_t) of the denoiser,      x_s ~ q(x_s | x0)

    The clean mask is drawn and not averaged, as in the sum over x0 of Austin et al., arXiv 2107.03006, eq. 4; but x_s
    is noised again and not drawn given x_t, too: the step of Song et al., arXiv 2303.01469, algorithm 1, which has the
    same marginals. So x_s is noise on a mask. Noise on a mean of masks is nothing that training has shown, and the next
    estimate from it comes out too sure.
    """

    def __init__(self, draw_mask: Callable[[Tensor, float], Tensor]) -> None:
        """`draw_mask`: (estimate x0_hat, lower level) -> a coded mask drawn from it, of the same shape."""
        self.draw_mask = draw_mask

    @torch.compiler.disable
    def step(self, x: Tensor, x0_hat: Tensor, level: Level, lower: Level, noise: Tensor) -> Tensor:
        """A noised mask at the lower level; at `CLEAN` the estimate itself."""
        return x0_hat if lower == CLEAN else self.marginal(self.draw_mask(x0_hat, float(lower)), lower, noise)
