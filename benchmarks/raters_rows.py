"""Rows of `raters.py`: ways to draw masks of an image, and what they are worth against the raters' masks."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from torch.nn.functional import binary_cross_entropy_with_logits

from nnunet_pdddpm.evaluation.calibration import reliability
from nnunet_pdddpm.evaluation.overlap import dice_of_iou, iou_matrix
from nnunet_pdddpm.evaluation.parts import components
from nnunet_pdddpm.evaluation.parts import measure as figures
from nnunet_pdddpm.evaluation.raters import fair_ged_squared, hungarian_matched_iou
from nnunet_pdddpm.evaluation.scores import fair_crps, fair_energy_score
from nnunet_pdddpm.evaluation.voxelwise import SMALLEST_PROBABILITY
from nnunet_pdddpm.inference import volume as volume_module
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.inference.volume_sampling import Field, volume_noise
from nnunet_pdddpm.network.refiner import stored_settings
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.sweep import DEPENDENCES
from nnunet_pdddpm.tuning.temperature import GRID, fit_temperature

MAPS = {'stock': 'stock', 'longer': 'stock trained longer', 'ensemble': 'stock, ensemble of the 3 trainings',
        'second': 'second network, cross-entropy alone', 'blind': 'PDDDPM, blind mask'}
SAMPLES = 8  # an image
CHAINS = ((0.6, 1), (0.8, 2), (1.0, 2), (1.0, 5))
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
    for of in ('longer', 'second'):
        yield Row(f'{MAPS[of]}, one temperature, copula of objects', 1, of, fitted_dependence=True)
    yield Row('SSN, rank 10', 1)
    for start, steps in CHAINS:
        for fitted in (False, True) if start < 1 else (False,):
            yield Row(f'PDDDPM, start {start:g}, {steps} step{"s" * (steps > 1)}'
                      + (', copula of objects' if fitted else ''), steps,
                      change=lambda s, u=start, k=steps: replace(s, samples_from='chain', start=u, steps=k),
                      fitted_dependence=fitted)
    for start, steps in CHAINS if shared_noise else ():
        yield Row(f'PDDDPM, noise in part shared, start {start:g}, {steps} step{"s" * (steps > 1)}', steps,
                  change=lambda s, u=start, k=steps: replace(s, samples_from='chain', start=u, steps=k),
                  shared_noise=True)
    yield Row('PDDDPM as tuned', 0)


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
        self.temperature = {name: self._fit_temperature(name) for name in MAPS}

    def folder(self, trainer: str) -> Path:
        """Of a trained model."""
        return fold_folder(self.work, trainer, 0, self.of.dataset, CONFIGURATION).parent

    def _open(self, trainer: str) -> VolumePredictor:
        """For images in one tile, whatever the patches of training were."""
        predictor = open_model(self.folder(trainer), self.fold)
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
            return opened_image(self.second if name == 'second' else self.predictor, pixels).blind().float()
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

    def opened(self, image: Image, row: Row) -> Volume:
        """The image, with a map in the place of the stock model's if the row has one."""
        volume = opened_image(self.shared if row.shared_noise else self.predictor, image[1])
        if row.of_map is not None:
            volume.stock_logits = volume._start_logits = self.map(row.of_map, image)
        return volume

    def settings(self, row: Row) -> SamplingSettings:
        """Fitted as the row says."""
        if row.title == 'PDDDPM as tuned':
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
            return float(np.mean([scores(image, *self.samples(image, row, changed))['energy']
                                  for image in self.validation]))
        return min(DEPENDENCES, key=energy)

    def samples(self, image: Image, row: Row, settings: SamplingSettings, number: int = SAMPLES
                ) -> tuple[np.ndarray, np.ndarray]:
        """Independent masks (n, Y, X) bool, and their mean probability (Y, X)."""
        if row.title.startswith('SSN'):
            return self._of_ssn(image, number)
        with patch.object(volume_module, 'volume_noise', _shared_noise) if row.shared_noise else nullcontext():
            masks, mean = draw(self.opened(image, row), settings.for_case(image[0]), True, number)
        return inner(masks, image[1]), inner(mean, image[1])

    def _of_ssn(self, image: Image, number: int) -> tuple[np.ndarray, np.ndarray]:
        network = self._ssn()
        padded = opened_image(self.predictor, image[1]).image[None, :, 0]
        torch.manual_seed(self.fold)
        network.train()
        logits = network.distribution(network(padded)).sample((number,)).reshape(number, 2, *padded.shape[2:])
        return (inner((logits[:, 1] > logits[:, 0]).numpy(), image[1]),
                inner(logits.softmax(1)[:, 1].mean(0).double().numpy(), image[1]))

    def _ssn(self) -> torch.nn.Module:
        from rater_trainers import nnUNetTrainerRatersSSN
        predictor: VolumePredictor = self.predictor
        network = nnUNetTrainerRatersSSN.build_network_architecture(
            predictor.plans_manager, predictor.configuration_manager, 1, 2, False)
        network.load_state_dict(self._weights(SSN, [self.fold])[0])
        return network


