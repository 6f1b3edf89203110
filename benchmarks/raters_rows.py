"""Rows of `raters.py`: ways to draw masks of an image, and what they are worth against the raters' masks."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from operator import add
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hippocampus import fold_folder
from phantom_samplers import draw, open_model, opened_image
from raters import (
    CONFIGURATION,
    DENOISER,
    LONGER,
    NUM_FOLDS,
    SECOND,
    SHARED,
    SSN,
    STOCK,
    RaterSet,
    read_image,
    read_raters,
    split,
)
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from nnunet_pdddpm.evaluation.calibration import reliability
from nnunet_pdddpm.evaluation.overlap import dice_of_iou, iou_matrix
from nnunet_pdddpm.evaluation.parts import components, octants, volumes_of_parts
from nnunet_pdddpm.evaluation.raters import fair_ged_squared, hungarian_matched_iou
from nnunet_pdddpm.evaluation.scores import fair_crps, fair_energy_score
from nnunet_pdddpm.evaluation.voxelwise import SMALLEST_PROBABILITY
from nnunet_pdddpm.inference import volume as volume_module
from nnunet_pdddpm.inference.components import POSSIBLE
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import NoiseField, volume_noise
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.network.state import stored_settings
from nnunet_pdddpm.tuning.sweep import DEPENDENCES
from nnunet_pdddpm.tuning.temperature import GRID, fit_temperature

MAPS = {'stock': 'stock', 'longer': 'stock trained longer', 'ensemble': 'stock, ensemble of the 3 trainings',
        'second': 'second network, cross-entropy alone', 'blind': 'PDDDPM, blind mask'}
SAMPLES, FOR_MEAN = 8, 16
"""Of an image: independent samples, and draws of which the mean probability of chains and SSN is."""
CHAINS = ((0.6, 1), (0.8, 2), (1.0, 2), (1.0, 5))
AS_TUNED = 'PDDDPM as tuned, with mirroring'
Image = tuple[str, np.ndarray, np.ndarray]
"""Name, pixels (Y, X), raters' masks (m, Y, X) bool."""


@dataclass(frozen=True)
class Row:
    """One way to draw masks."""
    title: str
    calls: int
    """Of a network beside the stock model, for a sample."""
    of_map: str | None = None
    """A probability map of which thresholds are drawn; None: the denoiser's chain, or the SSN."""
    tempered: bool = True
    change: Callable[[SamplingSettings], SamplingSettings] = lambda settings: settings
    fitted_dependence: bool = False
    """Whether objects are drawn by a copula whose shared part is fitted on the validation images."""
    shared_noise: bool = False
    """Whether it is the model of `PDDDPMTrainerRatersSharedNoise`."""

    @property
    def name(self) -> str:
        """In the names of files."""
        return ''.join(c if c.isalnum() else '_' for c in self.title)


def rows(shared_noise: bool = False) -> Iterator[Row]:
    """Of the table; with those of noise that is shared over the image, or without."""
    for of, title in MAPS.items():
        calls = int(of in ('longer', 'second', 'blind'))
        yield Row(f'{title}, thresholds', calls, of, tempered=False)
        yield Row(f'{title}, one temperature, thresholds', calls, of)
    for of, title in MAPS.items():
        yield Row(f'{title}, one temperature, copula of objects', int(of in ('longer', 'second', 'blind')), of,
                  fitted_dependence=True)
    yield Row('SSN, rank 10', 1, tempered=False)
    yield Row('SSN, rank 10, one temperature', 1)
    for start, steps in CHAINS:
        for fitted in (False, True):
            yield Row(f'PDDDPM, start {start:g}, {steps} step{"s" * (steps > 1)}'
                      + (', copula of objects' if fitted else ''), steps,
                      change=lambda s, u=start, k=steps: replace(s, samples_from='chain', start=u, steps=k),
                      fitted_dependence=fitted)
    for start, steps in CHAINS if shared_noise else ():
        yield Row(f'PDDDPM, noise in part shared, start {start:g}, {steps} step{"s" * (steps > 1)}', steps,
                  change=lambda s, u=start, k=steps: replace(s, samples_from='chain', start=u, steps=k),
                  shared_noise=True)
    yield Row(AS_TUNED, 0)


