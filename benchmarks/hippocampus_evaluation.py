"""Measurements and table of `hippocampus.py`: every sampling setting on the same preprocessed cases."""
from __future__ import annotations

import itertools
import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from benchmark_trainers import PDDDPMTrainerBenchmarkAdamW, nnUNetTrainerBenchmark, nnUNetTrainerBenchmarkLonger
from hippocampus import (
    CONFIGURATION,
    CONTROL_TRAINER,
    DATASET,
    PDDDPM_TRAINERS,
    PLANS,
    SPLIT_SEED,
    STOCK_TRAINER,
    call,
)
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_pdddpm.network.refiner import Refiner
from nnunet_pdddpm.network.settings import SamplingSettings

NUM_VALIDATION = 20
SWEEP = [SamplingSettings(t_start=t, steps=k) for t in (300, 500, 700, 900) for k in (1, 3)]


def load(work: Path, trainer: str) -> nnUNetPredictor:
    """Fold 0 of a trained model, as nnU-Net's predictor without mirroring."""
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(
        str(work / 'nnUNet_results' / DATASET / f'{trainer}__{PLANS}__{CONFIGURATION}'), (0,))
    return predictor


def measure(predictor: nnUNetPredictor, images: Path, labels: Path, cases: list[str],
            rows: dict[str, SamplingSettings | None]) -> dict[str, list[dict[str, Any]]]:
    """For each row (None: a stock model) one entry a case: Dice of labels 1 and 2, NLL, seconds.

    bf16 autocast for every row, the stock one included.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    for case in cases:
        data, _, properties = preprocessor.run_case(
            [str(images / f'{case}_0000.nii.gz')], None, predictor.plans_manager, predictor.configuration_manager,
            predictor.dataset_json)
        patch_source = torch.from_numpy(data).float()
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(labels / f'{case}.nii.gz'))).round().astype(np.uint8)
        for name, settings in rows.items():
            if settings is not None:
                assert isinstance(predictor.network, Refiner)
                predictor.network.settings = settings
            start = time.perf_counter()
            with torch.autocast('cpu', dtype=torch.bfloat16):
                logits = predictor.predict_sliding_window_return_logits(patch_source)
            seconds = time.perf_counter() - start
            mask, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
                logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager, properties,
                return_probabilities=True)
            results[name].append(score(case, mask, probabilities, truth, seconds))
    return results


def predict_by_command(work: Path, trainer: str, raw: Path, cases: list[str],
                       settings: SamplingSettings | None = None) -> list[dict[str, Any]]:
    """As `measure`, by the unmodified `nnUNetv2_predict` with its defaults (mirroring, fp32); seconds with all I/O."""
    output = work / 'predictions' / trainer
    variables = {} if settings is None else {f'nnUNet_pdddpm_{name}': str(getattr(settings, name))
                                             for name in ('t_start', 'steps', 'samples', 'blend', 'seed')}
    start = time.perf_counter()
    call(work, 'nnUNetv2_predict', '-i', str(raw / 'imagesTs'), '-o', str(output), '-d', DATASET, '-c', CONFIGURATION,
         '-p', PLANS, '-tr', trainer, '-f', '0', '-device', 'cpu', '--save_probabilities', '-npp', '1', '-nps', '1',
         **variables)
    seconds = (time.perf_counter() - start) / len(cases)
    entries = []
    for case in cases:
        mask, truth = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f'{case}.nii.gz'))).round().astype(np.uint8)
                       for folder in (output, raw / 'labelsTs'))
        entries.append(score(case, mask, np.load(output / f'{case}.npz')['probabilities'], truth, seconds))
    return entries


def score(case: str, mask: np.ndarray, probabilities: np.ndarray, truth: np.ndarray, seconds: float) -> dict[str, Any]:
    """One entry of the measurements: Dice of labels 1 and 2, negative log-likelihood in nats a voxel."""
    of_truth = np.take_along_axis(probabilities, truth[None].astype(int), 0)[0]
    return {'case': case, 'dice': [dice(mask == label, truth == label) for label in (1, 2)],
            'nll': float(-np.log(np.clip(of_truth, 1e-6, 1)).mean()), 'seconds': seconds}


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice coefficient of two boolean masks, at least one of them not empty."""
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def test_rows(chosen: SamplingSettings) -> dict[str, SamplingSettings | None]:
    """The rows of the table: what is varied around the settings chosen on the validation cases."""
    rows = [replace(chosen, t_start=t, steps=1) for t in (100, 300, 500, 700, 900)]
    rows += [replace(chosen, steps=k) for k in (2, 3, 5, 10)]
    rows += [replace(chosen, steps=1, samples=8)]
    rows += [replace(chosen, steps=1, samples=n, blend=0.5) for n in (1, 8)]
    return {f't_start={r.t_start} k={r.steps} n={r.samples} blend={r.blend}': r for r in rows}


