"""The forward process and its reverse step. A process is one small class with three methods, so that trainer and
samplers do not know which they hold:

    marginal(x0, x_pre, t, noise)            a draw of x_t in training
    start(x_pre, t, noise)                   the first state of a truncated reverse chain
    step(x, x0_hat, x_pre, t, s, noise)      from level t down to level s, given the denoiser's estimate of x0

and `stochastic`: whether a step uses its noise.

`x0`, `x_pre` and `x` are coded masks (B, C, ...), `noise` is standard normal of the same shape, levels are integers
0..T, one for the batch or a tensor (B,) of them.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Union

import torch
from torch import Tensor

Level = Union[int, Tensor]


class ForwardProcess(Protocol):
    """What trainer and samplers ask of a process: see the module's docstring."""

    @property
    def stochastic(self) -> bool: ...

    def marginal(self, x0: Tensor, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor: ...

    def start(self, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor: ...

    def step(self, x: Tensor, x0_hat: Tensor, x_pre: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor: ...


def at_level(values: Tensor, t: Level, like: Tensor) -> Tensor:
    """values[t] as factors of `like` (B, C, ...): see `per_item`."""
    return per_item(values[torch.as_tensor(t, device=values.device)], like)


def per_item(values: Tensor, like: Tensor) -> Tensor:
    """() or (B,) values on `like`'s device, float32, shaped (1 or B, 1, 1, ...) to multiply `like` (B, C, ...)."""
    return values.float().to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def q_sample(x0: Tensor, t: Level, noise: Tensor, abar: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps: Ho et al. 2020 (arXiv 2006.11239), eq. 4."""
    return at_level(abar.sqrt(), t, x0) * x0 + at_level((1 - abar).sqrt(), t, x0) * noise


def eps_from_x0(x: Tensor, x0: Tensor, t: Level, abar: Tensor) -> Tensor:
    """The noise that makes x_t of x0: q_sample solved for eps. Zero at t = 0, where x_t holds no noise."""
    denominator = at_level((1 - abar).sqrt(), t, x)
    eps = (x - at_level(abar.sqrt(), t, x) * x0) / denominator.clamp(min=1e-12)
    return torch.where(denominator > 0, eps, torch.zeros_like(eps))


def x0_from_eps(x: Tensor, eps: Tensor, t: Level, abar: Tensor) -> Tensor:
    """The clean mask under x_t for a given noise: q_sample solved for x0 (Ho et al. 2020, eq. 15)."""
    return (x - at_level((1 - abar).sqrt(), t, x) * eps) / at_level(abar.sqrt(), t, x)


def ddim_step(x: Tensor, x0_hat: Tensor, t: Level, s: Level, noise: Tensor, abar: Tensor, eta: float = 0.0) -> Tensor:
    """One reverse step from level t to any lower level s: Song et al. 2021 (arXiv 2010.02502), eqs. 12 and 16.

        eps_hat = (x_t - sqrt(abar_t) x0_hat) / sqrt(1 - abar_t)
        sigma   = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)
        x_s     = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - sigma^2) eps_hat + sigma z

    eta = 0 is deterministic DDIM, eta = 1 the ancestral DDPM step. At s = 0 the result is x0_hat itself.

    Raises:
        ValueError: if eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f'eta is {eta}, it must lie in [0, 1].')
    # in float64: at low levels abar_t and abar_s nearly cancel
    abar_t, abar_s = (abar[torch.as_tensor(level, device=abar.device)] for level in (t, s))
    variance = eta ** 2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    of_eps = (1 - abar_s - variance).clamp(min=0).sqrt()
    eps_hat = eps_from_x0(x, x0_hat, t, abar)
    return per_item(abar_s.sqrt(), x) * x0_hat + per_item(of_eps, x) * eps_hat + per_item(variance.sqrt(), x) * noise


class GaussianProcess:
    """The DDPM forward process, started for prediction at the noised pre-segmentation.

    PD-DDPM (Guo et al., arXiv 2210.17408): the chain starts at x_t' = sqrt(abar_t') x_pre + sqrt(1 - abar_t') eps, on
    the assumption that at t' the noised pre-segmentation and the noised truth are hard to tell apart.
    """

    def __init__(self, abar: Tensor, eta: float = 0.0) -> None:
        """`abar`: abar_0..abar_T from `schedule`; `eta`: stochasticity of the reverse steps in [0, 1]."""
        self.abar = abar
        self.eta = eta

    @property
    def stochastic(self) -> bool:
        """True unless the steps are those of DDIM."""
        return self.eta > 0

    def marginal(self, x0: Tensor, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x0); the pre-segmentation has no part in it."""
        return q_sample(x0, t, noise, self.abar)

    @torch.compiler.disable  # the level is a Python number: torch.compile would make a graph for every one
    def start(self, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        """The noised pre-segmentation; at t = 0 the pre-segmentation itself, bit for bit."""
        return q_sample(x_pre, t, noise, self.abar)

    @torch.compiler.disable
    def step(self, x: Tensor, x0_hat: Tensor, x_pre: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor:
        """`ddim_step` with this process's eta."""
        return ddim_step(x, x0_hat, t, s, noise, self.abar, self.eta)


class Redrawing:
    """A process whose steps go from mask to mask: each but the last draws one and noises it as training does a truth.

        x0 ~ p(x0 | x_t) of the denoiser,      x_s ~ q(x_s | x0)

    The clean mask is drawn and not averaged, as in the sum over x0 of Austin et al., arXiv 2107.03006, eq. 4; but x_s
    is noised anew and not drawn given x_t, too: the step of Song et al., arXiv 2303.01469, algorithm 1, which has the
    same marginals. So x_s is noise on a mask. Noise on a mean of masks is nothing that training has shown, and the next
    estimate from it comes out too sure.
    """

    stochastic = True

    def __init__(self, process: ForwardProcess, draw_mask: Callable[[Tensor, Level], Tensor]) -> None:
        """`draw_mask`: (estimate x0_hat, level) -> a coded mask drawn from it, of the same shape."""
        self.process, self.draw_mask = process, draw_mask

    def marginal(self, x0: Tensor, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        """That of the process."""
        return self.process.marginal(x0, x_pre, t, noise)

    @torch.compiler.disable
    def start(self, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        """That of the process."""
        return self.process.start(x_pre, t, noise)

    @torch.compiler.disable
    def step(self, x: Tensor, x0_hat: Tensor, x_pre: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor:
        """A noised mask at s; at s = 0 the estimate itself."""
        return x0_hat if s == 0 else self.process.marginal(self.draw_mask(x0_hat, s), x_pre, s, noise)