def images_of(of: RaterSet, data: Path, names: Sequence[str]) -> list[Image]:
    """Read."""
    return [(name, read_image(of, data, name), np.stack(list(read_raters(of, data, name).values()))) for name in names]


class Models:
    """The networks of one training, and what is fitted on its validation images."""

    def __init__(self, of: RaterSet, work: Path, fold: int, validation: Sequence[Image]) -> None:
        self.of, self.work, self.fold, self.validation = of, work, fold, validation
        self.predictor, self.second = (self._open(trainer) for trainer in (DENOISER, SECOND))
        self.shared = self._open(SHARED) if of.label == 'nucleus' else None
        self.stock = {name: self._weights(trainer, folds) for name, trainer, folds in (
            ('stock', STOCK, [fold]), ('longer', LONGER, [fold]), ('ensemble', STOCK, range(NUM_FOLDS)))}
        self._maps: dict[tuple[str, str], Tensor] = {}
        self._dependence: dict[str, float] = {}
        self.temperature = {name: self._fit_temperature(name) for name in MAPS if name != 'ensemble'}
        self.temperature['ensemble'] = self.temperature['stock']  # two of its networks have seen these images
        self.tuned = self._open(DENOISER, as_tuned=True)

    def folder(self, trainer: str) -> Path:
        """Of a trained model."""
        return fold_folder(self.work, trainer, 0, self.of.dataset, CONFIGURATION).parent

    def _open(self, trainer: str, as_tuned: bool = False) -> VolumePredictor:
        """For images in one tile, whatever the patches of training were; or with the tiles and the mirroring that the
        model was tuned with."""
        predictor = open_model(self.folder(trainer), self.fold, mirroring=as_tuned)
        if as_tuned:
            return predictor
        shapes = [image[1].shape for image in self.validation]
        predictor.configuration_manager.configuration['patch_size'] = [max(of) for of in zip(*shapes, strict=True)]
        return predictor

    def _weights(self, trainer: str, folds: Sequence[int]) -> list[dict[str, Tensor]]:
        return [torch.load(self.folder(trainer) / f'fold_{fold}' / 'checkpoint_final.pth', map_location='cpu',
                           weights_only=False)['network_weights'] for fold in folds]

    def map(self, name: str, image: Image) -> Tensor:
        """Logits (C, 1, Y, X), padded, of an image."""
        key = name, image[0]
        if key not in self._maps:
            self._maps[key] = self._map(name, image[1])
        return self._maps[key]

    def _map(self, name: str, pixels: np.ndarray) -> Tensor:
        if name in ('second', 'blind'):
            return opened_image(self.second if name == 'second' else self.predictor, pixels).blind_logits().float()
        own, probabilities = self.predictor.list_of_parameters[0], []
        for weights in self.stock[name]:
            self.predictor.refiner.presegmenter.load_state_dict(weights)
            probabilities.append(opened_image(self.predictor, pixels).stock_logits.float().softmax(0))
        self.predictor.refiner.load_state_dict(own)
        return torch.stack(probabilities).mean(0).clamp(1e-12).log()

    def _fit_temperature(self, name: str) -> float:
        of_images = []
        for image in self.validation:
            z = self.map(name, image)
            z = inner(z[1, 0] - z[0, 0], image[1])
            share = torch.from_numpy(image[2].mean(0)).float()
            of_images.append(np.array([float(binary_cross_entropy_with_logits(z / t, share)) for t in GRID]))
        return fit_temperature(of_images)

    def expected(self, image: Image) -> np.ndarray:
        """Stock probabilities (Y, X) under their temperature."""
        return inner((self.map('stock', image) / self.temperature['stock']).softmax(0)[1, 0].numpy(), image[1])

    def opened(self, image: Image, row: Row) -> Volume:
        """The image, with a map in the place of the stock model's if the row has one."""
        volume = opened_image(self.tuned if row.title == AS_TUNED else self.shared if row.shared_noise
                              else self.predictor, image[1])
        if row.of_map is not None:
            volume.stock_logits = volume._start_logits = self.map(row.of_map, image)
        return volume

    def settings(self, row: Row) -> SamplingSettings:
        """Fitted as the row says."""
        if row.title == AS_TUNED:
            return stored_settings(self.predictor.list_of_parameters[0])
        temperature = self.temperature[row.of_map or 'stock'] if row.tempered else 1.0
        settings = row.change(SamplingSettings(
            samples_from='stock', temperature=temperature, blind_temperature=self.temperature['blind'], dependence=1.0))
        if row.fitted_dependence:
            if row.name not in self._dependence:
                self._dependence[row.name] = self._fit_dependence(row, settings)
            settings = replace(settings, dependence=self._dependence[row.name])
        return settings

    def _fit_dependence(self, row: Row, settings: SamplingSettings) -> float:
        """That with the lowest energy score of the parts' areas."""
        def energy(dependence: float) -> float:
            changed = replace(settings, dependence=dependence)
            return float(np.mean([scores(image, *self.samples(image, row, changed), self.expected(image))['energy']
                                  for image in self.validation]))
        return min(DEPENDENCES, key=energy)

    def samples(self, image: Image, row: Row, settings: SamplingSettings, number: int = SAMPLES
                ) -> tuple[np.ndarray, np.ndarray]:
        """Independent masks (n, Y, X) bool, and their mean probability (Y, X)."""
        if row.title.startswith('SSN'):
            return self._of_ssn(image, self._temperature_of_ssn() if row.tempered else 1.0, number)
        with patch.object(volume_module, 'volume_noise', _shared_noise) if row.shared_noise else nullcontext():
            masks, mean = draw(self.opened(image, row), settings.for_case(image[0]), True, number)
        return inner(masks, image[1]), inner(mean, image[1])

    def mean_probability(self, image: Image, row: Row, settings: SamplingSettings, mean: np.ndarray) -> np.ndarray:
        """(Y, X) of many draws; `mean`: of the samples, which is exact where they are drawn from a map."""
        of_map = row.of_map is not None or settings.samples_from != 'chain'
        return mean if of_map and not row.title.startswith('SSN') else self.samples(image, row, settings, FOR_MEAN)[1]

    def _of_ssn(self, image: Image, temperature: float, number: int) -> tuple[np.ndarray, np.ndarray]:
        logits = self._logits_of_ssn(image, number) / temperature
        return (inner((logits[:, 1] > logits[:, 0]).numpy(), image[1]),
                inner(logits.softmax(1)[:, 1].mean(0).double().numpy(), image[1]))

    def _logits_of_ssn(self, image: Image, number: int) -> Tensor:
        padded = opened_image(self.predictor, image[1]).image[None, :, 0]
        torch.manual_seed(int.from_bytes(hashlib.blake2s(image[0].encode(), digest_size=4).digest(), 'big'))
        self.ssn.train()  # it then gives all that the distribution is made of
        return self.ssn.distribution(self.ssn(padded)).sample((number,)).reshape(number, 2, *padded.shape[2:])

    @lru_cache(maxsize=1)  # noqa: B019 - one object a training
    def _temperature_of_ssn(self) -> float:
        of_images = []
        for image in self.validation:
            logits, share = self._logits_of_ssn(image, FOR_MEAN), torch.from_numpy(image[2].mean(0)).float()
            means = (inner((logits / t).softmax(1)[:, 1].mean(0), image[1]).clamp(1e-6, 1 - 1e-6) for t in GRID)
            of_images.append(np.array([float(binary_cross_entropy(mean, share)) for mean in means]))
        return fit_temperature(of_images)

    @cached_property
    def ssn(self) -> torch.nn.Module:
        """Stochastic segmentation network."""
        from rater_trainers import nnUNetTrainerRatersSSN
        predictor: VolumePredictor = self.predictor
        network = nnUNetTrainerRatersSSN.build_network_architecture(
            predictor.plans_manager, predictor.configuration_manager, 1, 2, False)
        network.load_state_dict(self._weights(SSN, [self.fold])[0])
        return network


