"""What a noise level is: the share of the mask's uncertainty that it leaves, and the log SNR that belongs to it.

A noisy mask x = sqrt(sigmoid(lambda)) x0 + sqrt(sigmoid(-lambda)) eps has the log signal-to-noise ratio lambda. What
that number leaves undecided depends on the size of what is undecided: of two masks that differ in m voxels of C
channels, 44 % of the uncertainty is left at lambda = ln(1.25 / (m C)), a bit in white noise with an SNR of 1.25. So a
level is named by u in [0, 1], the cross-entropy of the denoiser there over that at pure noise: 1 leaves everything
open, 0 nothing. Steps that are even in u each decide the same share.
This is the time warping of Dieleman et al. 2022 (CDCD, arXiv 2211.15089, section 4) on log SNR (Kingma et al. 2021,
arXiv 2107.00630).
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CLEAN = math.inf
"""Log SNR of the clean mask, with which every chain ends."""
HIGHEST = 4.0
"""Log SNR at which a single voxel is decided: the end of a measured table."""
MARGIN = 5.0
"""Log SNR by which a measured table begins below that at which two masks that differ everywhere keep 44 % of their
uncertainty."""


def lowest_log_snr(voxels: int, channels: int) -> float:
    """Log SNR at which not even two masks that differ in every voxel can be told apart.

    MARGIN below ln(1.25 / (voxels channels)), where 44 % of the uncertainty between the two is left: -14 for 64 x 64
    voxels and 2 channels, -20 for 128^3 and 2.
    """
    return math.log(1.25 / (voxels * channels)) - MARGIN


@dataclass(frozen=True)
class LevelTable:
    """A monotone map between the share of uncertainty u and log SNR, linear between its nodes."""
    log_snr: tuple[float, ...]
    """Of the nodes, rising."""
    share: tuple[float, ...]
    """u at the nodes, falling from 1 to 0."""

    def __post_init__(self) -> None:
        """Raises ValueError if it is not monotone, or does not go from 1 to 0."""
        rising, falling = np.diff(self.log_snr), np.diff(self.share)
        if not (len(self.log_snr) == len(self.share) > 1 and (rising > 0).all() and (falling < 0).all()
                and np.isfinite(self.log_snr).all()):
            raise ValueError('The table of noise levels is not monotone: log SNR must rise from node to node and the '
                             'share of uncertainty must fall. Train the model again with this version.')
        if (self.share[0], self.share[-1]) != (1, 0):
            raise ValueError(f'The table of noise levels goes from a share of {self.share[0]:g} to {self.share[-1]:g}, '
                             f'not from 1 to 0. Train the model again with this version.')

    def log_snr_at(self, share: float) -> float:
        """Log SNR that leaves this share of the uncertainty; raises ValueError unless it lies in [0, 1]."""
        if not 0 <= share <= 1:
            raise ValueError(f'A share of uncertainty lies in 0 to 1, got {share}.')
        return float(np.interp(-share, -np.array(self.share), self.log_snr))

    def share_at(self, log_snr: float) -> float:
        """Share of the uncertainty that a log SNR leaves, in [0, 1]."""
        return float(np.interp(log_snr, self.log_snr, self.share))

    def chain(self, start: float, steps: int) -> list[float]:
        """Log SNRs start = u_0 > u_1 > ... > u_k = 0 of a chain with k = `steps` steps that share the uncertainty
        evenly.

        The last is `CLEAN`. start = 0 gives [CLEAN]: nothing to do.

        Raises:
            ValueError: if start lies outside [0, 1], or steps is below 1 for a start above 0.
        """
        if not 0 <= start <= 1:
            raise ValueError(f'start is {start}, it must lie in 0 to 1.')
        if start == 0:
            return [CLEAN]
        if steps < 1:
            raise ValueError(f'steps is {steps}, but a chain has at least 1.')
        return [*(self.log_snr_at(start * ((steps - i) / steps)) for i in range(steps)), CLEAN]


def even_table(lowest: float, nodes: int) -> LevelTable:
    """The table before anything has been measured: u falls evenly with log SNR from `lowest` to `HIGHEST`."""
    return LevelTable(tuple(np.linspace(lowest, HIGHEST, nodes)), tuple(np.linspace(1, 0, nodes)))


def cosine_abar(num_timesteps: int = 1000) -> np.ndarray:
    """abar_0..abar_T of the cosine schedule, shape (T + 1,).

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17: f(t) = cos^2((t/T + s) / (1 + s) * pi/2) with s = 0.008,
    beta_t = min(1 - f(t) / f(t-1), 0.999), abar_t = prod(1 - beta). t = 0 is the clean mask; papers' and diffusers'
    zero-based index is t - 1.
    """
    t = np.arange(num_timesteps + 1) / num_timesteps
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.concatenate([[1.0], np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))])


def paper_table(t_start: int = 300) -> LevelTable:
    """Levels t = T'..1 of the paper (Guo et al., arXiv 2210.17408) under the cosine schedule, evenly in t.

    Its u is t / T', no measured share: a chain of T' steps takes every level, as the paper's does. The node at u = 0 is
    never a level of a chain or of training.
    """
    abar = cosine_abar()[t_start:0:-1]
    log_snr = np.log(abar / (1 - abar))
    return LevelTable((*log_snr, log_snr[-1] + 1), tuple(np.arange(t_start, -1, -1) / t_start))

