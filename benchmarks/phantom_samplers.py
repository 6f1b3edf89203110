"""Samplers of a trained model on the phantom, and what their samples are worth against the exact distribution."""
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from phantom_data import SHAPES, Phantom

from nnunet_pdddpm.diffusion.drawing import drawn_mask
from nnunet_pdddpm.evaluation.overlap import dice_of_iou, iou_matrix
from nnunet_pdddpm.evaluation.scores import fair_crps
from nnunet_pdddpm.evaluation.voxelwise import SMALLEST_PROBABILITY
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.temperature import GRID, fit_temperature

SAMPLES = 16
CLEAN = 0.85
"""IoU with the nearest of its three shapes from which an object of a sample counts as one of them. Rim and lobe
together have 0.78 with the nearest."""
DRAWS = 400
"""Of the truth, for the CRPS of the total."""
Change = Callable[[SamplingSettings], SamplingSettings]


@dataclass(frozen=True)
class Row:
    """One way to draw masks."""
    title: str
    trainer: str
    change: Change
    """Of settings in which the temperatures are fitted."""
    calls: int
    """Of the denoiser, for a sample."""
    large: bool = True
    """Whether it is also measured on images of more than two objects, which take many tiles."""


def open_model(folder: Path, fold: int, mirroring: bool = False) -> VolumePredictor:
    """Of one training."""
    predictor = VolumePredictor(device=torch.device('cpu'), allow_tqdm=False, use_mirroring=mirroring)
    predictor.initialize_from_trained_model_folder(str(folder), (fold,))
    predictor.refiner.load_state_dict(predictor.list_of_parameters[0])
    return predictor


def opened(predictor: VolumePredictor, case: Phantom) -> Volume:
    """Its image, pre-segmented."""
    return opened_image(predictor, case.image)


def opened_image(predictor: VolumePredictor, image: np.ndarray) -> Volume:
    """An image (Y, X) as nnU-Net preprocesses it (z-scores), pre-segmented."""
    image = image.astype(np.float32)
    image = (image - image.mean()) / image.std()
    volume = Volume(predictor, torch.from_numpy(image[None, None]), torch.device('cpu'))
    volume.start_fold()
    return volume


@torch.inference_mode()
def temperatures(predictor: VolumePredictor, cases: list[Phantom]) -> SamplingSettings:
    """Settings with the temperatures fitted on cases."""
    of: dict[str, list[np.ndarray]] = {'stock': [], 'blind': []}
    for case in cases:
        volume, truth = opened(predictor, case), torch.from_numpy(case.truth.astype(np.float32))
        for name, logits in (('stock', volume.stock_logits), ('blind', volume.blind_logits())):
            z = (logits[1, 0] - logits[0, 0]).float()
            of[name].append(np.array([float(torch.nn.functional.binary_cross_entropy_with_logits(z / t, truth))
                                      for t in GRID]))
    return SamplingSettings(temperature=fit_temperature(of['stock']), blind_temperature=fit_temperature(of['blind']))


@torch.inference_mode()
def draw(volume: Volume, settings: SamplingSettings, independent: bool = False, number: int = SAMPLES
         ) -> tuple[np.ndarray, np.ndarray]:
    """So many masks (n, Y, X) bool, and their mean probability (Y, X).

    `independent`: of each other; else they are a stratified set, as in the product.
    """
    refiner, masks, mean, of = volume.refiner, [], 0, None if independent else number
    for sample in range(number):
        p = volume.sample_volume(settings, sample, of)
        parts = volume.parts(settings)
        shifts = refiner.end_shifts(settings, sample, of, parts.number)
        masks.append(drawn_mask(p[:, 0], refiner.regions, shifts, parts.at(0))[1].numpy() > 0)
        mean = mean + p[1, 0].double().numpy() / number
    return np.stack(masks), mean


