"""Test cases of `hippocampus.py`, by the commands a user has, and their table."""
from __future__ import annotations

import csv
import json
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from benchmark_trainers import PDDDPMTrainerBenchmark, nnUNetTrainerBenchmark, nnUNetTrainerBenchmarkLonger
from hippocampus import (
    CONFIGURATION,
    CONTROL_TRAINER,
    DATASET,
    DIRECT_TRAINER,
    PDDDPM_TRAINER,
    PLANS,
    SPLIT_SEED,
    STOCK_TRAINER,
    TRUTH_TRAINER,
    call,
)

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

BASELINE = 'stock'
NUM_SAMPLES = 8


class Row(NamedTuple):
    """A line of the table: what is predicted, and by which command."""
    title: str
    trainer: str
    samples: bool = False
    """`nnUNetv2_pdddpm_predict` with samples, uncertainty and report; else `nnUNetv2_predict`."""
    flags: tuple[str, ...] = ()


ROWS = (Row(BASELINE, STOCK_TRAINER),
        Row('stock without mirroring', STOCK_TRAINER, flags=('--disable_tta',)),
        Row('control: stock trained longer', CONTROL_TRAINER),
        Row('no diffusion: second stage', DIRECT_TRAINER, True, ('-steps', '0')),
        Row('PDDDPM', PDDDPM_TRAINER, True),
        Row('PDDDPM, `nnUNetv2_predict`', PDDDPM_TRAINER),
        Row('PDDDPM, noise on the truth in every patch', TRUTH_TRAINER, True))


def folder(work: Path, row: Row) -> Path:
    """Of its predictions."""
    return work / 'test' / ''.join(c if c.isalnum() else '_' for c in row.title)


def evaluate(work: Path) -> None:
    """Predict and evaluate what has not been."""
    raw = work / 'nnUNet_raw' / DATASET
    for row in ROWS:
        output = folder(work, row)
        if (output / 'evaluation.json').is_file():
            continue
        command = ['nnUNetv2_predict']
        if row.samples:
            command = ['nnUNetv2_pdddpm_predict', '--uncertainty', '--save_samples', '--report']
        call(work, *command, '-i', str(raw / 'imagesTs'), '-o', str(output), '-d', DATASET, '-c', CONFIGURATION,
             '-p', PLANS, '-tr', row.trainer, '-f', '0', '-device', 'cpu', '--save_probabilities', '-npp', '1',
             '-nps', '1', '--disable_progress_bar', *row.flags)
        call(work, 'nnUNetv2_pdddpm_evaluate', '-pred', str(output), '-ref', str(raw / 'labelsTs'), '-np', '2',
             '--disable_progress_bar')


def coverage(output: Path) -> str:
    """How often the 95 % interval of the samples' volumes holds the true volume, and how wide it is."""
    with open(output / 'evaluation.csv', newline='') as file:
        truth = {(row['case'], row['label']): float(row['reference_volume_ml']) for row in csv.DictReader(file)}
    inside, width = [], []
    for case in json.loads((output / 'pdddpm_summary.json').read_text())['cases']:
        for label, row in case['labels'].items():
            low, high = row['volume_ml_low'], row['volume_ml_high']
            inside.append(low <= truth[case['case'], label] <= high)
            width.append((high - low) / truth[case['case'], label])
    return f'{sum(inside)} of {len(inside)}, {np.mean(width):.0%} wide'


