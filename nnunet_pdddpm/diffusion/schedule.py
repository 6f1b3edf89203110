"""How much of the mask is left at each noise level: abar_t for t = 0..T, its signal-to-noise ratio, and step lists.

t = 0 is the clean mask (abar_0 = 1), t = T the noisiest. The papers' and diffusers' zero-based index is t - 1.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def cosine_abar(num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """abar_0..abar_T of the cosine schedule, float64, shape (T + 1,).

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17: f(t) = cos^2((t/T + s) / (1 + s) * pi/2) with s = 0.008,
    beta_t = min(1 - f(t) / f(t-1), 0.999), abar_t = prod(1 - beta).
    """
    t = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return _abar_from_betas((1 - f[1:] / f[:-1]).clamp(max=0.999))


def linear_abar(num_timesteps: int = NUM_TIMESTEPS) -> Tensor:
    """abar_0..abar_T of the linear schedule, float64, shape (T + 1,).

    Ho et al. 2020 (arXiv 2006.11239), section 4: beta_1 = 1e-4 to beta_T = 0.02 for T = 1000.
    """
    return _abar_from_betas(torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64))


def _abar_from_betas(betas: Tensor) -> Tensor:
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, 0)])


SCHEDULES = {'cosine': cosine_abar, 'linear': linear_abar}


def snr(abar: Tensor, t: int) -> float:
    """Signal-to-noise ratio abar_t / (1 - abar_t) of unit-power masks at level t (infinite at t = 0)."""
    a = float(abar[t])
    return math.inf if a == 1 else a / (1 - a)


def t_at_snr(abar: Tensor, ratio: float) -> int:
    """The first level t whose signal-to-noise ratio is not above `ratio` (T if every level's is).

    Raises:
        ValueError: if `ratio` is not positive.
    """
    if not ratio > 0:
        raise ValueError(f'A signal-to-noise ratio is positive, got {ratio}.')
    at_or_below = torch.nonzero(abar / (1 - abar) <= ratio)
    return int(at_or_below[0]) if len(at_or_below) else len(abar) - 1


def truncated_levels(t_start: int, steps: int) -> list[int]:
    """The levels t_start = t_0 > t_1 > ... > t_k = 0 of a truncated chain with k = `steps` steps, evenly spaced.

    PD-DDPM (Guo et al., arXiv 2210.17408) takes every step, k = t_start. t_start = 0 gives [0]: nothing to do.

    Raises:
        ValueError: if t_start is negative, or steps is not in 1..t_start (for t_start > 0).
    """
    if t_start < 0:
        raise ValueError(f't_start is {t_start}, it cannot be negative.')
    if t_start == 0:
        return [0]
    if not 1 <= steps <= t_start:
        raise ValueError(f'steps is {steps}, but a chain from t_start = {t_start} has 1 to {t_start} steps.')
    return [(t_start * (steps - i) + steps // 2) // steps for i in range(steps + 1)]
