"""Test cases of `hippocampus.py`, by the commands a user has, and their table."""
from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import SimpleITK as sitk
import torch
from benchmark_trainers import PDDDPMTrainerBenchmark, nnUNetTrainerBenchmark, nnUNetTrainerBenchmarkLonger
from hippocampus import (
    CONFIGURATION,
    CONTROL_TRAINER,
    DATASET,
    DIRECT_CE_TRAINER,
    DIRECT_TRAINER,
    NUM_FOLDS,
    PAPER_TRAINER,
    PDDDPM_TRAINER,
    SPLIT_SEED,
    STOCK_TRAINER,
    TRUTH_TRAINER,
    TUNING_MINUTES,
    call,
    fold_folder,
    mean_and_interval,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from recalibration import fit_on_folder, rescale_folder
from scale import AUTOCAST, DEVICE, PLANS, PLANS_IN_WORDS, SECONDS, machine, seconds_now

from nnunet_pdddpm.inference.export import Outputs
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.network.refiner import Refiner

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402


class Row(NamedTuple):
    """A line of the table: what is predicted, and by which command."""
    title: str
    trainer: str
    samples: bool = False
    """`nnUNetv2_pdddpm_predict` with samples, uncertainty and report; else `nnUNetv2_predict`."""
    flags: tuple[str, ...] = ()
    folds: tuple[int, ...] = (0,)
    cases: int | None = None
    """Number of test cases; None: all."""
    temperature: bool = False
    """One for all probabilities of a stock model, fitted on the validation cases of the fold."""


FOLDS = tuple(range(NUM_FOLDS))
FEW = 3  # cases, where one takes minutes
NOISE = ('-t_start', '1000', '-eta', '1', '-blend', '0')
STOCK, PLAIN = Row('stock', STOCK_TRAINER), Row('PDDDPM, `nnUNetv2_predict`', PDDDPM_TRAINER)
ROWS = (STOCK,
        Row('stock without mirroring', STOCK_TRAINER, flags=('--disable_tta',)),
        Row('stock, temperature', STOCK_TRAINER, temperature=True),
        Row('control: stock trained longer', CONTROL_TRAINER),
        Row('control, temperature', CONTROL_TRAINER, temperature=True),
        Row('no diffusion: second stage', DIRECT_TRAINER, True, ('-steps', '0')),
        Row('no diffusion, cross-entropy alone', DIRECT_CE_TRAINER, True, ('-steps', '0')),
        Row('PDDDPM', PDDDPM_TRAINER, True),
        PLAIN,
        Row('PDDDPM, noise on the truth in every patch', TRUTH_TRAINER, True),
        Row('the same without blending', TRUTH_TRAINER, True, ('-blend', '0')),
        Row(f'stock, {NUM_FOLDS} folds', STOCK_TRAINER, folds=FOLDS),
        Row(f'PDDDPM, {NUM_FOLDS} folds', PDDDPM_TRAINER, True, folds=FOLDS),
        Row('DDPM from pure noise: PDDDPM, 10 steps', PDDDPM_TRAINER, True, (*NOISE, '-steps', '10'), cases=10),
        Row('DDPM from pure noise: PDDDPM, 1000 steps, one sample, no mirroring', PDDDPM_TRAINER, True,
            (*NOISE, '-steps', '1000', '-samples', '1', '--disable_tta'), cases=FEW),
        Row('PDDDPMTrainerPaper, no mirroring', PAPER_TRAINER, True, ('--disable_tta',), cases=FEW))

TRAININGS = ((STOCK, PLAIN), *((Row(f'stock, fold {f}', STOCK_TRAINER, folds=(f,)),
                                Row(f'PDDDPM, fold {f}', PDDDPM_TRAINER, folds=(f,))) for f in FOLDS[1:]))
"""The stock model and PDDDPM by `nnUNetv2_predict`, for each fold."""


def folder(work: Path, row: Row) -> Path:
    """Of its predictions."""
    return work / 'test' / ''.join(c if c.isalnum() else '_' for c in row.title)


def evaluate(work: Path) -> None:
    """Predict, evaluate and time what has not been."""
    for row in (*ROWS, *(row for pair in TRAININGS[1:] for row in pair)):
        if not all((fold_folder(work, row.trainer, f) / 'checkpoint_final.pth').is_file() for f in row.folds):
            continue
        if not (folder(work, row) / 'evaluation.json').is_file():
            predict_and_evaluate(work, row)
        if row in ROWS and not (folder(work, row) / 'cost.json').is_file():
            measure_cost(work, row)


def predict_and_evaluate(work: Path, row: Row) -> None:
    """By the commands."""
    output = folder(work, row)
    command = ['nnUNetv2_predict']
    if row.samples:
        command = ['nnUNetv2_pdddpm_predict', '--uncertainty', '--save_samples', '--report']
    flags = ['-d', DATASET, '-c', CONFIGURATION, '-p', PLANS, '-tr', row.trainer, '-f', *map(str, row.folds), '-device',
             DEVICE, '--save_probabilities', '-npp', '1', '-nps', '1', '--disable_progress_bar', *row.flags]
    call(work, *command, '-i', str(images(work, row.cases)), '-o', str(output), *flags)
    if row.temperature:
        validation = work / f'validation_{row.folds[0]}'
        predictions = output.with_name(f'{output.name}_validation')
        copy_validation_images(work, row.folds[0], validation)
        call(work, *command, '-i', str(validation), '-o', str(predictions), *flags)
        rescale_folder(output, fit_on_folder(predictions, lambda case: labels(work, case)))
        shutil.rmtree(predictions)
    call(work, 'nnUNetv2_pdddpm_evaluate', '-pred', str(output), '-ref',
         str(work / 'nnUNet_raw' / DATASET / 'labelsTs'), '-np', '2', '--disable_progress_bar',
         *(['--chill'] if row.cases else []))


def copy_validation_images(work: Path, fold: int, folder: Path) -> None:
    """Of a fold."""
    splits = json.loads((work / 'nnUNet_preprocessed' / DATASET / 'splits_final.json').read_text())
    folder.mkdir(exist_ok=True)
    for case in splits[fold]['val']:
        shutil.copyfile(work / 'nnUNet_raw' / DATASET / 'imagesTr' / f'{case}_0000.nii.gz',
                        folder / f'{case}_0000.nii.gz')


def labels(work: Path, case: str) -> np.ndarray:
    """(3, Z, Y, X) whether background, anterior and posterior are true."""
    of = sitk.GetArrayFromImage(sitk.ReadImage(str(work / 'nnUNet_raw' / DATASET / 'labelsTr' / f'{case}.nii.gz')))
    return np.stack([of == label for label in range(3)])


def images(work: Path, cases: int | None) -> Path:
    """Folder with the first test images, or all of them."""
    everything = work / 'nnUNet_raw' / DATASET / 'imagesTs'
    if cases is None:
        return everything
    folder = work / f'first_{cases}'
    folder.mkdir(exist_ok=True)
    for file in sorted(everything.iterdir())[:cases]:
        shutil.copyfile(file, folder / file.name)
    return folder


def measure_cost(work: Path, row: Row) -> None:
    """Network calls and CPU seconds of one thread a case, on the first three or, where they take minutes, the first."""
    torch.set_num_threads(1)
    flags = [flag for flag in row.flags if flag != '--disable_tta']
    settings = {name[1:]: float(value) if name in ('-eta', '-blend') else int(value)
                for name, value in zip(flags[::2], flags[1::2], strict=True)}
    common: dict[str, Any] = {'use_mirroring': '--disable_tta' not in row.flags, 'device': torch.device(DEVICE),
                              'allow_tqdm': False}
    predictor = PDDDPMPredictor(**common, overrides={k: (v, v) for k, v in settings.items()},
                                outputs=Outputs('entropy', samples=True)) if row.samples else nnUNetPredictor(**common)
    model = fold_folder(work, row.trainer, row.folds[0]).parent
    predictor.initialize_from_trained_model_folder(str(model), row.folds)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
    network = predictor.network
    for part in (network.presegmenter, network.denoiser) if isinstance(network, Refiner) else (network,):
        part.register_forward_hook(count)
    files = sorted(images(work, 1 if row.cases else 3).iterdir())
    with TemporaryDirectory() as target:
        start = seconds_now()
        predictor.predict_from_files_sequential([[str(file)] for file in files],
                                                [str(Path(target, file.name[:-len('_0000.nii.gz')])) for file in files])
    cost = {'network_calls': calls / len(files), 'cpu_seconds': (seconds_now() - start) / len(files)}
    (folder(work, row) / 'cost.json').write_text(json.dumps(cost))


def coverage(output: Path) -> str:
    """How often the 95 % interval of the volumes holds the true one, and its mean width in true volumes."""
    with open(output / 'evaluation.csv', newline='') as file:
        truth = {(row['case'], row['label']): float(row['reference_volume_ml']) for row in csv.DictReader(file)}
    inside, width = [], []
    for case in json.loads((output / 'pdddpm_summary.json').read_text())['cases']:
        for label, row in case['labels'].items():
            low, high = row['volume_ml_low'], row['volume_ml_high']
            inside.append(low <= truth[case['case'], label] <= high)
            width.append((high - low) / truth[case['case'], label])
    return f'{sum(inside)} of {len(inside)}, {np.mean(width):.0%} wide'


Values = Callable[[dict[str, Any]], float]


def dice(case: dict[str, Any]) -> float:
    """Mean over labels."""
    return float(case['dice'])


def nll(case: dict[str, Any]) -> float:
    """Over all voxels."""
    return float(case['voxelwise']['all']['nll'])


def evaluation(work: Path, row: Row) -> dict[str, Any]:
    """What `nnUNetv2_pdddpm_evaluate` wrote."""
    content: dict[str, Any] = json.loads((folder(work, row) / 'evaluation.json').read_text())
    return content


def differences(result: dict[str, Any], baseline: dict[str, Any], values: Values) -> np.ndarray:
    """Paired differences to a baseline in what `values` takes from a case: (cases,)."""
    of_baseline = {case['case']: values(case) for case in baseline['cases']}
    return np.array([values(case) - of_baseline[case['case']] for case in result['cases']])


def difference(result: dict[str, Any], baseline: dict[str, Any], values: Values) -> tuple[float, float, float]:
    """Mean paired difference to a baseline, and its 95 % bootstrap interval over cases."""
    return mean_and_interval(differences(result, baseline, values)[None])


def interval(values: tuple[float, float, float]) -> str:
    """A difference with its interval."""
    return '{:+.4f} ({:+.4f} to {:+.4f})'.format(*values)


def table_row(work: Path, row: Row, stock: dict[str, Any]) -> str:
    """One line of markdown; differences are paired, with a bootstrap interval over cases."""
    output = folder(work, row)
    result, cost = evaluation(work, row), json.loads((output / 'cost.json').read_text())
    mean, voxels = result['foreground_mean'], result['voxelwise']
    sd = np.std([case['dice'] for case in result['cases']], ddof=1)
    correlation = result['estimated_dice'].get('case', {}).get('spearman')
    few = f' ({row.cases} cases)' if row.cases else ''
    return (f'| {row.title}{few} | {mean["dice"]:.4f} ± {sd:.4f} | {interval(difference(result, stock, dice))} '
            f'| {mean["hd95_mm"]:.2f} | {mean["surface_dice"]:.3f} | {voxels["all"]["nll"]:.4f} '
            f'| {interval(difference(result, stock, nll))} | {voxels["all"]["ece"]:.4f} '
            f'| {voxels["near"]["ece"]:.4f} | {voxels["all"]["aurc"]:.5f} '
            f'| {"" if correlation is None or row.cases else f"{correlation:.2f}"} '
            f'| {coverage(output) if row.samples and not row.cases else ""} | {cost["network_calls"]:.0f} '
            f'| {cost["cpu_seconds"]:.1f} |')


def trainings_table(work: Path) -> list[str]:
    """Stock against PDDDPM for every fold that has both, and all of them together."""
    pairs = [pair for pair in TRAININGS if all((folder(work, row) / 'evaluation.json').is_file() for row in pair)]
    if len(pairs) < 2:
        return []
    lines = [f'## {len(pairs)} trainings', '',
             'The models of the folds on the same test cases, by `nnUNetv2_predict`; the last line draws cases and '
             'trainings, which are few to draw from.', '',
             '| fold | stock, Dice | PDDDPM | Δ | stock, NLL | PDDDPM | Δ |\n|' + '---|' * 7]
    found: dict[Values, list[np.ndarray]] = {dice: [], nll: []}
    for stock, refined in pairs:
        results, cells = [evaluation(work, row) for row in (stock, refined)], []
        for values, of in found.items():
            of.append(differences(results[1], results[0], values))
            means = ' | '.join(f'{np.mean([values(case) for case in result["cases"]]):.4f}' for result in results)
            cells.append(f'{means} | {interval(mean_and_interval(of[-1][None]))}')
        lines.append(f'| {stock.folds[0]} | {" | ".join(cells)} |')
    together = [interval(mean_and_interval(np.stack(of))) for of in found.values()]
    return [*lines, f'| all | | | {together[0]} | | | {together[1]} |', '']


def draw_triage(work: Path, file: Path) -> None:
    """Estimated against true Dice, a dot a case."""
    cases = evaluation(work, next(row for row in ROWS if row.title == 'PDDDPM'))['cases']
    figure, axis = plt.subplots(figsize=(4.5, 4))
    axis.plot([case['estimated_dice'] for case in cases], [case['dice'] for case in cases], 'o', ms=4)
    axis.set(xlabel='estimated Dice', ylabel='true Dice')
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def write_table(work: Path, file: Path) -> None:
    """The markdown table, and what the sampling settings were tuned to."""
    rows = [row for row in ROWS if (folder(work, row) / 'evaluation.json').is_file()]
    stock = evaluation(work, STOCK)
    plans = json.loads((work / 'nnUNet_preprocessed' / DATASET / f'{PLANS}.json').read_text())
    plans = plans['configurations'][CONFIGURATION]
    lacking = [row.title for row in ROWS if row not in rows]
    sweeps = {(trainer, fold): fold_folder(work, trainer, fold) / 'sampling_sweep.json'
              for trainer, fold in ((PDDDPM_TRAINER, 0), (PDDDPM_TRAINER, 1), (PDDDPM_TRAINER, 2), (TRUTH_TRAINER, 0))}
    tuned = [f'- `{trainer}`, fold {fold}: {json.loads(file.read_text())["in_one_line"]}'
             for (trainer, fold), file in sweeps.items() if file.is_file()]
    lines = [
        '# Hippocampus: stock nnU-Net, its controls, and PDDDPM', '',
        '    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/hippocampus.py -o WORK', '',
        f'Machine: {machine()}. Data: Medical '
        f'Segmentation Decathlon Task04; {stock["num_cases"]} test cases split off first (seed {SPLIT_SEED}), the '
        'others in 3 folds. Fold 0 unless the row says otherwise: differences of about 0.002 in Dice are within the '
        'noise of training.', '',
        f'{PLANS_IN_WORDS}: patch {plans["patch_size"]}, {plans["architecture"]["arch_kwargs"]["features_per_stage"]} '
        f'features, batch {plans["batch_size"]}; training in {AUTOCAST}, 250 iterations an epoch. Stock: '
        f'{nnUNetTrainerBenchmark.epochs} epochs, every fold. PDDDPM: {PDDDPMTrainerBenchmark.epochs} epochs, warm '
        f'start, out-of-fold pre-segmentations. Control: the stock model of fold 0 trained for '
        f'{nnUNetTrainerBenchmarkLonger.epochs} epochs more. No diffusion: a second network of the same size, warm '
        'start and training, which only ever sees the pre-segmentation (out-of-fold) without noise; cross-entropy '
        "alone: with the loss that the denoiser has at noise levels, nnU-Net's without its Dice part. Temperature: one "
        'number T for the probabilities of the model, softmax(log p / T), with the lowest NLL on the validation cases '
        'of the fold (Guo et al. 2017, arXiv 1706.04599).', '',
        'Settings of PDDDPM by `nnUNetv2_pdddpm_tune` on validation cases of the fold, none of which is here (a budget '
        f'of {TUNING_MINUTES[0]} minutes in fold 0, of {TUNING_MINUTES[1]} in the others):', '', *tuned, '',
        'Figure of the first: [sampling_sweep.png](sampling_sweep.png).', '',
        *([f'**Not run, and so not in the table: {"; ".join(lacking)}.**', ''] if lacking else []),
        f'## {stock["num_cases"]} test cases', '',
        'By `nnUNetv2_predict` and `nnUNetv2_pdddpm_predict` with mirroring, mean over labels, and '
        '`nnUNetv2_pdddpm_evaluate`. Δ: paired difference to `stock` with its 95 % bootstrap interval over cases. '
        'Surface Dice at 1 mm. NLL and ECE over all voxels, ECE also near the reference; AURC: lower is better; ρ: '
        'Spearman correlation of estimated with true Dice over cases; interval: of the volumes, calibrated with the '
        'tuning, and for the second stage, which is not tuned, the quantiles of 8 thresholds. Network '
        f'calls and {SECONDS} (one thread, reading and writing included) for a case: the mean of three cases, or one '
        'where the row has few.', '',
        '| | Dice ± sd over cases | Δ Dice | HD95 mm | surface Dice | NLL | Δ NLL | ECE | ECE near | AURC | ρ | '
        f'true volume in the interval | network calls | {SECONDS} |',
        '|' + '---|' * 14,
        *(table_row(work, row, stock) for row in rows), '',
    ]
    lines += ['![Estimated against true Dice](triage.png)', '',
              'A dot a case of the row PDDDPM.', '',
              *trainings_table(work)]
    draw_triage(work, file.with_name('triage.png'))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines))
