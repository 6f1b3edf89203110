"""Sampling settings tried on the validation cases of a fold, the best ones on more samples than the others."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor
from tqdm import tqdm

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.inference.chunks import in_chunks
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import Finished, mirrorings
from nnunet_pdddpm.network.refiner import stored_settings
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.budget import FEWEST_CASES, cases_in
from nnunet_pdddpm.tuning.cases import Case, ValidationCases
from nnunet_pdddpm.tuning.choice import MaskRow, SampleRow, TuningError, best_samples, choose_samples, mean
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.temperature import fit_temperature, likelihoods

STARTS = (1.0, 0.8, 0.6, 0.4)
FIRST_STEPS, MORE_STEPS = (1, 2), (3, 5)
DRAWS = 4
"""Samples of a case by which settings are compared; the last ones are drawn as many more times."""
LAST = 2
"""Chains that are drawn again."""
DEPENDENCES, ENDS = (1.0, 0.75, 0.5, 0.25, 0.0), (1.0, 0.0)
"""Of draws without a chain; and those that the best chain is drawn with as well."""
BLENDS = (0.25, 0.5, 0.75)
MEMORY = 4 * 2 ** 30
"""Bytes of pre-segmentations that are kept between the rounds; those of further cases are made anew."""
ROUNDS = 7
"""Temperatures, draws without a chain, starts, three steps, other dependences, the last settings, masks: so often a
case is opened that is not kept."""

T = TypeVar('T')


@dataclass
class Sweep:
    """What was measured."""
    cases: list[str]
    masks: list[MaskRow]
    samples: list[SampleRow]
    """Those that were measured to the end, one of them without a chain."""
    first_rounds: list[SampleRow]
    """All that was tried, on fewer samples."""
    temperature: float
    blind_temperature: float
    cases_left_out: list[str]
    passes: float
    """Of the denoiser over a case, mean."""
    seconds: float
    chosen_samples: SamplingSettings = field(default_factory=SamplingSettings)
    steps_left_out: list[int] = field(default_factory=list)
    """Numbers of steps for which there was no time."""


def sharing_starts(settings: Sequence[SamplingSettings]) -> int:
    """Passes that one draw of each of these chains takes: the first one is shared by those from the same start."""
    starts = {s.start for s in settings}
    return len(starts) + sum(s.steps - 1 for s in settings)


class _CaseSweep:
    """A pre-segmented validation case."""

    opened_on: torch.device | None = None

    def __init__(self, predictor: VolumePredictor, case: Case) -> None:
        self.predictor, self.case = predictor, case
        self.network_calls = {'stock': 0, 'denoiser': 0}
        on_gpu = predictor.device.type == 'cuda' and predictor.fits(case.image.shape)
        self.device = predictor.device if on_gpu else torch.device('cpu')
        self._where_there_is_memory(lambda: None)

    def _where_there_is_memory(self, do: Callable[[], T]) -> T:
        """What it returns, the volume's arrays being on the device, or else in main memory."""
        try:
            with self.predictor.threads_for(self.device):
                if self.opened_on != self.device:
                    self._open()
                return do()
        except torch.OutOfMemoryError:
            if self.device.type == 'cpu':
                raise
        print('The volume does not fit on the device: its arrays are kept in main memory.')
        torch.cuda.empty_cache()
        self.device = torch.device('cpu')
        return self._where_there_is_memory(do)

    def _open(self) -> None:
        image, unpad = pad_nd_image(self.case.image, self.predictor.configuration_manager.patch_size, 'constant',
                                    {'value': 0}, True, None)
        self.box = (slice(None), *unpad[1:])
        self.volume = SweepVolume(self.predictor, image, self.device)
        self.volume.network_calls = self.network_calls
        self.volume.start_fold()
        self.volume.blind()
        self.truth = Truth(self.case.labels, self.predictor.label_manager, self.device, self.case.raters)
        self.truth.set_parts(self.probabilities('stock'))
        self.opened_on = self.device

    def bytes(self) -> int:
        """That are kept: logits of stock and blind mask, images, and of each voxel its label, and two parts."""
        volume = self.volume
        return volume.stock_logits.numel() * 6 + (volume.image.numel() + self.case.image.numel()) * 4 \
            + self.case.labels.size * (6 + len(self.case.raters))

    def new_passes(self) -> float:
        """Passes of the denoiser over the volume since this was last asked."""
        calls, self.network_calls['denoiser'] = self.network_calls['denoiser'], 0
        return calls / len(self.volume.all_tiles)

    def logits(self, of: str) -> Tensor:
        """(C, Z, Y, X) of the 'stock' model or the 'blind' mask, without padding."""
        return (self.volume.stock_logits if of == 'stock' else self.volume.blind())[self.box]

    def probabilities(self, of: str, temperature: float = 1.0) -> Tensor:
        """(C, Z, Y, X) float32."""
        return logits_to_probabilities(self.logits(of)[None].float() / temperature, self.predictor.refiner.regions)[0]

    def draw(self, settings: SamplingSettings, sample: int) -> Tensor:
        """The mask, as `Truth.drawn` gives it, of a draw with this number that depends on no other."""
        settings = settings.for_case(self.case.name)
        p = self.volume.whole_sample(settings, sample, None)
        parts = self.volume.parts(settings)
        shifts = self.predictor.refiner.end_shifts(settings, sample, None, parts.number)
        index = None if parts.index is None else parts.index[self.box[1:]]
        return self.truth.drawn(p[self.box], shifts, index)

    def likelihoods(self, of: str) -> np.ndarray:
        """Of the 'stock' model or the 'blind' mask, see `temperature.likelihoods`."""
        return self._where_there_is_memory(
            lambda: likelihoods(self.logits(of), self.truth, self.predictor.refiner.regions))

    def energies(self, settings: Sequence[SamplingSettings], samples: Sequence[int]) -> list[tuple[float, float]]:
        """For each of the settings what `Truth.energy` gives its independent draws with these numbers."""
        return self._where_there_is_memory(lambda: self._energies(settings, samples))

    def _energies(self, settings: Sequence[SamplingSettings], samples: Sequence[int]) -> list[tuple[float, float]]:
        def together(i: int) -> tuple[float, float]:
            # chains from one start share their first pass; all else goes one by one, since masks take memory
            chain = settings[i].samples_from == 'chain'
            return settings[i].temperature, settings[i].start if chain else 2.0 + i
        energies: dict[int, tuple[float, float]] = {}
        for _, group in groupby(sorted(range(len(settings)), key=together), key=together):
            masks: dict[int, list[Tensor]] = {i: [] for i in group}
            for sample in samples:
                self.volume.forget()
                for i, of in masks.items():
                    of.append(self.draw(settings[i], sample))
            self.volume.forget()
            energies.update({i: self.truth.energy(of) for i, of in masks.items()})
        return [energies[i] for i in range(len(settings))]

    def masks(self, candidates: Sequence[SamplingSettings]) -> list[tuple[float, float]]:
        """What `Truth.score` gives the mask of each candidate; all have the same samples, drawn as in prediction."""
        return self._where_there_is_memory(lambda: self._masks(candidates))

    def _masks(self, candidates: Sequence[SamplingSettings]) -> list[tuple[float, float]]:
        settings = candidates[0].for_case(self.case.name)
        chain = torch.zeros_like(self.probabilities('stock'))
        for sample in range(settings.samples):
            chain += self.volume.whole_sample(settings, sample, settings.samples)[self.box] / settings.samples
            self.volume.forget()
        stock = self.probabilities('stock', settings.temperature)
        blind = self.probabilities('blind', settings.blind_temperature)
        return [self.truth.score(self.probabilities('stock') if s.is_stock else
                                 s.mask_stock * stock + s.mask_blind * blind + s.mask_chain * chain)
                for s in candidates]


