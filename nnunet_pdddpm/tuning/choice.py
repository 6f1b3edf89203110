"""The rule that picks sampling settings from a table of validation cases: pure, and repeatable by its seed."""
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_pdddpm.network.settings import SamplingSettings

RESAMPLINGS = 2000
SEED = 12345
LEVEL = 0.95


class TuningError(ValueError):
    """Nothing can be tuned: the message says why and what to do."""


@dataclass(frozen=True)
class Row:
    """What one setting gives on each case; the arrays (cases,) of all rows have the same order."""
    settings: SamplingSettings
    dice: np.ndarray
    """In [0, 1]; nan where neither truth nor prediction holds a label."""
    nll: np.ndarray
    """Nats a voxel."""
    ged: np.ndarray
    """Squared generalised energy distance of its samples to the truth, or to the raters' masks."""
    agreement: np.ndarray | None = None
    """Dice between the samples, nan where none of them holds a label; None where there is one sample."""
    volume_errors: np.ndarray | None = None
    """(cases, labels), see `Truth.volume_errors`; None where there is one sample."""

    @property
    def calls(self) -> int:
        """Denoiser calls that a prediction makes for a tile, without mirroring."""
        return 0 if self.settings.is_stock else self.settings.samples * max(self.settings.steps, 1)


def mean(values: np.ndarray | None) -> float:
    """Mean over the cases in which the value is defined; nan if there is none."""
    return float(np.nanmean(values)) if values is not None and not np.isnan(values).all() else float('nan')


def difference_interval(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """95 % interval of mean(one) - mean(other) over cases: percentiles of a paired, seeded bootstrap (Efron 1979).

    Args:
        one: (cases,) with nan where undefined, which a mean leaves out.
        other: of the same cases.
    """
    index = np.random.default_rng(SEED).integers(len(one), size=(RESAMPLINGS, len(one)))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # a resampling in which every case is undefined
        differences = np.nanmean(one[index], 1) - np.nanmean(other[index], 1)
        low, high = np.nanpercentile(differences, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def choose_mask(rows: Sequence[Row]) -> Row:
    """The row for the consensus mask, one whose mean Dice is not below stock's.

    Among these, those whose Dice is within noise of the best one's (the interval of the difference holds 0); of them
    those whose NLL is within noise of the lowest; of them the one with the fewest network calls, and of equal ones that
    with the lowest NLL.

    Args:
        rows: one of them is the stock model itself (`settings.is_stock`).

    Raises:
        TuningError: if no case has a label to measure Dice by.
    """
    stock = stock_row(rows)
    if np.isnan(stock.dice).all():
        raise TuningError('No validation case has foreground, in the truth or in the stock prediction: there is no '
                          'Dice to choose the sampling settings by.')
    not_worse = [row for row in rows if mean(row.dice) >= mean(stock.dice)]
    best = max(not_worse, key=lambda row: (mean(row.dice), -mean(row.nll)))
    accurate = [row for row in not_worse if difference_interval(best.dice, row.dice)[0] <= 0]
    likeliest = min(accurate, key=lambda row: mean(row.nll))
    likely = [row for row in accurate if difference_interval(row.nll, likeliest.nll)[0] <= 0]
    return min(likely, key=lambda row: (row.calls, mean(row.nll)))


def choose_samples(rows: Sequence[Row]) -> Row:
    """The row for the samples: of those whose GED² is within noise of the lowest, the one with the fewest network
    calls, and of equal ones that with the lowest GED².

    Args:
        rows: of samples without blending.
    """
    closest = min(rows, key=lambda row: mean(row.ged))
    close = [row for row in rows if difference_interval(row.ged, closest.ged)[0] <= 0]
    return min(close, key=lambda row: (row.calls, mean(row.ged)))


def stock_row(rows: Sequence[Row]) -> Row:
    """The row of the stock model itself."""
    return next(row for row in rows if row.settings.is_stock)
