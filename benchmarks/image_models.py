"""Ways to draw masks of 2D images: the rows of `rows.toml`, and the trained networks that draw them."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import tomllib
import torch
from datasets.images import Image, ImageSet
from datasets.phantom import CONFIRMATION, SMALLEST
from image_scores import energy_of_parts
from nnunet import NUM_FOLDS
from statistics_of_trainings import file_name
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from nnunet_pdddpm.diffusion.drawing import drawn_mask
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.network.state import stored_settings
from nnunet_pdddpm.tuning.sweep import DEPENDENCES
from nnunet_pdddpm.tuning.temperature import GRID, fit_temperature

DRAWS = 16
"""Of which the mean probability of chains and of the SSN is; the first of them are the samples."""
TIMED = 3
"""Images, by each row."""
BLIND = ('second', 'second_mirrored', 'blind')
"""Maps of a denoiser that is shown no mask."""


@dataclass(frozen=True)
class Row:
    """One way to draw masks: see `rows.toml`."""
    title: str
    map: str | None = None
    network: str = 'denoiser'
    temperature: bool = True
    dependence: float | str = 1.0
    start: float = 0.6
    steps: int = 1
    start_mask: str = 'drawn'
    redraw: int = 1
    one_size: bool = False
    confirmed: bool = False
    plotted: bool = True
    base: str | None = None

    def is_measured_on(self, tests: str) -> bool:
        """A set of test images, by its name."""
        return self.confirmed if tests == CONFIRMATION else not self.one_size or tests == SMALLEST

    @property
    def calls(self) -> str:
        """Of a network beside the stock model, for a sample."""
        if self.map is not None:
            return {'stock': '0', 'ensemble': str(NUM_FOLDS), 'second_mirrored': '4'}.get(self.map, '1')
        return {'tuned': '', 'ssn': '1', 'paper': '300'}.get(self.network, str(self.steps))

    @property
    def name(self) -> str:
        """In the names of files."""
        return file_name(self.title)


def rows(images: ImageSet) -> tuple[list[Row], str]:
    """All of them, and the title of the row that the others are compared with."""
    found = tomllib.loads((Path(__file__).parent / 'rows.toml').read_text())[images.kind]
    return [Row(**row) for row in found['rows']], found['base']


def plotted(of: Sequence[Row]) -> dict[str, str | None]:
    """Title -> that of its base if it is another than the table's, of the rows that the forest plot has."""
    return {row.title: row.base for row in of if row.plotted}


def rows_to_measure(images: ImageSet, work: Path, fold: int) -> list[Row]:
    """Without that of the tuned settings while a training is not tuned."""
    tuned = images.dataset.sweep(work, fold).is_file()
    return [row for row in rows(images)[0] if tuned or row.network != 'tuned']


def seconds_file(work: Path, tests: str) -> Path:
    """Row -> seconds of all samples of an image."""
    return work / 'measured' / f'{tests}__seconds.json'