class SweepVolume(Volume):
    """A volume whose first estimate after `forget` is kept: chains from the same noisy mask begin with it."""

    kept: tuple[Tensor, float, Sequence[tuple[int, ...]], Tensor] | None = None

    def forget(self) -> None:
        """Another start level or sample is to come."""
        self.kept = None

    def denoise(self, x: Tensor, level: float, mirrored: Sequence[tuple[int, ...]]) -> Iterator[Finished]:
        """As `Volume.denoise`, but not computed twice from the same mask."""
        if self.kept is None:
            noisy, estimate = x.clone(), torch.empty_like(x)
            for z, values in super().denoise(x, level, mirrored):
                estimate[:, z] = values
            self.kept = (noisy, level, mirrored, estimate)
        elif not (level == self.kept[1] and mirrored == self.kept[2] and torch.equal(x, self.kept[0])):
            return super().denoise(x, level, mirrored)
        return in_chunks(self.kept[3])


def sweep(predictor: VolumePredictor, cases: ValidationCases, seconds: float | None = None,
          clock: Callable[[], float] = time.perf_counter, progress: bool = False) -> Sweep:
    """Fit temperatures and the dependence of draws, compare chains with draws without one, then masks.

    Args:
        predictor: with one model.
        cases: of its fold.
        seconds: time budget, None for none. With one, as many cases are measured as there is time for, and five steps
            only where time is left.
        clock: seconds, of which differences count.
        progress: whether to show a bar.

    Raises:
        TuningError: if the time is too short for FEWEST_CASES.
    """
    with torch.inference_mode():
        return _Run(predictor, cases, seconds, clock, progress).run()


