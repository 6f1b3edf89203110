"""Means and intervals whose unit is the training: cases within a training are averaged first."""
from __future__ import annotations

import numpy as np
from scipy import stats


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Mean, and the standard deviation over trainings, of (trainings, cases)."""
    of_trainings = np.nanmean(values, 1)
    sd = f' ± {of_trainings.std(ddof=1):.{digits}f}' if len(of_trainings) > 1 else ' (one training)'
    return f'{of_trainings.mean():.{digits}f}{sd}'


def t_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of (trainings,) differences and its 95 % interval by Student's t; nan ends for a single training."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, float('nan'), float('nan')
    half = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences))
    return mean, mean - half, mean + half


def difference(one: np.ndarray, other: np.ndarray, digits: int = 3) -> str:
    """Paired difference of (trainings, cases) with its interval; without one where there are fewer than 3 trainings."""
    number = min(len(one), len(other))
    mean, low, high = t_interval(np.nanmean(one[:number], 1) - np.nanmean(other[:number], 1))
    if number < 3:
        return f'{mean:+.{digits}f} (no interval: fewer than 3 trainings)'
    return f'{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})'