def _shared_noise(shape: Sequence[int], seed: int, sample: int, *arguments: Any) -> Callable[[], NoiseField]:
    """As `volume_noise` of one slice, with the noise of that trainer."""
    from rater_trainers import shared_noise
    start = volume_noise(shape, seed, sample, *arguments)
    generator = torch.Generator().manual_seed(seed + 7919 * sample)

    def field() -> NoiseField:
        white = start()
        return lambda count: shared_noise(white(count).movedim(1, 0), generator).movedim(0, 1)
    return field


def inner(values: Tensor | np.ndarray, like: np.ndarray) -> Tensor | np.ndarray:
    """Without the padding (nnU-Net's: the smaller half before) of an image (Y, X): the last two axes."""
    y, x = ((n - of) // 2 for n, of in zip(values.shape[-2:], like.shape, strict=True))
    return values[..., y:y + like.shape[0], x:x + like.shape[1]]


def scores(image: Image, masks: np.ndarray, mean: np.ndarray, expected: np.ndarray) -> dict[str, object]:
    """Of independent samples (n, Y, X) and a mean probability (Y, X), against the raters' masks.

    Args:
        expected: (Y, X) probabilities of the stock model under its temperature. Quadrants are those of the box in which
            it expects anything, and areas are relative to what it expects: neither may depend on the raters, or the
            scores would not be proper.

    Returns:
        `ged` (fair), `hm_iou`; `nll`, `ece`, `dice` to the majority and `f1` of objects at IoU 0.5 of the mean;
        `crps` of the area, `components` of the number of objects, `energy` of the areas in quadrants; these areas of
        samples and raters.
    """
    raters, share = image[2], image[2].mean(0)
    p = np.clip(mean, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    cross = iou_matrix(masks, raters)
    index, number = octants(expected > POSSIBLE)
    areas, of_raters = (np.stack([volumes_of_parts(mask, index, number) for mask in of]) / (1 + expected.sum())
                        for of in (masks, raters))
    objects, objects_of_raters = (np.array([components(mask)[1] for mask in of], float) for of in (masks, raters))
    majority, mask = share > 0.5, mean > 0.5
    confidence = np.where(mask, mean, 1 - mean).ravel()
    pooled = reduce(add, (reliability(confidence, (mask == rater).ravel()) for rater in raters))
    return {'ged': fair_ged_squared(cross, iou_matrix(masks, masks), iou_matrix(raters, raters)),
            'hm_iou': hungarian_matched_iou(cross),
            'nll': float(-(share * np.log(p) + (1 - share) * np.log(1 - p)).mean()),
            'ece': pooled.expected_calibration_error,
            'dice': float(dice_of_iou(iou_matrix(mask[None], majority[None]))[0, 0]),
            'f1': object_f1(majority, mask), 'crps': fair_crps(areas.sum(1), of_raters.sum(1)),
            'components': fair_crps(objects, objects_of_raters), 'energy': fair_energy_score(areas, of_raters),
            'areas': areas.tolist(), 'areas_of_raters': of_raters.tolist()}


def object_f1(reference: np.ndarray, mask: np.ndarray) -> float:
    """F1 of connected components that match with an IoU above 0.5, which pairs each with one other at most."""
    (one, number), (other, of_mask) = components(reference), components(mask)
    if number + of_mask == 0:
        return 1.0
    pairs = np.histogram2d(one.ravel(), other.ravel(), (np.arange(number + 2), np.arange(of_mask + 2)))[0]
    union = pairs.sum(1, keepdims=True) + pairs.sum(0, keepdims=True) - pairs
    return float(2 * np.count_nonzero((pairs / union)[1:, 1:] > 0.5) / (number + of_mask))


@torch.inference_mode()
def measure(of: RaterSet, work: Path, data: Path, folds: Sequence[int] = range(NUM_FOLDS)) -> None:
    """Scores of every row, training and test image, as `measured/SET__ROW__FOLD.json`; what is there is left alone."""
    torch.set_num_threads(1)
    results = work / 'measured'
    results.mkdir(exist_ok=True)
    test, validation = split(of, data)
    for fold in folds:
        def file_of(row: Row, fold: int = fold) -> Path:
            return results / f'{of.label}__{row.name}__{fold}.json'
        every = list(rows(of.label == 'nucleus'))
        if all(file_of(row).is_file() for row in every):
            continue
        models, images = Models(of, work, fold, images_of(of, data, validation[fold])), images_of(of, data, test)
        for row in every:
            if not file_of(row).is_file():
                settings = models.settings(row)
                print(row.title, 'fold', fold, settings, flush=True)
                found = []
                for image in images:
                    masks, mean = models.samples(image, row, settings)
                    mean = models.mean_probability(image, row, settings, mean)
                    found.append(scores(image, masks, mean, models.expected(image)))
                file_of(row).write_text(json.dumps({'settings': str(settings), 'scores': found}))
