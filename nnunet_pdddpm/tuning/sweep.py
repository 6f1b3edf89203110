"""What many sampling settings give on the validation cases of a fold: Dice, likelihood, diversity."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor
from tqdm import tqdm

from nnunet_pdddpm.diffusion.drawing import draw_shifts
from nnunet_pdddpm.diffusion.schedule import t_at_snr
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.summary import mean_of_known
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.refiner import MASK, SAMPLES, Refiner, stored_settings
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.budget import FEWEST_CASES, Cost, cases_in, settings_in
from nnunet_pdddpm.tuning.cases import Case, ValidationCases
from nnunet_pdddpm.tuning.choice import Row, TuningError, choose_samples, mean
from nnunet_pdddpm.tuning.scores import Truth

SIGNAL_TO_NOISE = (1.0, 0.25, 0.06, 0.016, 0.004)
"""Of the start levels: t = 497, 703, 846, 920 and 960 of the cosine schedule with -1/+1 masks."""
STEPS = (1, 2, 3, 5, 10)
MOST_STEPS_OF_MASK = 3
"""More were not better for the mask in any measurement, and every call of plain prediction costs mirrorings times."""
WAYS = ((0.0, False), (1.0, False), (0.0, True))
"""See `SamplingSettings.way`."""
BLENDS = (0.0, 0.25, 0.5, 0.75)
MEMORY = 4 * 2 ** 30
"""Bytes that running sums of settings measured side by side may take."""


def candidates(refiner: Refiner, prefix: str, mirrored: bool) -> list[SamplingSettings]:
    """What is tried for the mask (`MASK`) or the samples (`SAMPLES`), before blending, cheapest first.

    Everything that is not varied is as stored for the one or the other, but the number of draws for the mask: with
    mirroring a single one, since it meets the image under every mirroring anew; without as many as there are samples.
    For the mask also the direct refinement without a chain, the cheapest there is.
    """
    buffers = dict(refiner.named_buffers(recurse=False))
    stored = stored_settings(buffers, prefix)
    number = 1 if prefix == MASK and mirrored else stored_settings(buffers, SAMPLES).samples
    power = ((refiner.design.coding.high - refiner.design.coding.low) / 2) ** 2  # of a mask: 1 for -1/+1
    t_max = int(refiner.t_max)
    levels = sorted({min(t_at_snr(refiner.abar, ratio / power), t_max) for ratio in SIGNAL_TO_NOISE})
    most = MOST_STEPS_OF_MASK if prefix == MASK else max(STEPS)
    masks = refiner.design.parameterisation == 'x0'  # and not noise: estimates are probabilities of the clean mask
    varied = [(steps, eta, redraw) for steps in STEPS if steps <= most
              for eta, redraw in (WAYS if steps > 1 else WAYS[:1]) if masks or not redraw]
    chains = [replace(stored, t_start=level, steps=steps, samples=number, eta=eta, redraw=redraw,
                      blend=0.0).check(t_max)
              for steps, eta, redraw in varied for level in levels if steps <= level]
    direct = replace(stored, t_start=t_max, steps=0, samples=1, eta=0.0, redraw=False, blend=0.0)
    return [direct, *chains] if prefix == MASK and masks else chains


class SweepVolume(Volume):
    """A volume whose first estimate after `forget` is kept: chains from the same noisy mask begin with it."""

    kept: tuple[Tensor, int, Sequence[tuple[int, ...]], Tensor] | None = None

    def forget(self) -> None:
        """Another start level or sample is to come."""
        self.kept = None

    def denoise(self, x: Tensor, t: int, mirrored: Sequence[tuple[int, ...]]) -> Tensor:
        """As `Volume.denoise`, but not computed twice from the same mask."""
        if t == 0:  # without a chain: the estimate is the result, which the caller turns into probabilities in place
            return super().denoise(x, t, mirrored)
        if self.kept is None:
            self.kept = (x.clone(), t, mirrored, super().denoise(x, t, mirrored))
        elif not (t == self.kept[1] and mirrored == self.kept[2] and torch.equal(x, self.kept[0])):
            return super().denoise(x, t, mirrored)
        return self.kept[3]


@dataclass
class Sweep:
    """What was measured."""
    cases: list[str]
    rows: dict[SamplingSettings, Row]
    for_mask: list[SamplingSettings]
    """Keys of `rows`, with blending; the first is the stock model."""
    for_samples: list[SamplingSettings]
    """Keys of `rows`, without blending."""
    settings_left_out: list[SamplingSettings]
    """Before blending, for want of time."""
    cases_left_out: list[str]
    seconds: float

    def rows_of(self, settings: Iterable[SamplingSettings]) -> list[Row]:
        """Their rows."""
        return [self.rows[s] for s in settings]


Worth = Callable[[dict[SamplingSettings, Row], SamplingSettings], float]
"""What a measured setting is worth."""
Climb = tuple[list[SamplingSettings], Worth]
"""Settings from one level."""
Scores = dict[str, Any]
"""Of one setting on one case: dice, nll, agreement, ged; volume_errors (labels,)."""


def sweep(predictor: VolumePredictor, cases: ValidationCases, seconds: float | None = None,
          clock: Callable[[], float] = time.perf_counter, progress: bool = False) -> Sweep:
    """Measure single steps of samples from all levels, then masks and further steps from the levels that are best so
    far, as long as they are better than fewer.

    Args:
        predictor: with one model.
        cases: of its fold.
        seconds: time budget, None for none. Then single steps are measured on as many cases as there is time for,
            all else on the same cases.
        clock: seconds, of which differences count.
        progress: whether to show a bar.

    Raises:
        TuningError: if the time is too short for single steps on FEWEST_CASES.
    """
    run = _Run(predictor, cases, seconds, clock, progress)
    mirrored = predictor.use_mirroring and bool(predictor.allowed_mirroring_axes)
    for_mask, for_samples = (candidates(predictor.refiner, prefix, mirrored) for prefix in (MASK, SAMPLES))
    stock = stock_settings(predictor.refiner)
    with torch.inference_mode():
        direct, of_mask, of_samples = ([s for s in settings if s.steps == steps]
                                       for settings, steps in ((for_mask, 0), (for_mask, 1), (for_samples, 1)))
        run.single_steps([*direct, *of_samples], [s for s in of_mask[:1] if s not in of_samples])
        rows = run.rows()
        reached = [rows[b] for s in of_samples for b in blended(s) if mean(rows[b].dice) >= mean(rows[stock].dice)]
        best_sample = choose_samples([rows[s] for s in of_samples])
        climbs: list[Climb] = [([s for s in for_samples if s.t_start == best_sample.settings.t_start],
                                lambda rows, s: -mean(rows[s].ged))]
        if reached:
            level = max(reached, key=lambda row: mean(row.dice)).settings.t_start
            climbs.append(([s for s in for_mask if s.steps and s.t_start == level],
                           lambda rows, s: max(mean(rows[b].dice) for b in blended(s))))
        left_out = run.further_steps(climbs)
    run.bar.close()
    rows = run.rows()
    kept, rest = ([name for i, name in enumerate(cases.names) if (i in run.order) == there] for there in (True, False))
    return Sweep(kept, rows, [stock, *(b for s in for_mask if s in rows for b in blended(s))],
                 [s for s in for_samples if s in rows], left_out, rest, clock() - run.start)


def blended(settings: SamplingSettings) -> list[SamplingSettings]:
    """With every weight of the stock model."""
    return [replace(settings, blend=blend) for blend in BLENDS]


def stock_settings(refiner: Refiner) -> SamplingSettings:
    """The stock model itself, as settings for the mask."""
    stored = stored_settings(dict(refiner.named_buffers(recurse=False)), MASK)
    return replace(stored, t_start=0, steps=1, samples=1, eta=0.0, redraw=False, blend=0.0)


class _Run:
    """Measures settings on cases, within a time."""

    def __init__(self, predictor: VolumePredictor, cases: ValidationCases, seconds: float | None,
                 clock: Callable[[], float], progress: bool) -> None:
        self.predictor, self.cases, self.seconds, self.clock = predictor, cases, seconds, clock
        self.start = clock()
        self.order = list(range(len(cases.names)))
        self.measured: list[dict[SamplingSettings, Scores]] = []
        self.voxels = [] if seconds is None else [cases.voxels(name) for name in cases.names]
        self.cost: Cost | None = None
        self.bar = tqdm(desc='Tuning, cases', disable=not progress)

    def left(self) -> float:
        """Seconds; infinite without a budget."""
        return math.inf if self.seconds is None else self.seconds - (self.clock() - self.start)

    def rows(self) -> dict[SamplingSettings, Row]:
        """What has been measured on all cases of `order`."""
        return {s: _row(s, self.measured) for s in self.measured[0]}

    def single_steps(self, settings: list[SamplingSettings], reserved: list[SamplingSettings]) -> None:
        """On all cases, or as many as there is time for, with some to measure after them; `order` then has these."""
        while len(self.measured) < len(self.order):
            if len(self.measured) >= FEWEST_CASES and self.left() < 0:
                self.order = self.order[:len(self.measured)]
                break
            before = self.clock()
            case = CaseSweep(self.predictor, self.cases.load(self.cases.names[self.order[len(self.measured)]]))
            if self.seconds is not None and not self.measured:
                self._choose_cases(case, settings, reserved, self.clock() - before)
            case.measure(settings)
            self.measured.append(case.scores)
            self.bar.total = len(self.order)
            self.bar.update()

    def _choose_cases(self, first: CaseSweep, settings: list[SamplingSettings], reserved: list[SamplingSettings],
                      presegmentation: float) -> None:
        """Measure the cheapest setting on the first case, for what it costs, and see what fits into the time."""
        assert self.seconds is not None
        before = self.clock()
        first.measure(settings[:1])
        mirrorings = len(first.volume.mirrorings)
        passes = max(settings[0].samples, mirrorings)
        self.cost = Cost(presegmentation / self.voxels[0], (self.clock() - before) / passes / self.voxels[0],
                         mirrorings)
        rounds = [settings, reserved] if reserved else [settings]
        self.order = (cases_in(self.seconds, rounds, self.voxels, self.cost)
                      or cases_in(self.seconds, rounds[:1], self.voxels, self.cost))
        if not self.order:
            raise TuningError(f'{self.seconds / 60:.1f} minutes are too short to tune the sampling settings: single '
                              f'steps on {min(FEWEST_CASES, len(self.voxels))} cases take longer.')

    def further_steps(self, climbs: list[Climb]) -> list[SamplingSettings]:
        """One more number of steps after the other, in each climb until the best with it is not better than the best
        with fewer, from the second number on in the way that was best at the first; single steps that are not known
        with the first. Returns what was left out for want of time."""
        for steps in sorted({s.steps for settings, _ in climbs for s in settings} - {1}) or [1]:
            tried = list(dict.fromkeys(s for settings, _ in climbs for s in settings
                                       if s.steps <= steps and s not in self.measured[0]))
            if not self._measure_further(tried):
                return list(dict.fromkeys(s for settings, _ in climbs for s in settings if s not in self.measured[0]))
            rows = self.rows()
            climbs = [climb for settings, worth in climbs for climb in _higher(settings, worth, rows, steps)]
        return []

    def _measure_further(self, settings: list[SamplingSettings]) -> bool:
        """On the same cases; whether there was time for all of them."""
        kept = settings
        if self.cost is not None:
            kept = settings_in(self.left(), settings, [self.voxels[i] for i in self.order], self.cost)
        self.bar.total += len(self.order) if kept else 0
        further: list[dict[SamplingSettings, Scores]] = []
        for i in self.order if kept else []:
            if self.left() < 0:
                if len(further) < FEWEST_CASES:
                    return False
                self.order, self.measured = self.order[:len(further)], self.measured[:len(further)]
                break
            case = CaseSweep(self.predictor, self.cases.load(self.cases.names[i]))
            case.measure(kept)
            further.append(case.scores)
            self.bar.update()
        self.measured = [{**one, **more} for one, more in zip(self.measured, further, strict=True)] \
            if kept else self.measured
        return kept == settings


def _higher(settings: list[SamplingSettings], worth: Worth, rows: dict[SamplingSettings, Row], steps: int
            ) -> Iterator[Climb]:
    """What is left of a climb if the best with so many steps is better than the best with fewer."""
    fewer, here = ([s for s in settings if s in rows and (s.steps < steps) == less] for less in (True, False))
    best = max(here, key=lambda s: worth(rows, s), default=None)
    if best is not None and fewer and worth(rows, best) > max(worth(rows, s) for s in fewer):
        yield [s for s in settings if s in rows or s.way == best.way], worth


class CaseSweep:
    """A pre-segmented case, and the scores of the stock model and of every setting measured so far."""

    def __init__(self, predictor: VolumePredictor, case: Case) -> None:
        """Pre-segments."""
        self.predictor, self.case = predictor, case
        self.scores: dict[SamplingSettings, Scores] = {}
        self._keep_in_main_memory_if_need_be(lambda: None, opened=False)

    def measure(self, settings: Sequence[SamplingSettings]) -> None:
        """Add the scores of settings, with every blending, that are not known yet."""
        unknown = [s for s in settings if s not in self.scores]
        self._keep_in_main_memory_if_need_be(lambda: self._measure(unknown))

    def _keep_in_main_memory_if_need_be(self, do: Callable[[], None], opened: bool = True) -> None:
        try:
            if not opened:
                self._open(self.predictor.device if self.predictor.device.type == 'cuda' else torch.device('cpu'))
            return do()
        except torch.OutOfMemoryError:
            if opened and self.volume.device.type == 'cpu':
                raise
            print('The volume does not fit on the device: its arrays are kept in main memory.')
            torch.cuda.empty_cache()
        self._open(torch.device('cpu'))
        do()

    def _open(self, device: torch.device) -> None:
        image, unpad = pad_nd_image(self.case.image, self.predictor.configuration_manager.patch_size, 'constant',
                                    {'value': 0}, True, None)
        self.box = (slice(None), *unpad[1:])
        self.volume = SweepVolume(self.predictor, image, device)
        self.volume.start_fold()
        self.truth = Truth(self.case.labels, self.predictor.label_manager, device, self.case.raters)
        self.stock = self.volume.add_stock(torch.zeros(self.volume.shape, device=device), 1.0)[self.box]
        dice, nll = self.truth.score(self.stock)
        self.scores[stock_settings(self.predictor.refiner)] = {
            'dice': dice, 'nll': nll,
            'ged': self.truth.ged([self.truth.drawn(self.stock, torch.zeros(len(self.stock)))])}

    def _measure(self, settings: Sequence[SamplingSettings]) -> None:
        for _, chains in groupby(sorted(settings, key=_start), key=_start):
            together = list(chains)
            channels, masks = len(self.stock), together[0].samples * (len(self.stock) if self.truth.regions else 1)
            side_by_side = max(1, MEMORY // (self.stock[0].numel() * (5 * channels + 12 + masks)))
            for first in range(0, len(together), side_by_side):
                self._measure_group(together[first:first + side_by_side])

    def _measure_group(self, group: Sequence[SamplingSettings]) -> None:
        """Settings with the same start, sample by sample."""
        number, regions, volume = group[0].samples, self.truth.regions is not None, self.volume
        spreads = [Spread(volume.shape, number, 1, regions, volume.device) for _ in group]
        hard: list[list[Tensor]] = [[] for _ in group]
        for sample in range(number):
            volume.forget()
            for s, spread, masks in zip(group, spreads, hard, strict=True):
                p = volume.sample(s, sample, number)
                shifts = draw_shifts(len(p), regions, sample, number, s.seed)
                spread.add(p, shifts)
                masks.append(self.truth.drawn(p[self.box], shifts))
        volume.forget()
        for s, spread, masks in zip(group, spreads, hard, strict=True):
            spread.crop(self.box[1:])
            agreement = mean_of_known([spread.pairwise_dice(c) for c in range(0 if regions else 1, volume.shape[0])])
            of_samples: Scores = {'agreement': float('nan') if agreement is None else agreement,
                                  'ged': self.truth.ged(masks)}
            if number > 1:
                of_samples['volume_errors'] = self.truth.volume_errors(masks)
            for blend in BLENDS:
                dice, nll = self.truth.score(torch.lerp(spread.mean, self.stock, blend) if blend else spread.mean)
                self.scores[replace(s, blend=blend)] = {'dice': dice, 'nll': nll, **of_samples}


def _start(settings: SamplingSettings) -> tuple[int, int]:
    return settings.t_start, settings.samples


def _row(settings: SamplingSettings, measured: Sequence[dict[SamplingSettings, Scores]]) -> Row:
    dice, nll, ged, agreement = (np.array([scores[settings].get(name, np.nan) for scores in measured])
                                 for name in ('dice', 'nll', 'ged', 'agreement'))
    errors = [scores[settings]['volume_errors'] for scores in measured if 'volume_errors' in scores[settings]]
    return Row(settings, dice, nll, ged, None if np.isnan(agreement).all() else agreement,
               np.stack(errors) if errors else None)
