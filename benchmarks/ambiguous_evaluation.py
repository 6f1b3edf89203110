"""Predictions of `ambiguous.py`, and what they are worth against the exact distribution of the truth."""
from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from ambiguous import (
    CONFIGURATION,
    CONTROL_TRAINER,
    DATASET,
    DIRECT_CE_TRAINER,
    DIRECT_TRAINER,
    NUM_FOLDS,
    NUM_TEST,
    PAPER_TRAINER,
    PDDDPM_TRAINER,
    STOCK_TRAINER,
    TEST_SEED,
    TRUTH_TRAINER,
    model_fold,
)
from ambiguous_phantom import SHAPES, SIZE, Object, Phantom, phantom
from hippocampus import mean_and_interval
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from recalibration import fit_on_folder, rescale_folder
from scale import DEVICE, PLANS, seconds_now
from skimage import io

from nnunet_pdddpm.evaluation.calibration import SMALLEST_PROBABILITY, reliability
from nnunet_pdddpm.evaluation.overlap import dice_of_iou, iou_matrix
from nnunet_pdddpm.inference.export import Outputs
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor

SAMPLES = 16
CLEAN = 0.85
"""IoU with the nearest of its three shapes from which an object of a sample counts as one of them. Rim and lobe
together have 0.78 with the nearest."""
Overrides = Mapping[str, float]
CHAIN: Overrides = {'steps': 10, 'eta': 1.0, 'blend': 0.0}
Metrics = dict[str, np.ndarray]
"""Name -> (seeds, images) of a row."""


@dataclass(frozen=True)
class Row:
    """One way to get masks; of a stock model if it has no settings."""
    title: str
    trainer: str = STOCK_TRAINER
    settings: Overrides | None = None
    """Sampling settings in the place of the tuned ones."""
    mirroring: bool = True
    thresholds: bool = False
    """16 masks from a stock model: its probability above 1/32, 3/32, ..., 31/32."""
    temperature: bool = False
    """One for all probabilities of a stock model, fitted on the validation cases of the fold."""
    samples: int = field(default=SAMPLES)
    images: int = NUM_TEST
    folds: tuple[int, ...] = tuple(range(NUM_FOLDS))

    @property
    def masks(self) -> int:
        """Number of masks that are compared with the distribution."""
        return self.samples if self.thresholds or self.settings is not None else 1

    def folder(self, work: Path, fold: int) -> Path:
        """Of its predictions by a fold, which is a seed."""
        name = ''.join(c if c.isalnum() else '_' for c in self.title.replace(', 16 thresholds', ''))
        return work / 'predictions' / name / f'fold_{fold}'

    def trained_folds(self, work: Path) -> list[int]:
        """Those of its folds that can predict."""
        return [f for f in self.folds if (model_fold(work, self.trainer, f) / 'checkpoint_final.pth').is_file()]

    def predicted_folds(self, work: Path) -> list[int]:
        """Those of its folds that have."""
        return [fold for fold in self.folds if self.folder(work, fold).is_dir()]


STOCK = Row('stock')
ROWS = (STOCK, Row('stock, 16 thresholds', thresholds=True),
        Row('stock without mirroring', mirroring=False),
        Row('control: stock trained longer', CONTROL_TRAINER),
        Row('control: stock trained longer, 16 thresholds', CONTROL_TRAINER, thresholds=True),
        Row('stock, temperature, 16 thresholds', thresholds=True, temperature=True),
        Row('control: stock trained longer, temperature, 16 thresholds', CONTROL_TRAINER, thresholds=True,
            temperature=True),
        Row('no diffusion: second network', DIRECT_TRAINER, {'t_start': 1000, 'steps': 0, 'blend': 0.0}),
        Row('no diffusion: second network, cross-entropy alone', DIRECT_CE_TRAINER,
            {'t_start': 1000, 'steps': 0, 'blend': 0.0}),
        Row('PDDDPM, tuned', PDDDPM_TRAINER, {}),
        Row('PDDDPM, t_start 960, 1 step', PDDDPM_TRAINER, {'t_start': 960, 'steps': 1, 'blend': 0.0}),
        Row('PDDDPM, t_start 960, 10 steps', PDDDPM_TRAINER, {'t_start': 960, **CHAIN}),
        Row('PDDDPM, noise on the truth in every patch, tuned', TRUTH_TRAINER, {}),
        Row('the same, t_start 960, 10 steps', TRUTH_TRAINER, {'t_start': 960, **CHAIN}),
        Row('DDPM from pure noise: PDDDPM, 10 steps', PDDDPM_TRAINER, {'t_start': 1000, **CHAIN}),
        Row('DDPM from pure noise: truth in every patch, 10 steps', TRUTH_TRAINER, {'t_start': 1000, **CHAIN}),
        Row('DDPM from pure noise: PDDDPM, 1000 steps', PDDDPM_TRAINER,
            {'t_start': 1000, **CHAIN, 'steps': 1000}, mirroring=False, samples=8, images=4,
            folds=(0,)),
        Row('PDDDPMTrainerPaper', PAPER_TRAINER, {}, mirroring=False, samples=5, images=10))


