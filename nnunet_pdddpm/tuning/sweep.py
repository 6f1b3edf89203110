"""What many sampling settings give on the validation cases of a fold: Dice, likelihood, diversity."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor
from tqdm import tqdm

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.diffusion.drawing import draw_shifts, drawn_logits
from nnunet_pdddpm.diffusion.schedule import t_at_snr
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.summary import estimated_dice
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.refiner import MASK, SAMPLES, Refiner, stored_settings
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.budget import FEWEST_CASES, Cost, plan
from nnunet_pdddpm.tuning.cases import Case, ValidationCases
from nnunet_pdddpm.tuning.choice import Row, TuningError
from nnunet_pdddpm.tuning.scores import Truth

SIGNAL_TO_NOISE = (1.0, 0.25, 0.06, 0.016, 0.004)
"""Of the start levels: t = 497, 703, 846, 920 and 960 of the cosine schedule with -1/+1 masks."""
STEPS = (1, 2, 3, 5, 10)
MOST_STEPS_OF_MASK = 3
"""More were not better for the mask in any measurement, and every call of plain prediction costs mirrorings times."""
ETAS = (0.0, 1.0)
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
    varied = [(steps, eta) for steps in STEPS for eta in ETAS if steps <= most and (eta == 0 or steps > 1)]
    chains = [replace(stored, t_start=level, steps=steps, samples=number, eta=eta, blend=0.0).check(t_max)
              for steps, eta in varied for level in levels if steps <= level]
    direct = replace(stored, t_start=t_max, steps=0, samples=1, eta=0.0, blend=0.0)
    return [direct, *chains] if prefix == MASK and refiner.design.parameterisation == 'x0' else chains


class SweepVolume(Volume):
    """A volume whose first estimate after `forget` is kept: chains from the same noisy mask begin with it."""

    kept: tuple[Tensor, int, Sequence[tuple[int, ...]], Tensor] | None = None

    def forget(self) -> None:
        """Another start level or sample is to come."""
        self.kept = None

    def denoise(self, x: Tensor, t: int, mirrored: Sequence[tuple[int, ...]]) -> Tensor:
        """As `Volume.denoise`, but not computed twice from the same mask."""
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


Scores = dict[str, float]
"""Of one setting on one case: dice, nll, agreement, ged."""


def sweep(predictor: VolumePredictor, cases: ValidationCases, seconds: float | None = None,
          clock: Callable[[], float] = time.perf_counter, progress: bool = False) -> Sweep:
    """Measure all candidates on all cases, or what of them fits into the time.

    Args:
        predictor: with one model.
        cases: of its fold.
        seconds: time budget, None for none.
        clock: seconds, of which differences count.
        progress: whether to show a bar.

    Raises:
        TuningError: if the time is too short for single steps on FEWEST_CASES.
    """
    start = clock()
    mirrored = predictor.use_mirroring and bool(predictor.allowed_mirroring_axes)
    for_mask, for_samples = (candidates(predictor.refiner, prefix, mirrored) for prefix in (MASK, SAMPLES))
    everything = list(dict.fromkeys([*for_mask, *for_samples]))
    settings, order = everything, list(range(len(cases.names)))
    measured: list[dict[SamplingSettings, Scores]] = []
    bar = tqdm(desc='Tuning, cases', disable=not progress)
    with torch.inference_mode():
        while len(measured) < len(order):
            if seconds is not None and len(measured) >= FEWEST_CASES and clock() - start > seconds:
                order = order[:len(measured)]
                break
            before = clock()
            case = CaseSweep(predictor, cases.load(cases.names[order[len(measured)]]))
            if seconds is not None and not measured:
                voxels = [cases.voxels(name) for name in cases.names]
                settings, order = _plan(case, everything, voxels, clock() - before, seconds, clock)
            case.measure(settings)
            measured.append(case.scores)
            bar.total = len(order)
            bar.update()
    bar.close()
    stock = stock_settings(predictor.refiner)
    blended = [replace(s, blend=blend) for s in for_mask if s in settings for blend in BLENDS]
    return Sweep([cases.names[i] for i in order], {s: _row(s, measured) for s in measured[0]}, [stock, *blended],
                 [s for s in for_samples if s in settings], [s for s in everything if s not in settings],
                 [name for i, name in enumerate(cases.names) if i not in order], clock() - start)


def stock_settings(refiner: Refiner) -> SamplingSettings:
    """The stock model itself, as settings for the mask."""
    stored = stored_settings(dict(refiner.named_buffers(recurse=False)), MASK)
    return replace(stored, t_start=0, steps=1, samples=1, eta=0.0, blend=0.0)


def _plan(first: CaseSweep, everything: list[SamplingSettings], voxels: list[int], presegmentation: float,
          seconds: float, clock: Callable[[], float]) -> tuple[list[SamplingSettings], list[int]]:
    """Measure the cheapest setting on the first case, for what it costs, and see what fits into the time."""
    before = clock()
    first.measure(everything[:1])
    mirrorings = len(first.volume.mirrorings)
    passes = max(everything[0].samples, mirrorings)
    cost = Cost(presegmentation / voxels[0], (clock() - before) / passes / voxels[0], mirrorings)
    settings, order = plan(everything, voxels, cost, seconds)
    if not settings:
        raise TuningError(f'{seconds / 60:.1f} minutes are too short to tune the sampling settings: single steps on '
                          f'{min(FEWEST_CASES, len(voxels))} cases take longer.')
    return settings, order


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
        self.scores[stock_settings(self.predictor.refiner)] = {'dice': dice, 'nll': nll}

    def _measure(self, settings: Sequence[SamplingSettings]) -> None:
        for _, chains in groupby(sorted(settings, key=_start), key=_start):
            together = list(chains)
            channels, hard = len(self.stock), 2 * together[0].samples if self.truth.raters else 0
            side_by_side = max(1, MEMORY // (self.stock[0].numel() * (5 * channels + 12 + channels * hard)))
            for first in range(0, len(together), side_by_side):
                self._measure_group(together[first:first + side_by_side])

    def _measure_group(self, group: Sequence[SamplingSettings]) -> None:
        """Settings with the same start, sample by sample."""
        number, regions, volume = group[0].samples, self.truth.regions is not None, self.volume
        spreads = [Spread(volume.shape, number, 1, regions, volume.device) for _ in group]
        hard: list[list[np.ndarray]] = [[] for _ in group]
        for sample in range(number):
            volume.forget()
            for s, spread, masks in zip(group, spreads, hard, strict=True):
                p = volume.sample(s, sample, number)
                shifts = draw_shifts(len(p), regions, sample, number, s.seed)
                spread.add(p, shifts)
                if self.truth.raters:
                    drawn = logits_to_probabilities(drawn_logits(p[self.box], regions, shifts)[None], regions)[0]
                    masks.append(self.truth.harden(drawn).to(torch.int16).cpu().numpy())
        volume.forget()
        for s, spread, masks in zip(group, spreads, hard, strict=True):
            spread.crop(self.box[1:])
            agreement = estimated_dice([spread.pairwise_dice(c) for c in range(0 if regions else 1, volume.shape[0])])
            of_samples = {'agreement': float('nan') if agreement is None else agreement, 'ged': self.truth.ged(masks)}
            for blend in BLENDS:
                dice, nll = self.truth.score(torch.lerp(spread.mean, self.stock, blend) if blend else spread.mean)
                self.scores[replace(s, blend=blend)] = {'dice': dice, 'nll': nll, **of_samples}


def _start(settings: SamplingSettings) -> tuple[int, int]:
    return settings.t_start, settings.samples


def _row(settings: SamplingSettings, measured: Sequence[dict[SamplingSettings, Scores]]) -> Row:
    def values(name: str) -> np.ndarray | None:
        found = np.array([scores[settings].get(name, np.nan) for scores in measured])
        return None if np.isnan(found).all() and name in ('agreement', 'ged') else found
    dice, nll = values('dice'), values('nll')
    assert dice is not None and nll is not None
    return Row(settings, dice, nll, values('agreement'), values('ged'))
