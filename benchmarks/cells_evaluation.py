"""Predictions and measurements of `cells.py`: every way to get several masks as a folder that the evaluation reads."""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cells import CONFIGURATION, CONTROL_TRAINER, DATASET, NUM_FOLDS, PDDDPM_TRAINERS, STOCK_TRAINER, validation_part
from hippocampus import mean_and_interval
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from recalibration import fit_on_folder, rescale_folder
from scale import DEVICE, PLANS
from skimage import io

from nnunet_pdddpm.evaluation.calibration import brier, negative_log_likelihood, reliability
from nnunet_pdddpm.evaluation.evaluate import evaluate_cases
from nnunet_pdddpm.evaluation.folders import Folders, open_folders
from nnunet_pdddpm.inference.export import Outputs
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor

SAMPLES = 16
DIRECT = (1000, 0, 0.0)
CHAINS = (*((t, 1, 0.0) for t in (500, 700, 900, 960, 1000)), (900, 3, 0.0), (960, 3, 0.0), (960, 3, 1.0),
          (960, 10, 1.0))
STARTS = dict(zip(PDDDPM_TRAINERS, ('default', 'truth', 'no diffusion', 'no diffusion, cross-entropy alone'),
                  strict=True))
Metrics = dict[str, list[float]]
"""Of a row: name of the metric -> value of each image, in alphabetical order of images."""


@dataclass(frozen=True)
class Row:
    """One way to get masks: a stock model if it has no settings (t_start, k, eta)."""
    title: str
    trainer: str = STOCK_TRAINER
    folds: tuple[int, ...] = (0,)
    mirroring: bool = False
    thresholds: bool = False
    temperature: bool = False
    """One for all probabilities, fitted on the validation images of the fold."""
    settings: tuple[int, int, float] | None = None
    redraw: bool = False
    """See `SamplingSettings`."""

    @property
    def samples(self) -> int:
        """Number of masks that are compared with the raters."""
        return SAMPLES if self.thresholds or self.settings else len(self.folds)

    @property
    def calls(self) -> int:
        """Network calls for an image, which is one tile; mirroring is spread over samples, the stock call has all."""
        mirrored = 4 if self.mirroring else 1
        return mirrored * len(self.folds) + (max(self.settings[1], 1) * SAMPLES if self.settings else 0)

    @property
    def folder(self) -> str:
        """Name of its folder of predictions."""
        parts = [self.trainer, *(f'f{fold}' for fold in self.folds), *(['mirroring'] if self.mirroring else []),
                 *(['temperature'] if self.temperature else []), *(['thresholds'] if self.thresholds else []),
                 *map(str, self.settings or ()), *(['redraw'] if self.redraw else [])]
        return '-'.join(parts)


def stock_rows(work: Path) -> list[Row]:
    """The untouched stock model and what can be had from it without a second network, and the control."""
    every = tuple(range(NUM_FOLDS))
    rows = [Row('stock'), Row('stock, 16 thresholds', thresholds=True),
            Row('stock, mirroring', mirroring=True),
            Row('stock, mirroring, 16 thresholds', mirroring=True, thresholds=True),
            Row(f'stock, {NUM_FOLDS} folds', folds=every),
            Row(f'stock, {NUM_FOLDS} folds, 16 thresholds of their mean', folds=every, thresholds=True),
            Row('stock, mirroring, temperature, 16 thresholds', mirroring=True, thresholds=True, temperature=True),
            Row('control: stock trained longer', CONTROL_TRAINER),
            Row('control, 16 thresholds', CONTROL_TRAINER, thresholds=True),
            Row('control, mirroring', CONTROL_TRAINER, mirroring=True),
            Row('control, mirroring, 16 thresholds', CONTROL_TRAINER, mirroring=True, thresholds=True),
            Row('control, mirroring, temperature, 16 thresholds', CONTROL_TRAINER, mirroring=True, thresholds=True,
                temperature=True)]
    return [row for row in rows if is_trained(work, row.trainer)]


def pdddpm_row(trainer: str, settings: tuple[int, int, float], mirroring: bool = False) -> Row:
    """A PDDDPM model with sampling settings."""
    t_start, steps, eta = settings
    title = (f't_start={t_start} k={steps}' + (f' eta={eta:g}' if steps > 1 else '')) if steps else 'direct (k=0)'
    return Row(f'PDDDPM {STARTS[trainer]}: {title}' + ', mirroring' * mirroring, trainer, mirroring=mirroring,
               settings=settings)