def evaluate(work: Path) -> None:
    """Choose settings on validation cases, then measure every row on the test cases, into measurements.json."""
    preprocessed, raw = work / 'nnUNet_preprocessed' / DATASET, work / 'nnUNet_raw' / DATASET
    validation = json.loads((preprocessed / 'splits_final.json').read_text())[0]['val'][:NUM_VALIDATION]
    test = sorted(p.name[:-len('.nii.gz')] for p in (raw / 'labelsTs').glob('*.nii.gz'))
    file = work / 'measurements.json'
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def keep(key: str, value: Any) -> None:
        done[key] = value
        file.write_text(json.dumps(done))

    for trainer in PDDDPM_TRAINERS:
        if f'validation {trainer}' not in done:
            rows = {json.dumps(asdict(s)): s for s in SWEEP}
            keep(f'validation {trainer}', measure(load(work, trainer), raw / 'imagesTr', raw / 'labelsTr', validation,
                                                  rows))
    best = max(itertools.product(PDDDPM_TRAINERS, map(json.dumps, map(asdict, SWEEP))),
               key=lambda pair: mean_dice(done[f'validation {pair[0]}'][pair[1]]))
    keep('chosen', {'trainer': best[0], 'settings': json.loads(best[1])})
    chosen = SamplingSettings(**json.loads(best[1]))
    for name, trainer, settings in (('stock', STOCK_TRAINER, None), ('default', best[0], SamplingSettings()),
                                    ('refined', best[0], chosen)):
        if f'{name}, command' not in done:
            keep(f'{name}, command', predict_by_command(work, trainer, raw, test, settings))
    if 'refined' not in done:
        keep('refined', measure(load(work, best[0]), raw / 'imagesTs', raw / 'labelsTs', test, test_rows(chosen)))
    for name, trainer in (('stock', STOCK_TRAINER), ('control', CONTROL_TRAINER)):
        if name not in done:
            keep(name, measure(load(work, trainer), raw / 'imagesTs', raw / 'labelsTs', test, {name: None})[name])


def mean_dice(entries: list[dict[str, Any]]) -> float:
    """Mean over cases of the mean over labels."""
    return float(np.mean([entry['dice'] for entry in entries]))


def table_row(title: str, entries: list[dict[str, Any]], stock: list[dict[str, Any]]) -> str:
    """One line of markdown; the difference to stock is paired, with a bootstrap interval over cases."""
    scores, of_stock = (np.array([e['dice'] for e in es]) for es in (entries, stock))
    difference = scores.mean(1) - of_stock.mean(1)
    draws = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    won, lost = (difference > 0).sum(), (difference < 0).sum()
    return (f'| {title} | {scores[:, 0].mean():.4f} | {scores[:, 1].mean():.4f} | {scores.mean():.4f} ± '
            f'{scores.mean(1).std(ddof=1):.4f} | {difference.mean():+.4f} ({low:+.4f} to {high:+.4f}) | {won} / {lost} '
            f'| {np.mean([e["nll"] for e in entries]):.4f} | {np.median([e["seconds"] for e in entries]):.2f} |')


