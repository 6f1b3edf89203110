"""One validation case in a sweep: pre-segmented once, then drawn and scored under many sampling settings."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.inference.chunks import all_finite, in_chunks
from nnunet_pdddpm.inference.errors import NNUNET_INF_ERROR
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import SliceValues
from nnunet_pdddpm.memory import lacks_memory
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.cases import Case
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.temperature import likelihoods

logger = logging.getLogger(__name__)

Result = TypeVar('Result')

MORE_BYTES = 18
"""For each voxel and channel, than a prediction takes: logits, an estimate that is kept, and masks of many samples."""


class CaseSweep:
    """A pre-segmented validation case."""

    opened_device: torch.device | None = None

    def __init__(self, predictor: VolumePredictor, case: Case) -> None:
        self.predictor, self.case = predictor, case
        self.network_calls = {'stock': 0, 'denoiser': 0}
        on_gpu = predictor.device.type == 'cuda' and predictor.fits(case.image.shape, MORE_BYTES)
        self.device = predictor.device if on_gpu else torch.device('cpu')
        self._with_memory_fallback(lambda: None)

    def _with_memory_fallback(self, do: Callable[[], Result]) -> Result:
        """What it returns, the volume's arrays being on the device, or else in main memory."""
        try:
            with self.predictor.threads_for(self.device):
                if self.opened_device != self.device:
                    self._open()
                return do()
        except RuntimeError as error:
            if self.device.type == 'cpu' or not lacks_memory(error):
                raise
        logger.warning('The volume does not fit on the device: its arrays are kept in main memory.')
        torch.cuda.empty_cache()
        self.device = torch.device('cpu')
        return self._with_memory_fallback(do)

    def _open(self) -> None:
        image, unpad = pad_nd_image(self.case.image, self.predictor.configuration_manager.patch_size, 'constant',
                                    {'value': 0}, True, None)
        self.box = (slice(None), *unpad[1:])
        self.volume = SweepVolume(self.predictor, image, self.device)
        self.volume.network_calls = self.network_calls
        try:
            self.volume.start_fold()
            self.volume.blind_logits()
        except RuntimeError as error:
            if NNUNET_INF_ERROR not in str(error):
                raise
            raise self._no_numbers() from error
        if not (self.volume.stock_is_finite and all_finite(self.volume.blind_logits())):
            raise self._no_numbers()
        self.truth = Truth(self.case.labels, self.predictor.label_manager, self.device, self.case.raters)
        self.truth.set_parts(self.probabilities('stock'))
        self.opened_device = self.device

    def _no_numbers(self) -> TuningError:
        return TuningError(f'The networks give NaN or infinite values for {self.case.name}: look at its intensities, '
                           f'and leave it out of the validation cases in splits_final.json.')

    def bytes(self) -> int:
        """Bytes that are kept: logits of stock and blind mask, images, and the label and two parts of each voxel."""
        volume = self.volume
        return volume.stock_logits.numel() * 6 + (volume.image.numel() + self.case.image.numel()) * 4 \
            + self.case.labels.size * (6 + len(self.case.raters))

    def new_passes(self) -> float:
        """Passes of the denoiser over the volume since this was last asked."""
        calls, self.network_calls['denoiser'] = self.network_calls['denoiser'], 0
        return calls / len(self.volume.tiles)

    def logits(self, source: str) -> Tensor:
        """(C, Z, Y, X) of the 'stock' model or the 'blind' mask, without padding."""
        return (self.volume.stock_logits if source == 'stock' else self.volume.blind_logits())[self.box]

    def probabilities(self, source: str, temperature: float = 1.0) -> Tensor:
        """(C, Z, Y, X) float32."""
        logits = self.logits(source)[None].float() / temperature
        return logits_to_probabilities(logits, self.predictor.refiner.regions)[0]

    def draw(self, settings: SamplingSettings, sample: int) -> Tensor:
        """The mask, as `Truth.drawn` gives it, of a draw with this number that depends on no other."""
        settings = settings.for_case(self.case.name)
        p = self._sample_volume(settings, sample, None)
        parts = self.volume.parts(settings)
        shifts = self.predictor.refiner.end_shifts(settings, sample, None, parts.number)
        index = None if parts.index is None else parts.index[self.box[1:]]
        return self.truth.drawn(p[self.box], shifts, index)

    def _sample_volume(self, settings: SamplingSettings, sample: int, samples: int | None) -> Tensor:
        p = self.volume.sample_volume(settings, sample, samples)
        if not all_finite(p):  # a chain of half precision; a class of NaN would be counted out of bounds
            raise self._no_numbers()
        return p

    def likelihoods(self, source: str) -> np.ndarray:
        """Likelihoods of the 'stock' model or the 'blind' mask, see `temperature.likelihoods`."""
        return self._with_memory_fallback(
            lambda: likelihoods(self.logits(source), self.truth, self.predictor.refiner.regions))

    def energies(self, settings: Sequence[SamplingSettings], samples: Sequence[int]) -> list[tuple[float, float]]:
        """For each of the settings what `Truth.energy` gives its independent draws with these numbers."""
        return self._with_memory_fallback(lambda: self._energies(settings, samples))

    def _energies(self, settings: Sequence[SamplingSettings], samples: Sequence[int]) -> list[tuple[float, float]]:
        def first_pass(i: int) -> tuple[float, float]:
            # chains from one start share their first pass; all else goes one by one, since masks take memory
            chain = settings[i].samples_from == 'chain'
            return settings[i].temperature, settings[i].start if chain else 2.0 + i
        energies: dict[int, tuple[float, float]] = {}
        for _, group in groupby(sorted(range(len(settings)), key=first_pass), key=first_pass):
            masks: dict[int, list[Tensor]] = {i: [] for i in group}
            for sample in samples:
                self.volume.clear_estimate()
                for i, drawn in masks.items():
                    drawn.append(self.draw(settings[i], sample))
            self.volume.clear_estimate()
            energies.update({i: self.truth.energy(drawn) for i, drawn in masks.items()})
        return [energies[i] for i in range(len(settings))]

    def masks(self, candidates: Sequence[SamplingSettings]) -> list[tuple[float, float]]:
        """What `Truth.score` gives the mask of each candidate; all have the same samples, drawn as in prediction."""
        return self._with_memory_fallback(lambda: self._masks(candidates))

    def _masks(self, candidates: Sequence[SamplingSettings]) -> list[tuple[float, float]]:
        settings = candidates[0].for_case(self.case.name)
        chain = torch.zeros_like(self.probabilities('stock'))
        for sample in range(settings.samples):
            chain += self._sample_volume(settings, sample, settings.samples)[self.box] / settings.samples
            self.volume.clear_estimate()
        stock = self.probabilities('stock', settings.temperature)
        blind = self.probabilities('blind', settings.blind_temperature)
        return [self.truth.score(self.probabilities('stock') if s.is_stock else
                                 s.mask_stock * stock + s.mask_blind * blind + s.mask_chain * chain)
                for s in candidates]


class SweepVolume(Volume):
    """A volume whose first estimate after `clear_estimate` is kept: chains from the same noisy mask begin with it."""

    kept: tuple[Tensor, float, Sequence[tuple[int, ...]], Tensor] | None = None

    def clear_estimate(self) -> None:
        """Another start level or sample is to come."""
        self.kept = None

    def denoise(self, x: Tensor, level: float, mirrored: Sequence[tuple[int, ...]]) -> Iterator[SliceValues]:
        """As `Volume.denoise`, but not computed twice from the same mask."""
        if self.kept is None:
            noisy, estimate = x.clone(), torch.empty_like(x)
            for z, values in super().denoise(x, level, mirrored):
                estimate[:, z] = values
            self.kept = (noisy, level, mirrored, estimate)
        elif not (level == self.kept[1] and mirrored == self.kept[2] and torch.equal(x, self.kept[0])):
            return super().denoise(x, level, mirrored)
        return in_chunks(self.kept[3])