def sweep(trainer: str) -> list[Row]:
    """What is tried on the validation images."""
    settings = {'default': (DIRECT, *CHAINS), 'truth': CHAINS}.get(STARTS[trainer], (DIRECT,))
    return [pdddpm_row(trainer, s) for s in settings]


def test_rows(work: Path, trainer: str) -> list[Row]:
    """Of a PDDDPM model: what the validation images say, without and with mirroring, and some starts beside it."""
    settings = {row.settings for row in sweep(trainer)}
    best = chosen(work, trainer)
    picked = {best.settings, *settings & {DIRECT}}
    unmirrored = {*picked, nearest_to_raters(work, trainer).settings, *settings & {(700, 1, 0.0), (900, 1, 0.0)}}
    ensemble = replace(best, title=best.title.replace(':', f', {NUM_FOLDS} folds:'), folds=tuple(range(NUM_FOLDS)))
    in_every_fold = all(is_trained(work, trainer, fold) for fold in ensemble.folds)
    return [*(pdddpm_row(trainer, s) for s in sorted(filter(None, unmirrored))),
            *(pdddpm_row(trainer, s, mirroring=True) for s in sorted(filter(None, picked))),
            *([ensemble] if in_every_fold else [])]


def seed_rows(work: Path) -> list[Row]:
    """Those trained in every fold, with mirroring and the settings chosen on the validation images of fold 0."""
    rows = [*(row for row in stock_rows(work) if row.mirroring and row.thresholds),
            *(pdddpm_row(trainer, settings, mirroring=True) for trainer in trained_pdddpm(work)
              if (settings := chosen(work, trainer).settings) is not None)]
    return [row for row in rows if all(is_trained(work, row.trainer, fold) for fold in range(NUM_FOLDS))]


def of_folds(row: Row) -> list[Row]:
    """The same by the model of each fold."""
    return [replace(row, folds=(fold,)) for fold in range(NUM_FOLDS)]


def is_trained(work: Path, trainer: str, fold: int = 0) -> bool:
    """Whether a fold is trained; what is not is left out of the predictions and named in the table."""
    folder = work / 'nnUNet_results' / DATASET / f'{trainer}__{PLANS}__{CONFIGURATION}'
    return (folder / f'fold_{fold}' / 'checkpoint_final.pth').is_file()


def trained_pdddpm(work: Path) -> list[str]:
    """The PDDDPM trainers that can be evaluated."""
    return [trainer for trainer in PDDDPM_TRAINERS if is_trained(work, trainer)]


# prediction ---------------------------------------------------------------------------------------------------------

def predict(work: Path) -> None:
    """The sweeps on the validation images, then the test images; folders that are there are left alone."""
    torch.set_num_threads(1)
    for row in stock_rows(work):
        if not row.temperature:  # it is fitted on these
            predict_row(work, 'validation', row)
        predict_row(work, 'test', row)
    for trainer in trained_pdddpm(work):
        for row in sweep(trainer):
            predict_row(work, 'validation', row)
        for row in test_rows(work, trainer):
            predict_row(work, 'test', row)
    for row in seed_rows(work):
        for of_fold in of_folds(row):
            predict_row(work, 'test', of_fold)


def predict_row(work: Path, part: str, row: Row) -> None:
    """A folder as nnUNetv2_pdddpm_predict writes it: masks, probabilities, samples."""
    output = work / 'predictions' / part / row.folder
    if output.is_dir():
        return
    print(part, row.title, flush=True)
    partial = output.with_name('partial')
    shutil.rmtree(partial, ignore_errors=True)
    if row.settings is not None:
        t_start, steps, eta = row.settings
        overrides = {'samples': SAMPLES, 't_start': t_start, 'steps': steps, 'eta': eta, 'redraw': int(row.redraw)}
        predictor: nnUNetPredictor = PDDDPMPredictor(
            use_mirroring=row.mirroring, device=torch.device(DEVICE), allow_tqdm=False,
            overrides={name: (value, value) for name, value in overrides.items()}, outputs=Outputs(samples=True))
        run_predictor(predictor, work, part, row.trainer, row.folds, partial)
    else:
        predictor = nnUNetPredictor(use_mirroring=row.mirroring, device=torch.device(DEVICE), allow_tqdm=False)
        run_predictor(predictor, work, part, row.trainer, row.folds, partial)
        if row.temperature:
            rescale_folder(partial, temperature(work, row))
        if row.thresholds:
            write_thresholds(partial)
        elif len(row.folds) > 1:
            for fold in row.folds:
                run_predictor(predictor, work, part, row.trainer, (fold,), partial / 'fold')
                (partial / 'samples').mkdir(exist_ok=True)
                for mask in (partial / 'fold').glob('*.png'):
                    mask.rename(partial / 'samples' / f'{mask.stem}_s{fold:02d}.png')
                shutil.rmtree(partial / 'fold')
    partial.rename(output)