def scores(case: Phantom, masks: np.ndarray, mean: np.ndarray, seed: int) -> dict[str, float]:
    """Samples (n, Y, X) and their mean probability against the exact distribution of the truth.

    Returns:
        `nll` and `dice` of the mean; `clean`: share of the objects in the samples that are one of the three shapes;
        `frequency_error`: half of the summed differences between the frequencies of the shapes and their probabilities;
        `ged`: GED² with pairs of a mask with itself, for two objects; `crps`: of the total area, over its mean;
        `variance`, `true_variance`: of the total over its mean; `variance_objects`, `covariance`: of "more than the
        core", for the correlation of objects.
    """
    share = np.zeros(case.image.shape)
    for one in case.objects:
        share += np.einsum('k,kyx->yx', one.probabilities, one.masks)
    p = np.clip(mean, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    rng = np.random.default_rng(seed)
    nearest, clean, frequency = zip(*(_shapes(one, masks) for one in case.objects), strict=True)
    attached = np.array(nearest) > 0
    covariance = np.cov(attached, bias=True)
    off = ~np.eye(len(covariance), dtype=bool)
    areas = [one.masks.sum((1, 2)) for one in case.objects]
    truths = sum(a[rng.choice(len(SHAPES), DRAWS, p=one.probabilities)]
                 for a, one in zip(areas, case.objects, strict=True))
    expected = sum(one.probabilities @ a for a, one in zip(areas, case.objects, strict=True))
    exact = sum(one.probabilities @ a ** 2 - (one.probabilities @ a) ** 2
                for a, one in zip(areas, case.objects, strict=True))
    totals = masks.sum((1, 2))
    of = {'nll': float(-(share * np.log(p) + (1 - share) * np.log(1 - p)).mean()),
          'dice': _expected_dice(case, mean > 0.5, rng),
          'clean': float(np.mean(clean)), 'frequency_error': float(np.mean(frequency)),
          'crps': fair_crps(totals / expected, truths / expected),
          'variance': float(totals.var(ddof=1) / expected ** 2), 'true_variance': float(exact / expected ** 2),
          'variance_objects': float(np.diag(covariance).mean()), 'covariance': float(covariance[off].mean())}
    return {**of, 'ged': ged(case, masks)} if len(case.objects) == 2 else of


def ged(case: Phantom, masks: np.ndarray) -> float:
    """GED² to the exact distribution of two objects, pairs of a mask with itself included."""
    possible, weights = case.distribution()
    of_truth = weights @ (1 - iou_matrix(possible, possible)) @ weights
    return float(2 * ((1 - iou_matrix(masks, possible)) @ weights).mean() - (1 - iou_matrix(masks, masks)).mean()
                 - of_truth)


def _expected_dice(case: Phantom, mask: np.ndarray, rng: np.random.Generator) -> float:
    if len(case.objects) == 2:
        possible, weights = case.distribution()
        return float(weights @ dice_of_iou(iou_matrix(possible, mask[None])[:, 0]))
    truths = np.stack([case.draw(rng) for _ in range(20)])
    return float(dice_of_iou(iou_matrix(truths, mask[None])[:, 0]).mean())


def _shapes(one, masks: np.ndarray) -> tuple[np.ndarray, float, float]:
    """For each sample the index of an object's nearest shape; the share that is that shape; the error in frequency."""
    rows, columns = one.cell
    iou = iou_matrix(masks[:, rows, columns], one.masks[:, rows, columns])
    nearest = iou.argmax(1)
    frequencies = np.bincount(nearest, minlength=len(SHAPES)) / len(masks)
    return nearest, float((iou.max(1) >= CLEAN).mean()), float(np.abs(frequencies - one.probabilities).sum() / 2)


def exact_samples(case: Phantom, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What an ideal sampler draws, and the exact probability map."""
    rng = np.random.default_rng(seed + 1)
    share = sum(np.einsum('k,kyx->yx', one.probabilities, one.masks) for one in case.objects)
    return np.stack([case.draw(rng) for _ in range(SAMPLES)]), share


def rows(denoiser: str, second: str) -> Iterator[Row]:
    """Of the table."""
    yield Row('stock, thresholds', denoiser, lambda s: replace(s, samples_from='stock', temperature=1.0), 0)
    yield Row('stock, one temperature, thresholds', denoiser, lambda s: replace(s, samples_from='stock'), 0)
    for title, dependence in (('thresholds', 1.0), ('a threshold an object (copula, rho 0)', 0.0)):
        yield Row(f'second network, cross-entropy alone, {title}', second,
                  lambda s, d=dependence: replace(s, samples_from='blind', blind_temperature=1.0, dependence=d), 1)
    yield Row('blind mask, one temperature, thresholds', denoiser, lambda s: replace(s, samples_from='blind'), 1)
    for (start, steps), dependence in itertools.product(((0.8, 1), (0.6, 1), (0.8, 2), (0.6, 2), (1.0, 3), (1.0, 10)),
                                                        (1.0, 0.0)):
        drawn = 'as one' if dependence else 'an object at a time'
        yield Row(f'start {start:g}, {steps} step{"s" if steps > 1 else ""}, drawn {drawn}', denoiser,
                  lambda s, u=start, k=steps, d=dependence: replace(s, start=u, steps=k, dependence=d), steps,
                  (start, steps) in ((0.6, 1), (0.8, 2)))
    yield Row('start 0.6, 1 step, from the hard mask', denoiser, lambda s: replace(s, start_mask='hard'), 1, False)
    yield Row('start 1, 10 steps of DDPM', denoiser, lambda s: replace(s, start=1.0, steps=10, redraw=0), 10, False)