class Models:
    """The networks of one training, and what is fitted on its validation images."""

    def __init__(self, image_set: ImageSet, work: Path, fold: int, validation: Sequence[Image]) -> None:
        self.image_set, self.work, self.fold, self.validation = image_set, work, fold, validation
        self._weights = cache(lambda network, fold: image_set.dataset.weights(work, network, fold))
        self.predictor, self.temperature = cache(self._open), cache(self._fit_temperature)
        self.dependence, self.temperature_of_ssn = cache(self._fit_dependence), cache(self._fit_temperature_of_ssn)
        self._maps: dict[tuple[str, bytes], Tensor] = {}

    def _open(self, network: str) -> VolumePredictor:
        """`tuned`: with the mirroring and tiles that the denoiser was tuned with."""
        tuned, named = network == 'tuned', {'tuned': 'denoiser', 'second_mirrored': 'second'}
        predictor = self.image_set.dataset.open(self.work, named.get(network, network), [self.fold], VolumePredictor,
                                                use_mirroring=network in named)
        predictor.refiner.load_state_dict(predictor.list_of_parameters[0])
        if self.image_set.whole and not tuned:
            shapes = [image.pixels.shape for image in self.validation]
            predictor.configuration_manager.configuration['patch_size'] = np.max(shapes, 0).tolist()
        return predictor

    def opened(self, image: Image, network: str = 'denoiser') -> Volume:
        """An image as nnU-Net preprocesses it (z-scores), pre-segmented."""
        pixels = image.pixels.astype(np.float32)
        predictor = self.predictor(network)
        volume = Volume(predictor, torch.from_numpy(((pixels - pixels.mean()) / pixels.std())[None, None]),
                        torch.device('cpu'))
        volume.start_fold()
        return volume

    def forget_maps(self) -> None:
        """Maps are kept; when they have to be made again, that takes its time."""
        self._maps.clear()

    def map(self, name: str, image: Image) -> Tensor:
        """Logits (C, 1, Y, X), padded, of an image."""
        key = name, image.pixels.tobytes()
        if key not in self._maps:
            self._maps[key] = self._map(name, image)
        return self._maps[key]

    def _map(self, name: str, image: Image) -> Tensor:
        if name in BLIND:
            return self.opened(image, 'denoiser' if name == 'blind' else name).blind_logits().float()
        predictor = self.predictor('denoiser')
        own, probabilities = predictor.list_of_parameters[0], []
        for fold in range(NUM_FOLDS) if name == 'ensemble' else [self.fold]:
            weights = self._weights('stock' if name == 'stock' else 'longer', fold)
            predictor.refiner.presegmenter.load_state_dict(weights)
            probabilities.append(self.opened(image).stock_logits.float().softmax(0))
        predictor.refiner.load_state_dict(own)
        return torch.stack(probabilities).mean(0).clamp(1e-12).log()

    def _fit_temperature(self, name: str) -> float:
        """That of one control for their ensemble, of which two networks have seen the validation images."""
        of_images = []
        for image in self.validation:
            z = self.map('longer' if name == 'ensemble' else name, image)
            z, share = inner(z[1, 0] - z[0, 0], image), torch.from_numpy(image.masks.mean(0)).float()
            of_images.append(np.array([float(binary_cross_entropy_with_logits(z / t, share)) for t in GRID]))
        return fit_temperature(of_images)

    def expected(self, image: Image) -> np.ndarray:
        """Stock probabilities (Y, X) under their temperature."""
        return inner((self.map('stock', image) / self.temperature('stock')).softmax(0)[1, 0].numpy(), image)

    def settings(self, row: Row) -> SamplingSettings:
        """Fitted as the row says."""
        if row.network in ('tuned', 'paper'):
            return stored_settings(self.predictor(row.network).list_of_parameters[0])
        temperature = self.temperature(row.map or 'stock') if row.temperature else 1.0
        dependence = self.dependence(row) if row.dependence == 'fitted' else float(row.dependence)
        return SamplingSettings(samples_from='chain' if row.map is None else 'stock', temperature=temperature,
                                blind_temperature=self.temperature('blind'), dependence=dependence, start=row.start,
                                steps=row.steps, start_mask=row.start_mask, redraw=row.redraw)

    def _fit_dependence(self, row: Row) -> float:
        """That with the lowest energy score of the parts' areas; for the ensemble as with the temperature."""
        row = replace(row, map='longer' if row.map == 'ensemble' else row.map)
        settings = self.settings(replace(row, dependence=1.0))

        def energy(dependence: float) -> float:
            drawn = [self.draw(image, row, replace(settings, dependence=dependence), self.image_set.samples)[0]
                     for image in self.validation]
            return float(np.mean([energy_of_parts(image, masks, self.expected(image))
                                  for image, masks in zip(self.validation, drawn, strict=True)]))
        return min(DEPENDENCES, key=energy)

    def samples(self, image: Image, row: Row, settings: SamplingSettings, draws: int = DRAWS
                ) -> tuple[np.ndarray, np.ndarray]:
        """Independent masks (n, Y, X) bool, and their mean probability (Y, X): exact where they are of a map, else the
        mean of so many draws."""
        exact = row.map is not None or row.network != 'ssn' and settings.samples_from != 'chain'
        number = self.image_set.samples
        masks, mean = self.draw(image, row, settings, number if exact else max(number, draws))
        return masks[:number], mean

    def draw(self, image: Image, row: Row, settings: SamplingSettings, number: int) -> tuple[np.ndarray, np.ndarray]:
        """So many."""
        if row.network == 'ssn':
            logits = self._logits_of_ssn(image, number) / (self.temperature_of_ssn() if row.temperature else 1.0)
            return (inner((logits[:, 1] > logits[:, 0]).numpy(), image),
                    inner(logits.softmax(1)[:, 1].mean(0).double().numpy(), image))
        volume = self.opened(image, row.network)
        if row.map is not None:
            volume.stock_logits = volume._start_logits = self.map(row.map, image)
        masks, mean = drawn(volume, settings.for_case(image.name), number)
        return inner(masks, image), inner(mean, image)

    def _logits_of_ssn(self, image: Image, number: int) -> Tensor:
        padded = self.opened(image).image[None, :, 0]
        self.ssn.train()  # it then gives all that the distribution is made of
        torch.manual_seed(int.from_bytes(hashlib.blake2s(image.name.encode(), digest_size=4).digest(), 'big'))
        return self.ssn.distribution(self.ssn(padded)).sample((number,)).float().reshape(number, 2, *padded.shape[2:])

    def _fit_temperature_of_ssn(self) -> float:
        of_images = []
        for image in self.validation:
            logits, share = self._logits_of_ssn(image, DRAWS), torch.from_numpy(image.masks.mean(0)).float()
            means = (inner((logits / t).softmax(1)[:, 1].mean(0), image).clamp(1e-6, 1 - 1e-6) for t in GRID)
            of_images.append(np.array([float(binary_cross_entropy(mean, share)) for mean in means]))
        return fit_temperature(of_images)

    @cached_property
    def ssn(self) -> torch.nn.Module:
        """Stochastic segmentation network."""
        from ssn import StochasticSegmentationTraining
        predictor = self.predictor('denoiser')
        network = StochasticSegmentationTraining.build_network_architecture(
            predictor.plans_manager, predictor.configuration_manager, 1, 2, False)
        network.load_state_dict(self._weights('ssn', self.fold))
        return network


@torch.inference_mode()
def drawn(volume: Volume, settings: SamplingSettings, number: int) -> tuple[np.ndarray, np.ndarray]:
    """So many masks (n, Y, X) bool, independent of each other, and their mean probability (Y, X)."""
    refiner, masks, mean = volume.refiner, [], 0
    for sample in range(number):
        p = volume.sample_volume(settings, sample, None)
        parts = volume.parts(settings)
        shifts = refiner.end_shifts(settings, sample, None, parts.number)
        masks.append(drawn_mask(p[:, 0], refiner.regions, shifts, parts.at(0))[1].numpy() > 0)
        mean = mean + p[1, 0].double().numpy() / number
    return np.stack(masks), mean


def inner(values: Tensor | np.ndarray, like: Image) -> Tensor | np.ndarray:
    """Without the padding (nnU-Net's: the smaller half before) of an image: the last two axes."""
    y, x = ((n - of) // 2 for n, of in zip(values.shape[-2:], like.pixels.shape, strict=True))
    return values[..., y:y + like.pixels.shape[0], x:x + like.pixels.shape[1]]