class _Run:
    """The rounds of a sweep."""

    def __init__(self, predictor: VolumePredictor, cases: ValidationCases, seconds: float | None,
                 clock: Callable[[], float], progress: bool) -> None:
        self.predictor, self.cases, self.clock = predictor, cases, clock
        self.seconds = math.inf if seconds is None else seconds
        self.stored = stored_settings(dict(predictor.refiner.named_buffers(recurse=False)))
        self.start = clock()
        self.order = list(range(len(cases.names)))
        self.kept: dict[int, _CaseSweep] = {}
        self.passes = 0.0
        self.seconds_a_pass = self.seconds_to_open = 0.0  # of all cases; known with a budget
        self.steps_left_out: list[int] = []
        self.bar = tqdm(desc='Tuning, cases', total=0, disable=not progress)

    def run(self) -> Sweep:
        """All rounds."""
        if self.seconds < math.inf:
            self._choose_cases()
        temperature, blind_temperature = self._fit_temperatures()
        # what else is stored may come of a tuning before, and this one is to find the same
        base = SamplingSettings(samples=self.stored.samples, seed=self.stored.seed, temperature=temperature,
                                blind_temperature=blind_temperature)
        thresholds = [replace(base, samples_from='stock', temperature=1.0), replace(base, samples_from='stock'),
                      replace(base, samples_from='blind')]
        without = self._compare([replace(s, dependence=dependence) for s in thresholds for dependence in DEPENDENCES])
        best_without = best_samples(without)[0]
        chain = replace(base, dependence=best_without.settings.dependence)
        first = self._compare([replace(chain, start=start, steps=steps) for start in STARTS for steps in FIRST_STEPS])
        more = self._climb(first)
        # what is best for thresholds need not be for a chain, whose noise decides for the objects one by one
        best = best_samples([*first, *more])[0].settings
        more += self._compare([replace(best, dependence=of) for of in ENDS if of != best.dependence])
        last = self._draw_more([best_without, *best_samples([*first, *more], LAST)])
        chosen = choose_samples(last).settings
        masks = self._masks(chosen)
        self.bar.close()
        rest = [name for i, name in enumerate(self.cases.names) if i not in self.order]
        return Sweep([self.cases.names[i] for i in self.order], masks, last, [*without, *first, *more], temperature,
                     blind_temperature, rest, self.passes / len(self.order), self.clock() - self.start, chosen,
                     self.steps_left_out)

    def _each(self) -> Iterator[_CaseSweep]:
        """The cases; as many stay pre-segmented as there is memory for."""
        self.bar.total += len(self.order)
        for i in self.order:
            case = self.kept.get(i) or self._opened(i)
            yield case
            self.passes += case.new_passes()
            if i not in self.kept and sum(c.bytes() for c in self.kept.values()) + case.bytes() <= MEMORY:
                self.kept[i] = case
            self.bar.update()

    def _opened(self, i: int) -> _CaseSweep:
        return _CaseSweep(self.predictor, self.cases.load(self.cases.names[i]))

    def _left(self) -> float:
        """Seconds; infinite without a budget."""
        return self.seconds - (self.clock() - self.start)

    def _choose_cases(self) -> None:
        """See on the first case what a pass costs, and which cases there is time for with up to three steps."""
        voxels = [self.cases.voxels(name) for name in self.cases.names]
        before = self.clock()
        case = self._opened(0)
        opening = self.clock() - before
        case.energies([SamplingSettings(start=1.0)], [0])
        a_pass = self.clock() - before - opening
        left = self._left()
        if case.bytes() <= MEMORY:
            self.kept[0] = case
            left += opening  # which is done
        else:
            self.passes += case.new_passes()
        chains = [SamplingSettings(start=start, steps=steps) for start in STARTS for steps in FIRST_STEPS]
        once = opening + a_pass * (DRAWS * sharing_starts(chains) + self._passes_from(max(FIRST_STEPS) + 1, LAST))
        self.order = cases_in(left, once / voxels[0], voxels)
        all_kept = case.bytes() / voxels[0] * sum(voxels[i] for i in self.order) <= MEMORY
        if not all_kept:
            self.order = cases_in(left, (once + (ROUNDS - 1) * opening) / voxels[0], voxels)
        if not self.order:
            raise TuningError(f'{self.seconds / 60:.1f} minutes are too short to tune the sampling settings: '
                              f'{min(FEWEST_CASES, len(voxels))} cases take longer.')
        times = sum(voxels[i] for i in self.order) / voxels[0]
        self.seconds_a_pass, self.seconds_to_open = a_pass * times, 0.0 if all_kept else opening * times

    def _passes_from(self, steps: int, starts: int) -> int:
        """Passes over a case that chains with so many steps cost: from these starts, with other dependences, drawn
        again, and as the mask."""
        return steps * (DRAWS * (starts + len(ENDS) + LAST) + max(self.stored.samples, len(self._mirrorings)))

    @property
    def _mirrorings(self) -> list[tuple[int, ...]]:
        return mirrorings(self.predictor.allowed_mirroring_axes if self.predictor.use_mirroring else None)

    def _fit_temperatures(self) -> tuple[float, float]:
        of_cases = [[case.likelihoods(of) for of in ('stock', 'blind')] for case in self._each()]
        stock, blind = zip(*of_cases, strict=True)
        return fit_temperature(stock), fit_temperature(blind)

    def _compare(self, settings: Sequence[SamplingSettings], first: int = 0) -> list[SampleRow]:
        """Rows of settings, by DRAWS independent draws with numbers from `first` on."""
        settings = list(dict.fromkeys(settings))
        values = np.array([case.energies(settings, range(first, first + DRAWS)) for case in self._each()])
        return [SampleRow(s, values[:, i, 0], values[:, i, 1]) for i, s in enumerate(settings)]

    def _climb(self, first: list[SampleRow]) -> list[SampleRow]:
        """More steps from the two best starts as long as they are better than fewer; the last from the best one
        alone."""
        best = {start: best_samples([row for row in first if row.settings.start == start])[0] for start in STARTS}
        starts = [row.settings.start for row in best_samples(list(best.values()), LAST)]
        starts = [start for start in starts if best[start].settings.steps == max(FIRST_STEPS)]
        more: list[SampleRow] = []
        for i, steps in enumerate(MORE_STEPS):
            # this round, other dependences, the last one and the masks
            seconds = self.seconds_a_pass * self._passes_from(steps, len(starts)) + 4 * self.seconds_to_open
            if starts and seconds > self._left():
                self.steps_left_out = list(MORE_STEPS[i:])
                break
            rows = self._compare([replace(best[start].settings, steps=steps) for start in starts]) if starts else []
            more += rows
            better = [row for row in rows if mean(row.energy) < mean(best[row.settings.start].energy)]
            best.update({row.settings.start: row for row in better})
            starts = [row.settings.start for row in best_samples(better)]
        return more

    def _draw_more(self, rows: Sequence[SampleRow]) -> list[SampleRow]:
        """The rows by as many further draws, too."""
        further = self._compare([row.settings for row in rows], DRAWS)
        return [SampleRow(one.settings, (one.energy + other.energy) / 2, (one.ged + other.ged) / 2)
                for one, other in zip(rows, further, strict=True)]

    def _masks(self, chosen: SamplingSettings) -> list[MaskRow]:
        candidates = masks_to_try(chosen, len(self._mirrorings))
        values = np.array([case.masks(candidates) for case in self._each()])
        return [MaskRow(s, values[:, i, 0], values[:, i, 1]) for i, s in enumerate(candidates)]


def masks_to_try(chosen: SamplingSettings, num_mirrorings: int) -> list[SamplingSettings]:
    """Stock first, then the blind mask, the mean of the chosen samples, and blends of two of them.

    Plain `nnUNetv2_predict` draws its samples anew under every mirroring: there the mean takes as many fewer.
    """
    masks = [replace(chosen, mask_stock=stock, mask_blind=1 - stock) for stock in (1.0, 0.0, *BLENDS)]
    if chosen.samples_from == 'chain':
        number = math.ceil(chosen.samples / num_mirrorings)
        pairs = [(0.0, 0.0), *((stock, 0.0) for stock in BLENDS), *((0.0, blind) for blind in BLENDS)]
        masks += [replace(chosen, mask_stock=stock, mask_blind=blind, mask_samples=number) for stock, blind in pairs]
    return masks