# prediction ---------------------------------------------------------------------------------------------------------

def predict(work: Path) -> None:
    """All rows whose models are trained; folders that are there are left alone."""
    torch.set_num_threads(1)
    for row in ROWS:
        for fold in row.trained_folds(work):
            predict_row(work, row, fold)


def predict_row(work: Path, row: Row, fold: int) -> None:
    """A folder of masks, probabilities and samples, and what they cost."""
    output = row.folder(work, fold)
    if output.is_dir():
        return
    print(row.title, 'fold', fold, flush=True)
    partial = output.with_name('partial')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    device = torch.device(DEVICE)
    if row.settings is None:
        predictor = nnUNetPredictor(use_mirroring=row.mirroring, device=device, allow_tqdm=False)
    else:
        settings = {**row.settings, 'samples': row.samples}
        predictor = PDDDPMPredictor(
            use_mirroring=row.mirroring, device=device, allow_tqdm=False, outputs=Outputs(samples=True),
            overrides={name: (value, value) for name, value in settings.items()})
    model = work / 'nnUNet_results' / DATASET / f'{row.trainer}__{PLANS}__{CONFIGURATION}'
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    images = sorted((work / 'nnUNet_raw' / DATASET / 'imagesTs').iterdir())[:row.images]
    start = seconds_now()
    predict_images(predictor, images, partial)
    seconds = (seconds_now() - start) / len(images)
    calls = 4 if row.mirroring else 1
    if row.settings is not None:
        calls = sum(json.loads((partial / 'pdddpm_summary.json').read_text())['cases'][0]['network_calls'].values())
    (partial / 'cost.json').write_text(json.dumps({'network_calls': calls, 'cpu_seconds': seconds}))
    if row.temperature:
        rescale_folder(partial, temperature_of(work, predictor, fold))
    partial.rename(output)


def predict_images(predictor: nnUNetPredictor, images: list[Path], folder: Path) -> None:
    """With probabilities."""
    predictor.predict_from_files_sequential([[str(image)] for image in images],
                                            [str(folder / image.name[:-len('_0000.png')]) for image in images],
                                            save_probabilities=True)


def temperature_of(work: Path, predictor: nnUNetPredictor, fold: int) -> float:
    """Fitted on the validation cases of a fold."""
    raw = work / 'nnUNet_raw' / DATASET

    def share(case: str) -> np.ndarray:
        inside = io.imread(raw / 'labelsTr' / f'{case}.png') > 0
        return np.stack([~inside, inside])
    with TemporaryDirectory() as folder:
        predict_images(predictor, sorted((raw / 'imagesTr').iterdir())[fold::NUM_FOLDS], Path(folder))
        return fit_on_folder(Path(folder), share)


# measurement --------------------------------------------------------------------------------------------------------

def measure(work: Path, row: Row, folds: list[int] | None = None) -> Metrics:
    """Every metric of every image by every seed."""
    of_folds = [[measure_image(work, row, fold, phantom(TEST_SEED + i), f'phantom_{TEST_SEED + i:05d}')
                 for i in range(row.images)] for fold in (row.predicted_folds(work) if folds is None else folds)]
    return {name: np.array([[of_image[name] for of_image in of_fold] for of_fold in of_folds])
            for name in of_folds[0][0]}


def measure_image(work: Path, row: Row, fold: int, case: Phantom, name: str) -> dict[str, float]:
    """Every metric of one image: expectations over the distribution of the truth, not over draws of it."""
    folder = row.folder(work, fold)
    probability = np.load(folder / f'{name}.npz')['probabilities'][1].reshape(SIZE, SIZE).astype(np.float64)
    mask = io.imread(folder / f'{name}.png') > 0
    if row.thresholds:
        samples = np.stack([probability > (i + 0.5) / SAMPLES for i in range(SAMPLES)])
    elif row.settings is not None:
        samples = np.stack([io.imread(file) > 0 for file in sorted((folder / 'samples').glob(f'{name}_s*.png'))])
    else:
        samples = mask[None]
    assert len(samples) == row.masks
    return {**of_mask(case, mask, probability), **of_samples(case, samples)}


