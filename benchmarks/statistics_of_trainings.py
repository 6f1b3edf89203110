"""Means and intervals whose unit is the training: cases within a training are averaged first."""
from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from scipy import stats

Interval = tuple[float, float, float]
"""Mean and ends."""


def file_name(title: str) -> str:
    """Of a row, in the names of its files."""
    return ''.join(c if c.isalnum() else '_' for c in title)


def files_of_trainings(folder: Path, name: str, ending: str = '.json') -> list[Path]:
    """Files `NAME__FOLD ENDING` of the trainings 0, 1, ..., in this order; raises ValueError if one is missing."""
    pattern = re.compile(re.escape(name) + r'__\d+' + re.escape(ending))
    files = [file for file in folder.glob('*') if pattern.fullmatch(file.name)]
    expected = [folder / f'{name}__{fold}{ending}' for fold in range(len(files))]
    if {*files} != {*expected}:
        raise ValueError(f'{folder} lacks one of {", ".join(file.name for file in expected)}: measure it first.')
    return expected


def spread(values: np.ndarray, digits: int = 3) -> str:
    """Mean, and the standard deviation over trainings, of (trainings, cases)."""
    of_trainings = np.nanmean(values, 1)
    sd = f' ± {of_trainings.std(ddof=1):.{digits}f}' if len(of_trainings) > 1 else ' (one training)'
    return f'{of_trainings.mean():.{digits}f}{sd}'


def t_interval(differences: np.ndarray) -> Interval:
    """Mean of (trainings,) differences and its 95 % interval by Student's t; nan ends for a single training."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, float('nan'), float('nan')
    half = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences))
    return mean, mean - half, mean + half


def difference(one: np.ndarray, other: np.ndarray, digits: int = 3) -> str:
    """Paired difference of (trainings, cases) with its interval; without one where there are fewer than 3 trainings.

    Raises ValueError if one has other trainings than the other.
    """
    if one.shape != other.shape:
        raise ValueError(f'{one.shape} and {other.shape} trainings and cases cannot be paired.')
    mean, low, high = t_interval(np.nanmean(one, 1) - np.nanmean(other, 1))
    if len(one) < 3:
        return f'{mean:+.{digits}f} (no interval: fewer than 3 trainings)'
    return f'{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})'
