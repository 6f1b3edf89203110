"""Rows of `hippocampus.py`: test cases in the network's grid, which is that of the images, with mirroring."""
from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from benchmark_trainers import PDDDPMTrainerBenchmark, nnUNetTrainerBenchmark
from hippocampus import (
    CONFIGURATION,
    CONTROL_TRAINER,
    DATASET,
    NUM_FOLDS,
    PDDDPM_TRAINER,
    SECOND_TRAINER,
    SPLIT_SEED,
    STOCK_TRAINER,
    TUNING_MINUTES,
    fold_folder,
    volume_row,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scale import AUTOCAST, DEVICE, PLANS, PLANS_IN_WORDS, commit, machine
from statistics_of_trainings import difference, spread
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.state import stored_settings
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.temperature import fit_temperature, likelihoods

VOXEL_ML = 1e-3  # images and the network's grid have voxels of 1 mm
TITLES = {
    'stock': 'stock', 'stock T': 'the same with one temperature', 'longer': 'control: stock trained longer',
    'longer T': 'the same with one temperature', 'second': 'second network, cross-entropy alone',
    'blind': 'PDDDPM, blind mask', 'blind T': 'PDDDPM, blind mask with one temperature',
    'noise': 'PDDDPM, mean of 8 samples (start 1, 1 step)',
    'samples': 'PDDDPM, mean of 8 samples (start 0.8, 2 steps)',
    'samples mirrored': 'the same, from a mirrored pre-segmentation', 'tuned': 'PDDDPM as tuned',
    'ensemble': 'stock, ensemble of the 3 folds', 'ensemble tuned': 'PDDDPM as tuned, ensemble of the 3 folds'}


def cases(predictor: nnUNetPredictor, work: Path, which: str, names: list[str]) -> list[tuple[str, Tensor, Truth]]:
    """Name, preprocessed image and truth of test ('Ts') or training ('Tr') cases."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    raw = work / 'nnUNet_raw' / DATASET
    found = []
    for name in names:
        image, labels, _ = preprocessor.run_case([str(raw / f'images{which}' / f'{name}_0000.nii.gz')],
                                                 str(raw / f'labels{which}' / f'{name}.nii.gz'),
                                                 predictor.plans_manager, predictor.configuration_manager,
                                                 predictor.dataset_json)
        found.append((name, torch.from_numpy(np.asarray(image)),
                      Truth(np.asarray(labels)[0], predictor.label_manager, torch.device('cpu'))))
    return found


def names_of(work: Path, fold: int | None) -> list[str]:
    """Of the test cases, or the validation cases of a fold."""
    if fold is not None:
        splits = json.loads((work / 'nnUNet_preprocessed' / DATASET / 'splits_final.json').read_text())
        return list(splits[fold]['val'])
    labels = work / 'nnUNet_raw' / DATASET / 'labelsTs'
    return sorted(file.name[:-len('.nii.gz')] for file in labels.iterdir())


def open_model(kind: type, work: Path, trainer: str, folds: tuple[int, ...]) -> Any:
    """A predictor with mirroring."""
    predictor = kind(device=torch.device(DEVICE), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(fold_folder(work, trainer, 0).parent), folds)
    return predictor


def measure(work: Path) -> None:
    """Scores of every row and training, as `measured/ROW__FOLD.json`; what is there is left alone."""
    (work / 'measured').mkdir(exist_ok=True)
    for fold in range(NUM_FOLDS):
        measure_plain(work, STOCK_TRAINER, (fold,), {'stock': False, 'stock T': True})
        measure_plain(work, CONTROL_TRAINER, (fold,), {'longer': False, 'longer T': True})
        measure_refined(work, SECOND_TRAINER, (fold,), ('second',))
        measure_refined(work, PDDDPM_TRAINER, (fold,), ('blind', 'noise', 'samples', 'samples mirrored', 'tuned'))
    every = tuple(range(NUM_FOLDS))
    measure_plain(work, STOCK_TRAINER, every, {'ensemble': False})
    measure_refined(work, PDDDPM_TRAINER, every, ('ensemble tuned',))


def file_of(work: Path, row: str, folds: tuple[int, ...]) -> Path:
    """Of a measurement."""
    return work / 'measured' / f'{row.replace(" ", "_")}__{"".join(map(str, folds))}.json'


@torch.inference_mode()
def measure_plain(work: Path, trainer: str, folds: tuple[int, ...], rows: dict[str, bool]) -> None:
    """Rows of a stock model: with a temperature fitted on the validation cases, or without."""
    if all(file_of(work, row, folds).is_file() for row in rows):
        return
    predictor, temperature = open_model(nnUNetPredictor, work, trainer, folds), 1.0
    if any(rows.values()):
        temperature = fit_temperature([
            likelihoods(predictor.predict_logits_from_preprocessed_data(image), truth, False)
            for _, image, truth in cases(predictor, work, 'Tr', names_of(work, folds[0]))])
    scores: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    for _, image, truth in cases(predictor, work, 'Ts', names_of(work, None)):
        logits = predictor.predict_logits_from_preprocessed_data(image).float()
        for row, tempered in rows.items():
            scores[row].append(score(truth, logits / (temperature if tempered else 1)))
    for row, of in scores.items():
        file_of(work, row, folds).write_text(json.dumps(of))


def score(truth: Truth, logits: Tensor) -> dict[str, float]:
    """Dice and NLL of a mask."""
    dice, nll = truth.score(logits_to_probabilities(logits[None].float(), False)[0])
    return {'dice': dice, 'nll': nll}


def measure_refined(work: Path, trainer: str, folds: tuple[int, ...], rows: tuple[str, ...]) -> None:
    """Rows of a PDDDPM model: of its blind mask (and with its temperature), of samples, and as its settings say."""
    samples = {'mask_stock': 0.0, 'mask_blind': 0.0, 'samples_from': 'chain', 'start': 0.8, 'steps': 2, 'samples': 8}
    blind = {'mask_stock': 0.0, 'mask_blind': 1.0}
    changes: dict[str, dict[str, Any]] = {
        'second': {**blind, 'blind_temperature': 1.0}, 'blind': {**blind, 'blind_temperature': 1.0},
        'samples': samples, 'samples mirrored': samples, 'noise': {**samples, 'start': 1.0, 'steps': 1}}
    for row in (row for row in rows if not file_of(work, row, folds).is_file()):
        predictor = open_model(lambda row=row, **kwargs: VolumePredictor(overrides=changes.get(row), **kwargs), work,
                               trainer, folds)
        temperature = stored_settings(predictor.list_of_parameters[0]).blind_temperature
        if 'samples' not in changes.get(row, {'samples': 8}):
            predictor.num_samples = len(folds)
        scores, tempered = [], []
        for name, image, truth in cases(predictor, work, 'Ts', names_of(work, None)):
            with mirrored_start() if row == 'samples mirrored' else nullcontext():
                prediction = predictor.predict_volume(image, case=name, stock=row == 'samples mirrored')
            true = np.bincount(truth.truth.cpu(), minlength=3)[1:] * VOXEL_ML
            sizes = prediction.counts.sample_sizes() * VOXEL_ML
            scores.append({**score(truth, prediction.logits), 'volumes': [
                volume_row(float(true[i]), of, sizes[:, i])
                for i, of in enumerate(prediction.counts.features(np.full(2, VOXEL_ML)))]})
            tempered.append(score(truth, prediction.logits / temperature))
        file_of(work, row, folds).write_text(json.dumps(scores))
        if row == 'blind':
            file_of(work, 'blind T', folds).write_text(json.dumps(tempered))


def mirrored_start() -> AbstractContextManager[Any]:
    """Within it chains start from the mirrored pre-segmentation."""
    return patch.object(Volume, 'start_logits', property(lambda volume: volume.stock_logits))


def files_of(work: Path, row: str) -> list[Path]:
    """Of a row, one a training."""
    return sorted((work / 'measured').glob(f'{row.replace(" ", "_")}__*.json'))


def read(work: Path, row: str) -> dict[str, np.ndarray]:
    """Metric -> (trainings, cases)."""
    content = [json.loads(file.read_text()) for file in files_of(work, row)]
    return {name: np.array([[case[name] for case in of] for of in content]) for name in ('dice', 'nll')}


def write_table(work: Path, file: Path) -> None:
    """The page, of the rows that are measured."""
    found = {row: read(work, row) for row in TITLES if any(files_of(work, row))}
    missing = [title for row, title in TITLES.items() if row not in found]
    lines = []
    for row, of in found.items():
        def against(metric: str, of: dict[str, np.ndarray] = of, row: str = row) -> str:
            base = found['longer'][metric]
            return '' if row == 'longer' or len(of[metric]) != len(base) else difference(of[metric], base, 4)
        lines.append(f'| {TITLES[row]} | {spread(of["dice"], 4)} | {against("dice")} | {spread(of["nll"], 4)} '
                     f'| {against("nll")} |')
    tuned = [f'- fold {fold}: ' + '; '.join(json.loads(
        (fold_folder(work, PDDDPM_TRAINER, fold) / 'sampling_sweep.json').read_text())['log'])
        for fold in range(NUM_FOLDS)]
    plans = json.loads((work / 'nnUNet_preprocessed' / DATASET / f'{PLANS}.json').read_text())
    planned = plans['configurations'][CONFIGURATION]
    file.write_text('\n'.join([
        '# Hippocampus: stock nnU-Net, its controls, and PDDDPM', '',
        '    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/hippocampus.py -o WORK', '',
        f'Commit {commit()}. Machine: {machine()}. Data: Medical Segmentation Decathlon Task04; '
        f'{found["stock"]["dice"].shape[1]} test cases split off first (seed {SPLIT_SEED}), the others in {NUM_FOLDS} '
        "folds. Every fold is a training; all predict the same test cases, with mirroring, in the network's grid.", '',
        f'{PLANS_IN_WORDS}: patch {planned["patch_size"]}, '
        f'{planned["architecture"]["arch_kwargs"]["features_per_stage"]} features, batch {planned["batch_size"]}. '
        f'Training in {AUTOCAST}, prediction of stock and blind masks in float32, of chains in bfloat16 where the CPU '
        f'has it. Stock: {250 * nnUNetTrainerBenchmark.epochs:,} iterations. Control, second network and PDDDPM: '
        f"{250 * PDDDPMTrainerBenchmark.epochs:,} more, from stock's weights. Temperature: one number, fitted on the "
        'validation cases of the fold. Tuned: by `nnUNetv2_pdddpm_tune` on these validation cases, in at most '
        f'{TUNING_MINUTES} minutes:', '', *tuned, '',
        '± is the standard deviation over trainings. Δ is the paired difference to the control with a 95 % interval by '
        "Student's t over the trainings. Intervals of volumes are measured in [intervals.md](intervals.md)."
        + (f' Not measured yet: {"; ".join(missing)}.' if missing else ''), '',
        '| | Dice | Δ to the control | NLL | Δ to the control |', '|---|---|---|---|---|', *lines, '']))