def temperature(work: Path, row: Row) -> float:
    """Fitted on the validation images of the fold, all raters' masks alike."""
    part, = map(validation_part, row.folds)
    plain = replace(row, temperature=False, thresholds=False)
    predict_row(work, part, plain)

    def share(image: str) -> np.ndarray:
        cell = np.mean([io.imread(file) > 0 for file in (work / part / 'raters').glob(f'{image}__*.png')], 0)
        return np.stack([1 - cell, cell])
    return fit_on_folder(work / 'predictions' / part / plain.folder, share)


def run_predictor(predictor: nnUNetPredictor, work: Path, part: str, trainer: str, folds: tuple[int, ...],
                  output: Path) -> None:
    """Masks and probabilities of all images of a part."""
    output.mkdir(parents=True)
    predictor.initialize_from_trained_model_folder(
        str(work / 'nnUNet_results' / DATASET / f'{trainer}__{PLANS}__{CONFIGURATION}'), folds)
    predictor.predict_from_files_sequential(str(work / part / 'images'), str(output), save_probabilities=True)


def write_thresholds(folder: Path) -> None:
    """As samples: where the probability of a cell exceeds 1/32, 3/32, ..., 31/32."""
    (folder / 'samples').mkdir()
    for file in folder.glob('*.npz'):
        probability = np.load(file)['probabilities'][1, 0]
        for i in range(SAMPLES):
            mask = probability > (i + 0.5) / SAMPLES
            io.imsave(folder / 'samples' / f'{file.stem}_s{i:02d}.png', mask.astype(np.uint8), check_contrast=False)


# measurement --------------------------------------------------------------------------------------------------------

def measure(work: Path, part: str, row: Row) -> Metrics:
    """Every metric of every image; kept in a file, since the tables ask several times."""
    kept = work / 'measurements' / part / f'{row.folder}.json'
    if not kept.is_file():
        folders = open_folders(work / 'predictions' / part / row.folder, work / part / 'majority',
                               work / part / 'raters')
        metrics: Metrics = {}
        for result in evaluate_cases(folders):
            assert result.values['samples'] == row.samples
            of = {**result.labels['cell'], **calibration_to_raters(folders, result.case)}
            of.setdefault('sample_diversity', 0.0)  # of a single mask
            for name, value in of.items():
                metrics.setdefault(name, []).append(value)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(metrics))
    content: Metrics = json.loads(kept.read_text())
    return content


def calibration_to_raters(folders: Folders, case: str) -> dict[str, float]:
    """NLL, Brier score and ECE with each rater's mask as the truth: they are best if probability is share of raters."""
    reference = folders.read_mask(folders.references / f'{case}{folders.ending}')
    p = folders.read_probabilities(folders.predictions / f'{case}.npz', reference).reshape(2, -1)
    truths = [folders.read_mask(file, reference).array.ravel() for file in folders.rater_files(case).values()]
    bins = [reliability(p.max(0), p.argmax(0) == truth) for truth in truths]
    return {'nll': float(np.mean([negative_log_likelihood(p, truth) for truth in truths])),
            'brier': float(np.mean([brier(p, truth) for truth in truths])),
            'ece': sum(bins[1:], bins[0]).expected_calibration_error}


def mean(metrics: Metrics, name: str) -> float:
    """Over images."""
    return float(np.mean(metrics[name]))


def chosen(work: Path, trainer: str) -> Row:
    """The row of the sweep with the lowest GED² on the validation images."""
    return min(sweep(trainer), key=lambda row: mean(measure(work, 'validation', row), 'ged_squared'))


def nearest_to_raters(work: Path, trainer: str) -> Row:
    """The row of the sweep whose samples differ on the validation images most nearly as much as the raters."""
    def gap(row: Row) -> float:
        metrics = measure(work, 'validation', row)
        return abs(mean(metrics, 'sample_diversity') - mean(metrics, 'rater_diversity'))
    return min(sweep(trainer), key=gap)


def difference(metrics: Metrics | Sequence[Metrics], baseline: Metrics | Sequence[Metrics], name: str
               ) -> tuple[float, float, float]:
    """Mean paired difference to a baseline, its 95 % interval: a bootstrap that draws images, and folds if given."""
    one, other = (np.array([m[name] for m in ([of] if isinstance(of, dict) else of)]) for of in (metrics, baseline))
    return mean_and_interval(one - other)
