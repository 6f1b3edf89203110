"""Sampling settings tried on the validation cases of a fold, the best ones on more samples than the others."""
from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm import tqdm

from nnunet_pdddpm.inference.volume_memory import free_bytes
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import mirrorings
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.network.state import stored_settings
from nnunet_pdddpm.tuning.budget import MIN_TUNING_CASES, cases_within_budget
from nnunet_pdddpm.tuning.case_sweep import CaseSweep
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.choice import MaskRow, SampleRow, best_samples, choose_samples, mean
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.temperature import fit_temperature

STARTS = (1.0, 0.8, 0.6, 0.4)
FIRST_STEPS, MORE_STEPS = (1, 2), (3, 5)
DRAWS = 4
"""Samples of a case by which settings are compared; the last ones are drawn as many more times."""
FINALISTS = 2
"""Chains that are drawn again."""
DEPENDENCES, CHAIN_DEPENDENCES = (1.0, 0.75, 0.5, 0.25, 0.0), (1.0, 0.0)
"""Of draws without a chain; and those that the best chain is drawn with as well."""
BLENDS = (0.25, 0.5, 0.75)
CACHE_BYTES, CACHE_SHARE = 4 * 2 ** 30, 0.25
"""Bytes of pre-segmentations that are kept between the rounds, at most this share of a GPU's free memory; those of
further cases are made again."""
ROUNDS = 7
"""Temperatures, draws without a chain, starts, three steps, other dependences, the last settings, masks: so often a
case is opened that is not kept."""


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
    images: list[int] | None = None
    """Of each case, the same for cases of one image."""