def write_table(work: Path, file: Path) -> None:
    """The markdown table from measurements.json."""
    done = json.loads((work / 'measurements.json').read_text())
    chosen, stock = done['chosen'], done['stock']
    preprocessed = work / 'nnUNet_preprocessed' / DATASET
    folds = json.loads((preprocessed / 'splits_final.json').read_text())
    plans = json.loads((preprocessed / f'{PLANS}.json').read_text())['configurations'][CONFIGURATION]
    header = ('| | Dice anterior | Dice posterior | mean ± sd over cases | Δ to stock (95 % interval) | won / lost '
              '| NLL | s/case |\n|---|---|---|---|---|---|---|---|')
    settings = chosen['settings']
    lines = [
        '# Hippocampus: stock nnU-Net against PDDDPM', '',
        '    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/hippocampus.py -o WORK', '',
        f'Machine: {platform.machine()}, {os.cpu_count()} CPU cores, no GPU, torch {torch.__version__}. Data: Medical '
        f'Segmentation Decathlon Task04; {len(stock)} test cases split off first (seed {SPLIT_SEED}), the others in '
        f'{len(folds)} folds of about {len(folds[0]["val"])}. One fold, one training seed: differences of about 0.002 '
        'are within the noise of training.', '',
        f'Reduced plans: patch {plans["patch_size"]}, {plans["architecture"]["arch_kwargs"]["features_per_stage"]} '
        f'features, batch {plans["batch_size"]}; training in bf16 autocast, 250 iterations an epoch. Stock: '
        f'{nnUNetTrainerBenchmark.epochs} epochs, every fold. PDDDPM: fold 0, {PDDDPMTrainerBenchmarkAdamW.epochs} '
        'epochs, warm start, out-of-fold pre-segmentations, half of the noise on the truth and half on the '
        'pre-segmentation. '
        f'Control: the stock model of fold 0 trained for {nnUNetTrainerBenchmarkLonger.epochs} epochs more.', '',
        f'## Chosen on {NUM_VALIDATION} validation cases of fold 0', '',
        'Mean Dice, n = 1. The best pair of optimizer and settings goes on to the test cases.', '',
        '| t_start | k | ' + ' | '.join(PDDDPM_TRAINERS) + ' |', '|---|---|' + '---|' * len(PDDDPM_TRAINERS),
    ]
    for row in SWEEP:
        scores = (mean_dice(done[f'validation {t}'][json.dumps(asdict(row))]) for t in PDDDPM_TRAINERS)
        lines.append(f'| {row.t_start} | {row.steps} | ' + ' | '.join(f'{s:.4f}' for s in scores) + ' |')
    lines += [
        '', f'Chosen: {chosen["trainer"]}, t_start={settings["t_start"]}, k={settings["steps"]}.', '',
        f'## {len(stock)} test cases, without mirroring', '',
        'bf16 autocast. k reverse steps, n samples, blend: weight of the stock probabilities. Seconds: median over '
        'cases of the network part, on a machine that was not otherwise idle: only a rough guide.',
        '',
        header, table_row('stock', stock, stock),
        table_row('control: stock trained longer', done['control'], stock),
        *(table_row(name, entries, stock) for name, entries in done['refined'].items()), '',
        f'## {len(stock)} test cases by the unmodified `nnUNetv2_predict`', '',
        'With its defaults: mirroring (8 network calls where there was one) and fp32. Seconds with start of the '
        'program, input and output, one command after the other on an otherwise idle machine. Network calls a tile: '
        f'stock 8, PDDDPM 16 with its default settings, {8 * (1 + settings["steps"] * settings["samples"])} with the '
        'chosen ones.', '',
        header, *(table_row(title, done[f'{name}, command'], done['stock, command']) for name, title in (
            ('stock', 'stock'), ('default', 'PDDDPM, default settings (t_start=700 k=1 n=1)'),
            ('refined', 'PDDDPM, chosen settings'))),
        '',
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines))
