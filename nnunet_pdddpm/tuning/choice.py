"""The rules that pick sampling settings from a table of validation cases: pure, and repeatable by their seed."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.errors import TuningError

CONFIDENCE = 0.95
"""Of the interval of a difference between two settings, over cases."""


@dataclass(frozen=True)
class MaskRow:
    """What a mask gives on each case; the arrays (cases,) of all rows have the same order."""
    settings: SamplingSettings
    dice: np.ndarray
    """In [0, 1]; nan where neither truth nor prediction holds a label."""
    nll: np.ndarray
    """Nats a voxel."""

    @property
    def calls(self) -> int:
        """Network calls that plain `nnUNetv2_predict` makes for a tile, without mirroring."""
        s = self.settings
        if s.is_stock or s.mask_blind == 1:
            return 1
        return 1 + (s.mask_blind > 0) + (s.mask_samples * s.steps if s.mask_chain > 0 else 0)


@dataclass(frozen=True)
class SampleRow:
    """What samples give on each case; the arrays (cases,) of all rows have the same order."""
    settings: SamplingSettings
    energy: np.ndarray
    """Energy score of the samples, see `Truth.energy`: lower is better."""
    ged: np.ndarray
    """Fair GED² to the truth, or to the raters' masks."""

    @property
    def calls(self) -> int:
        """Denoiser calls that a sample takes for a tile."""
        return self.settings.steps if self.settings.samples_from == 'chain' else 0


def mean(values: np.ndarray) -> float:
    """Mean over the cases in which the value is defined; nan if there is none."""
    return float('nan') if np.isnan(values).all() else float(np.nanmean(values))


def difference_interval(one: np.ndarray, other: np.ndarray, images: Sequence[int] | None = None
                        ) -> tuple[float, float]:
    """95 % interval of mean(one) - mean(other) over paired cases, by Student's t and the jackknife (Tukey 1958).

    Cases that are undefined in both do not count. Where every other value is defined it is the paired t interval. Cases
    of one image are not independent: the jackknife leaves out all of an image at a time.

    Args:
        one: (cases,) with nan where undefined, which a mean leaves out.
        other: of the same cases.
        images: a number for each case, the same for cases of one image; None if each has its own.

    Returns:
        Its ends; infinite where fewer than two images have cases that are defined in both.
    """
    told = ~(np.isnan(one) & np.isnan(other))
    image = (np.arange(len(one)) if images is None else np.array(images))[told]
    one, other = one[told], other[told]
    if len(np.unique(image[~np.isnan(one) & ~np.isnan(other)])) < 2:
        return -np.inf, np.inf
    left_out = [image == i for i in np.unique(image)]
    n = len(left_out)
    without = np.array([np.nanmean(one[~out]) - np.nanmean(other[~out]) for out in left_out])
    error = np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    difference, half = np.nanmean(one) - np.nanmean(other), stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    return float(difference - half), float(difference + half)


def choose_mask(rows: Sequence[MaskRow], images: Sequence[int] | None = None) -> MaskRow:
    """The row for the mask, one whose mean Dice is not below stock's.

    Among these, those whose Dice is within noise of the best one's (the interval of the difference holds 0); of them
    those whose NLL is within noise of the lowest; of them the one with the fewest network calls, and of equal ones that
    with the lowest NLL.

    Args:
        rows: one of them is the stock model itself (`settings.is_stock`).
        images: see `difference_interval`.

    Raises:
        TuningError: if no case has a label to measure Dice by.
    """
    stock = stock_row(rows)
    if np.isnan(stock.dice).all():
        raise TuningError('No validation case has foreground, in the truth or in the stock prediction: there is no '
                          'Dice to choose the sampling settings by.')
    not_worse = [row for row in rows if mean(row.dice) >= mean(stock.dice)]
    best = max(not_worse, key=lambda row: (mean(row.dice), -mean(row.nll)))
    accurate = [row for row in not_worse if difference_interval(best.dice, row.dice, images)[0] <= 0]
    likeliest = min(accurate, key=lambda row: mean(row.nll))
    likely = [row for row in accurate if difference_interval(row.nll, likeliest.nll, images)[0] <= 0]
    return min(likely, key=lambda row: (row.calls, mean(row.nll)))


def choose_measured(rows: Sequence[MaskRow], plain_dice: Callable[[SamplingSettings], np.ndarray],
                    images: Sequence[int] | None = None) -> tuple[SamplingSettings, float]:
    """`choose_mask`, but a mask is only taken if plain `nnUNetv2_predict` does not make a worse one of it than stock.

    A mask of stock or blind probabilities alone is the same there. One with samples or a blend is not: it is made tile
    by tile.

    Args:
        rows: see `choose_mask`.
        plain_dice: Dice (cases,) of the mask that plain `nnUNetv2_predict` makes by settings.
        images: see `difference_interval`.

    Returns:
        The settings, and the mean Dice of their mask in plain `nnUNetv2_predict`.
    """
    rows, stock = list(rows), mean(stock_row(rows).dice)
    while True:
        row = choose_mask(rows, images)
        alone = row.settings.is_stock or row.settings.mask_blind == 1
        dice = mean(row.dice if alone else plain_dice(row.settings))
        if alone or dice >= stock:
            return row.settings, dice
        rows = [other for other in rows if other is not row]


def best_samples(rows: Sequence[SampleRow], number: int = 1) -> list[SampleRow]:
    """The rows with the lowest mean energy score, best first."""
    return sorted(rows, key=lambda row: mean(row.energy))[:number]


def choose_samples(rows: Sequence[SampleRow], images: Sequence[int] | None = None) -> SampleRow:
    """The row for the samples: of those whose energy score is within noise of the lowest, the one with the fewest
    network calls, and of equal ones that with the lowest score. `images`: see `difference_interval`."""
    best = best_samples(rows)[0]
    close = [row for row in rows if difference_interval(row.energy, best.energy, images)[0] <= 0]
    return min(close, key=lambda row: (row.calls, mean(row.energy)))


def stock_row(rows: Sequence[MaskRow]) -> MaskRow:
    """The row of the stock model itself."""
    return next(row for row in rows if row.settings.is_stock)