def num_shared_passes(settings: Sequence[SamplingSettings]) -> int:
    """Passes that one draw of each of these chains takes: the first one is shared by those from the same start."""
    starts = {s.start for s in settings}
    return len(starts) + sum(s.steps - 1 for s in settings)


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
        TuningError: if the time is too short for MIN_TUNING_CASES.
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
        self.images: dict[int, int] = {}  # checksums: people's masks of one image are cases that are not independent
        self.kept: dict[int, CaseSweep] = {}
        self.cache_bytes = CACHE_BYTES if predictor.device.type != 'cuda' else \
            min(CACHE_BYTES, int(CACHE_SHARE * free_bytes(predictor.device)))
        self.passes = 0.0
        self.seconds_a_pass = self.seconds_to_open = 0.0  # of all cases; known with a budget
        self.steps_left_out: list[int] = []
        self.bar = tqdm(desc='Tuning, cases', total=0, disable=not progress)

    def run(self) -> Sweep:
        """Run all rounds."""
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
        more = self._try_more_steps(first)
        # what is best for thresholds need not be for a chain, whose noise decides for the objects one by one
        best = best_samples([*first, *more])[0].settings
        more += self._compare([replace(best, dependence=dependence) for dependence in CHAIN_DEPENDENCES
                               if dependence != best.dependence])
        last = self._draw_more([best_without, *best_samples([*first, *more], FINALISTS)])
        images = [self.images[i] for i in self.order]
        chosen = choose_samples(last, images).settings
        masks = self._masks(chosen)
        self.bar.close()
        rest = [name for i, name in enumerate(self.cases.names) if i not in self.order]
        return Sweep([self.cases.names[i] for i in self.order], masks, last, [*without, *first, *more], temperature,
                     blind_temperature, rest, self.passes / len(self.order), self.clock() - self.start, chosen,
                     self.steps_left_out, images)

    def _open_cases(self) -> Iterator[CaseSweep]:
        """The cases; as many stay pre-segmented as there is memory for."""
        self.bar.total += len(self.order)
        for i in self.order:
            case = self.kept.get(i) or self._open_case(i)
            yield case
            self.passes += case.new_passes()
            if i not in self.kept and sum(c.bytes() for c in self.kept.values()) + case.bytes() <= self.cache_bytes:
                self.kept[i] = case
            self.bar.update()

    def _open_case(self, i: int) -> CaseSweep:
        case = self.cases.load(self.cases.names[i])
        self.images[i] = zlib.crc32(case.image.numpy().tobytes())
        return CaseSweep(self.predictor, case)

    def _seconds_left(self) -> float:
        """Seconds; infinite without a budget."""
        return self.seconds - (self.clock() - self.start)

    def _choose_cases(self) -> None:
        """See on the first case what a pass costs, and which cases there is time for with up to three steps."""
        voxels = [self.cases.voxels(name) for name in self.cases.names]
        chain = [SamplingSettings(start=1.0)]
        first_calls = self._open_case(0)  # not timed: a GPU's libraries choose their algorithms at the first call
        first_calls.energies(chain, [0])
        self.passes += first_calls.new_passes()
        del first_calls
        before = self.clock()
        case = self._open_case(0)
        opening = self.clock() - before
        case.energies(chain, [0])  # with a stock pass: it stands for what thresholds and masks take
        a_pass = self.clock() - before - opening
        left = self._seconds_left()
        if case.bytes() <= self.cache_bytes:
            self.kept[0] = case
            left += opening  # which is done
        else:
            self.passes += case.new_passes()
        chains = [SamplingSettings(start=start, steps=steps) for start in STARTS for steps in FIRST_STEPS]
        passes = DRAWS * num_shared_passes(chains) + self._passes_left(max(FIRST_STEPS) + 1, FINALISTS)
        once = opening + a_pass * passes
        self.order = cases_within_budget(left, once / voxels[0], voxels)
        all_kept = case.bytes() / voxels[0] * sum(voxels[i] for i in self.order) <= self.cache_bytes
        if not all_kept:
            self.order = cases_within_budget(left, (once + (ROUNDS - 1) * opening) / voxels[0], voxels)
        if not self.order:
            raise TuningError(f'{self.seconds / 60:.1f} minutes are too short to tune the sampling settings: '
                              f'{min(MIN_TUNING_CASES, len(voxels))} cases take longer. Run nnUNetv2_pdddpm_tune '
                              f'without -budget, or with more.')
        times = sum(voxels[i] for i in self.order) / voxels[0]
        self.seconds_a_pass, self.seconds_to_open = a_pass * times, 0.0 if all_kept else opening * times

    def _passes_left(self, steps: int, starts: int) -> int:
        """Passes over a case for chains of `steps` steps: from these starts, with other dependences, drawn again, and
        as the mask."""
        compared = DRAWS * (starts + len(CHAIN_DEPENDENCES) + FINALISTS)
        return steps * (compared + max(self.stored.samples, len(self._mirrorings)))

    @property
    def _mirrorings(self) -> list[tuple[int, ...]]:
        return mirrorings(self.predictor.allowed_mirroring_axes if self.predictor.use_mirroring else None)

    def _fit_temperatures(self) -> tuple[float, float]:
        curves = [[case.likelihoods(source) for source in ('stock', 'blind')] for case in self._open_cases()]
        stock, blind = zip(*curves, strict=True)
        return fit_temperature(stock), fit_temperature(blind)

    def _compare(self, settings: Sequence[SamplingSettings], first: int = 0) -> list[SampleRow]:
        """Rows of settings, by DRAWS independent draws with numbers from `first` on."""
        settings = list(dict.fromkeys(settings))
        values = np.array([case.energies(settings, range(first, first + DRAWS)) for case in self._open_cases()])
        return [SampleRow(s, values[:, i, 0], values[:, i, 1]) for i, s in enumerate(settings)]

    def _try_more_steps(self, first: list[SampleRow]) -> list[SampleRow]:
        """More steps from the two best starts as long as they are better than fewer; the last from the best one
        alone."""
        best = {start: best_samples([row for row in first if row.settings.start == start])[0] for start in STARTS}
        starts = [row.settings.start for row in best_samples(list(best.values()), FINALISTS)]
        starts = [start for start in starts if best[start].settings.steps == max(FIRST_STEPS)]
        more: list[SampleRow] = []
        for i, steps in enumerate(MORE_STEPS):
            # this round, other dependences, the last one and the masks
            seconds = self.seconds_a_pass * self._passes_left(steps, len(starts)) + 4 * self.seconds_to_open
            if starts and seconds > self._seconds_left():
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
        candidates = mask_candidates(chosen, len(self._mirrorings))
        values = np.array([case.masks(candidates) for case in self._open_cases()])
        return [MaskRow(s, values[:, i, 0], values[:, i, 1]) for i, s in enumerate(candidates)]


def mask_candidates(chosen: SamplingSettings, num_mirrorings: int) -> list[SamplingSettings]:
    """Stock first, then the blind mask, the mean of the chosen samples, and blends of two of them.

    Plain `nnUNetv2_predict` takes the mean over the mirrorings: there the mean takes as many samples fewer.
    """
    masks = [replace(chosen, mask_stock=stock, mask_blind=1 - stock) for stock in (1.0, 0.0, *BLENDS)]
    if chosen.samples_from == 'chain':
        number = math.ceil(chosen.samples / num_mirrorings)
        pairs = [(0.0, 0.0), *((stock, 0.0) for stock in BLENDS), *((0.0, blind) for blind in BLENDS)]
        masks += [replace(chosen, mask_stock=stock, mask_blind=blind, mask_samples=number) for stock, blind in pairs]
    return masks