def _shared_noise(shape: Sequence[int], seed: int, sample: int, *arguments: Any) -> Callable[[], Field]:
    """As `volume_noise` of one slice, with the noise of that trainer."""
    from rater_trainers import shared_noise
    start = volume_noise(shape, seed, sample, *arguments)
    generator = torch.Generator().manual_seed(seed + 7919 * sample)

    def field() -> Field:
        white = start()
        return lambda count: shared_noise(white(count).movedim(1, 0), generator).movedim(0, 1)
    return field


def inner(values: Tensor | np.ndarray, like: np.ndarray) -> Tensor | np.ndarray:
    """Without the padding (nnU-Net's: the smaller half before) of an image (Y, X): the last two axes."""
    y, x = ((n - of) // 2 for n, of in zip(values.shape[-2:], like.shape, strict=True))
    return values[..., y:y + like.shape[0], x:x + like.shape[1]]


def scores(image: Image, masks: np.ndarray, mean: np.ndarray) -> dict[str, object]:
    """Of independent samples (n, Y, X) and their mean probability, against the raters' masks.

    Returns:
        `ged` (fair), `hm_iou`; `nll`, `ece`, `dice` to the majority and `f1` of objects at IoU 0.5 of the mean;
        `crps` of the area and `components` of the number of objects, over the raters' means; `energy` of the areas in
        quadrants of the raters' union, over their mean area; these areas of samples and raters in pixels.
    """
    raters, share = image[2], image[2].mean(0)
    p = np.clip(mean, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    cross = iou_matrix(masks, raters)
    of_samples, of_raters = figures(masks, raters, (1.0, 1.0), 1.0)
    area, objects = max(of_raters.volume.mean(), 1), max(of_raters.components.mean(), 1)
    majority, mask = share > 0.5, mean > 0.5
    confidence = np.where(mask, mean, 1 - mean).ravel()
    ece = np.mean([reliability(confidence, (mask == rater).ravel()).expected_calibration_error for rater in raters])
    return {'ged': fair_ged_squared(cross, iou_matrix(masks, masks), iou_matrix(raters, raters)),
            'hm_iou': hungarian_matched_iou(cross),
            'nll': float(-(share * np.log(p) + (1 - share) * np.log(1 - p)).mean()),
            'ece': float(ece), 'dice': float(dice_of_iou(iou_matrix(mask[None], majority[None]))[0, 0]),
            'f1': object_f1(majority, mask), 'crps': fair_crps(of_samples.volume / area, of_raters.volume / area),
            'components': fair_crps(of_samples.components / objects, of_raters.components / objects),
            'energy': fair_energy_score(of_samples.octants / area, of_raters.octants / area),
            'areas': (of_samples.octants / area).tolist(), 'areas_of_raters': (of_raters.octants / area).tolist()}


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
                found = [scores(image, *models.samples(image, row, settings)) for image in images]
                file_of(row).write_text(json.dumps({'settings': str(settings), 'scores': found}))