def of_mask(case: Phantom, mask: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Expected Dice, NLL and ECE.

    Args:
        case: with the distribution of the truth.
        mask: (SIZE, SIZE) bool.
        probability: (SIZE, SIZE) of the foreground.
    """
    masks, weights = case.distribution()
    share = np.einsum('k,kyx->yx', weights, masks)
    p = np.clip(probability, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    nll = -(share * np.log(p) + (1 - share) * np.log(1 - p)).mean()
    inside = probability > 0.5
    bins = reliability(np.where(inside, probability, 1 - probability).ravel(),
                       np.where(inside, share, 1 - share).ravel())
    return {'dice': float(weights @ dice_of_iou(iou_matrix(masks, mask[None])[:, 0])), 'nll': float(nll),
            'ece': bins.expected_calibration_error}


def of_samples(case: Phantom, samples: np.ndarray) -> dict[str, float]:
    """Samples (n, SIZE, SIZE) bool against the distribution of the truth.

    Returns:
        `ged`: GED² with d = 1 - IoU. `frequency_error`: half of the summed absolute differences between the frequencies
        of the three shapes and their probabilities, mean over objects (total variation). `clean`: share of the objects
        in the samples that are one of the three shapes. `attached_0` and so on: of object 0 and 1, the moments over
        samples of "more than the core", for the correlation of the objects. `rim_0`, `rim_1`: frequency of the rim.
    """
    masks, weights = case.distribution()
    of_truth = weights @ (1 - iou_matrix(masks, masks)) @ weights
    ged = 2 * ((1 - iou_matrix(samples, masks)) @ weights).mean() - (1 - iou_matrix(samples, samples)).mean() - of_truth
    shapes, clean = zip(*(shapes_of(case.objects[i], samples, i) for i in (0, 1)), strict=True)
    frequencies = [np.bincount(of, minlength=len(SHAPES)) / len(of) for of in shapes]
    errors = [np.abs(f - o.probabilities).sum() / 2 for f, o in zip(frequencies, case.objects, strict=True)]
    attached = [of > 0 for of in shapes]
    covariance = np.cov(attached, bias=True) if len(samples) > 1 else np.zeros((2, 2))
    return {'ged': float(ged), 'frequency_error': float(np.mean(errors)), 'clean': float(np.mean(clean)),
            'variance_0': float(covariance[0, 0]), 'variance_1': float(covariance[1, 1]),
            'covariance': float(covariance[0, 1]),
            'rim_0': float(frequencies[0][1]), 'rim_1': float(frequencies[1][1])}


def shapes_of(of: Object, samples: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """For each sample (n, SIZE, SIZE) the index of the nearest shape of an object, and whether it is that shape.

    Args:
        of: the object.
        samples: masks.
        half: 0 if the object lies in the left half of the image, 1 if in the right.
    """
    columns = slice(half * SIZE // 2, (half + 1) * SIZE // 2)
    iou = iou_matrix(samples[:, :, columns], of.masks[:, :, columns])
    return iou.argmax(1), iou.max(1) >= CLEAN


def correlation(metrics: Metrics) -> np.ndarray:
    """Of "more than the core" between the two objects of a sample, pooled over images; (seeds,), nan without spread."""
    variance = np.sqrt(metrics['variance_0'].sum(1) * metrics['variance_1'].sum(1))
    with np.errstate(invalid='ignore', divide='ignore'):
        return metrics['covariance'].sum(1) / np.where(variance > 0, variance, np.nan)


def ideal(samples: int, draws: int = 40) -> Metrics:
    """Of an ideal sampler, by `samples` draws of the truth; mean over `draws` sets of them, one "seed" in the shape."""
    rows = []
    for i in range(NUM_TEST):
        case, rng = phantom(TEST_SEED + i), np.random.default_rng(i)
        masks, weights = case.distribution()
        share = np.einsum('k,kyx->yx', weights, masks)
        sets = [of_samples(case, masks[rng.choice(len(masks), samples, p=weights)]) for _ in range(draws)]
        rows.append({**of_mask(case, share > 0.5, share), **{k: float(np.mean([s[k] for s in sets])) for k in sets[0]}})
    return {name: np.array([[row[name] for row in rows]]) for name in rows[0]}


def difference(metrics: Metrics, baseline: Metrics, name: str) -> tuple[float, float, float]:
    """Mean paired difference, and its 95 % interval: a bootstrap that draws seeds and images.

    Args:
        metrics: (seeds, images) of each metric.
        baseline: of the same seeds and images; where one has more, what it has first.
        name: of the metric.
    """
    seeds, images = (min(n) for n in zip(metrics[name].shape, baseline[name].shape, strict=True))
    return mean_and_interval(metrics[name][:seeds, :images] - baseline[name][:seeds, :images])