def table_row(work: Path, row: Row, stock: dict[str, Any]) -> str:
    """One line of markdown; differences are paired, with a bootstrap interval over cases."""
    output = folder(work, row)
    result = json.loads((output / 'evaluation.json').read_text())

    def paired(values: Any) -> str:
        difference = np.array([values(case) for case in result['cases']]) - [values(case) for case in stock['cases']]
        draws = np.random.default_rng(0).choice(difference, (10_000, len(difference))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        return f'{difference.mean():+.4f} ({low:+.4f} to {high:+.4f})'
    mean, voxels = result['foreground_mean'], result['voxelwise']
    sd = np.std([case['dice'] for case in result['cases']], ddof=1)
    correlation = result['estimated_dice'].get('case', {}).get('spearman')
    return (f'| {row.title} | {mean["dice"]:.4f} ± {sd:.4f} | {paired(lambda case: case["dice"])} '
            f'| {mean["hd95_mm"]:.2f} | {mean["surface_dice"]:.3f} | {voxels["all"]["nll"]:.4f} '
            f'| {paired(lambda case: case["voxelwise"]["all"]["nll"])} | {voxels["all"]["ece"]:.4f} '
            f'| {voxels["near"]["ece"]:.4f} | {voxels["all"]["aurc"]:.5f} '
            f'| {"" if correlation is None else f"{correlation:.2f}"} | {coverage(output) if row.samples else ""} |')


def draw_triage(work: Path, file: Path) -> None:
    """Estimated against true Dice, a dot a case."""
    row = next(row for row in ROWS if row.title == 'PDDDPM')
    cases = json.loads((folder(work, row) / 'evaluation.json').read_text())['cases']
    figure, axis = plt.subplots(figsize=(4.5, 4))
    axis.plot([case['estimated_dice'] for case in cases], [case['dice'] for case in cases], 'o', ms=4)
    axis.set(xlabel='estimated Dice', ylabel='true Dice')
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def write_table(work: Path, file: Path) -> None:
    """The markdown table, and what the sampling settings were tuned to."""
    rows = [row for row in ROWS if (folder(work, row) / 'evaluation.json').is_file()]
    stock = json.loads((folder(work, next(r for r in ROWS if r.title == BASELINE)) / 'evaluation.json').read_text())
    plans = json.loads((work / 'nnUNet_preprocessed' / DATASET / f'{PLANS}.json').read_text())
    plans = plans['configurations'][CONFIGURATION]
    folds = [work / 'nnUNet_results' / DATASET / f'{trainer}__{PLANS}__{CONFIGURATION}' / 'fold_0'
             for trainer in (PDDDPM_TRAINER, TRUTH_TRAINER)]
    tuned = [json.loads((fold / 'sampling_sweep.json').read_text())['in_one_line'] for fold in folds]
    lines = [
        '# Hippocampus: stock nnU-Net, its controls, and PDDDPM', '',
        '    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/hippocampus.py -o WORK', '',
        f'Machine: {platform.machine()}, {os.cpu_count()} CPU cores, no GPU, torch {torch.__version__}. Data: Medical '
        f'Segmentation Decathlon Task04; {stock["num_cases"]} test cases split off first (seed {SPLIT_SEED}), the '
        'others in 3 folds. Fold 0, one training seed: differences of about 0.002 '
        'in Dice are within the noise of training.', '',
        f'Reduced plans: patch {plans["patch_size"]}, {plans["architecture"]["arch_kwargs"]["features_per_stage"]} '
        f'features, batch {plans["batch_size"]}; training in bf16 autocast, 250 iterations an epoch. Stock: '
        f'{nnUNetTrainerBenchmark.epochs} epochs, every fold. PDDDPM: {PDDDPMTrainerBenchmark.epochs} epochs, warm '
        f'start, out-of-fold pre-segmentations. Control: the stock model of fold 0 trained for '
        f'{nnUNetTrainerBenchmarkLonger.epochs} epochs more. No diffusion: a second network of the same size, warm '
        'start and training, which only ever sees the pre-segmentation (out-of-fold) without noise.', '',
        'Settings of PDDDPM by `nnUNetv2_pdddpm_tune` on validation cases of fold 0, none of which is here: '
        f'{tuned[0]}; figure: [sampling_sweep.png](sampling_sweep.png). With noise on the truth in every patch: '
        f'{tuned[1]}.', '',
        f'## {stock["num_cases"]} test cases', '',
        'By `nnUNetv2_predict` and `nnUNetv2_pdddpm_predict` with mirroring, mean over labels, and '
        '`nnUNetv2_pdddpm_evaluate`. Δ: paired difference to `stock` with its 95 % bootstrap interval over cases. '
        'Surface Dice at 1 mm. NLL and ECE over all voxels, ECE also near the reference; AURC: lower is better; ρ: '
        'Spearman correlation of estimated with true Dice over cases; interval: of the volumes, of 8 samples.', '',
        '| | Dice ± sd over cases | Δ Dice | HD95 mm | surface Dice | NLL | Δ NLL | ECE | ECE near | AURC | ρ | '
        'true volume in the interval |',
        '|' + '---|' * 12,
        *(table_row(work, row, stock) for row in rows), '',
    ]
    lines += ['![Estimated against true Dice](triage.png)', '',
              f'A dot a case of the row PDDDPM: agreement of its {NUM_SAMPLES} samples against its true Dice.', '']
    draw_triage(work, file.with_name('triage.png'))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines))
