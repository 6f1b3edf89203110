"""The demo's table and picture."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.inference.intervals import in_percent

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402


def mean_dice(truth: Path, predictions: Path, labels: dict[str, int]) -> dict[str, float]:
    """Dice per label name and their `mean`, averaged over cases, by nnU-Net's evaluator.

    Args:
        truth: folder of label maps; `predictions` holds one of the same name for each.
        predictions: folder of predicted label maps.
        labels: name to value of the labels to score.
    """
    metrics = compute_metrics_on_folder(str(truth), str(predictions), str(predictions / 'summary.json'), SimpleITKIO(),
                                        '.nii.gz', list(labels.values()), num_processes=1)
    dice = {name: float(metrics['mean'][label]['Dice']) for name, label in labels.items()}
    return {**dice, 'mean': float(np.mean(list(dice.values())))}


def format_table(summary: dict[str, Any]) -> str:
    """The table that the demo prints, from what it writes into summary.json."""
    labels = list(summary['dice']['stock'])
    lines = ['Dice on held-out cases'.ljust(24) + ''.join(label.rjust(9) for label in labels) + 's/case'.rjust(9)]
    for name, title in (('stock', 'stock nnU-Net'), ('pdddpm', 'PDDDPM'), ('samples', 'the same, 8 samples')):
        lines.append(title.ljust(24) + ''.join(f'{summary["dice"][name][label]:9.4f}' for label in labels)
                     + f'{summary["seconds_per_case"][name]:9.1f}')
    return '\n'.join([*lines, f'{summary["cases"]} cases; seconds include starting the program and file I/O'])


def volume_lines(predictions: Path, truth: Path, labels: dict[str, int]) -> list[str]:
    """One line for every case and label: volume with its calibrated interval, the range of the samples, and the true
    volume; then how many of the true volumes lie in them.

    Args:
        predictions: output folder of `nnUNetv2_pdddpm_predict`.
        truth: folder of label maps of the same names.
        labels: name to value of the labels.
    """
    cases = json.loads((predictions / SUMMARY).read_text())['cases']
    number = cases[0]['num_samples']
    header = f'range of {number} samples'
    lines = [f'{"Volume in ml":<24}{"mask":>8}   {"calibrated interval":<24}{header:<22}{"true":>8}']
    inside: dict[str, list[bool]] = {'calibrated intervals': [], f'ranges of {number} samples': []}
    for case in cases:
        image = sitk.ReadImage(str(truth / f'{case["case"]}.nii.gz'))
        voxel_ml = float(np.prod(image.GetSpacing())) / 1000
        for name, value in labels.items():
            row = case['labels'][name]
            true = (sitk.GetArrayFromImage(image) == value).sum() * voxel_ml
            texts = []
            for found, level, low, high in zip(inside.values(), (row['interval_level'], None),
                                               (row['volume_ml_low'], row['samples_low_ml']),
                                               (row['volume_ml_high'], row['samples_high_ml']), strict=True):
                known = low is not None
                found += [low <= true <= high] if known else []
                promised = '' if level is None else f'{in_percent(level)}: '
                texts.append(f'{promised}{low:.2f} to {high:.2f}' if known else 'none')
            lines.append(f'{case["case"]:<16}{name:<8}{row["volume_ml"]:8.2f}   {texts[0]:<24}{texts[1]:<22}'
                         f'{true:8.2f}')
    counts = [f'{sum(found)} of {len(found)} {name}' for name, found in inside.items() if found]
    return [*lines, f'The true volume is in {", and in ".join(counts)}.']


def dice_of_cases(predictions: Path) -> dict[str, float]:
    """Case -> Dice, mean over the labels, as `mean_dice` has left it in the folder's summary.json."""
    cases = json.loads((predictions / 'summary.json').read_text())['metric_per_case']
    return {Path(case['reference_file']).name[:-len('.nii.gz')]:
            float(np.mean([metrics['Dice'] for metrics in case['metrics'].values()])) for case in cases}


def draw_figure(raw: Path, predictions: Path, file: Path, num_cases: int = 3) -> None:
    """PNG with a row a case, from the worst to the best: outlines of truth and stock mask, of truth and this package's
    mask, and of the samples, on the image; and the entropy.

    Args:
        raw: raw data set with imagesTs and labelsTs.
        predictions: folder with `stock` and, by `nnUNetv2_pdddpm_predict`, `samples` with samples and uncertainty maps,
            both evaluated by `mean_dice`.
        file: the PNG to write.
        num_cases: rows; with more than one the worst and the best are among them.
    """
    dice = {name: dice_of_cases(predictions / name) for name in ('stock', 'samples')}
    order = sorted(dice['samples'], key=lambda case: dice['samples'][case])
    cases = [order[round(i)] for i in np.linspace(0, len(order) - 1, num_cases)]
    figure, axes = plt.subplots(len(cases), 4, figsize=(11, 3 * len(cases)), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        def read(path: Path) -> np.ndarray:
            return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        truth = read(raw / 'labelsTs' / f'{case}.nii.gz')
        z = int(np.argmax((truth > 1).sum((1, 2))))
        image = read(raw / 'imagesTs' / f'{case}_0000.nii.gz')[z]
        for axis in row:
            axis.imshow(image, cmap='gray')
            axis.set(xticks=[], yticks=[])
        for axis, (name, title) in zip(row, (('stock', 'stock nnU-Net'), ('samples', 'PDDDPM')), strict=False):
            _outline(axis, truth[z], 'C2', 1.5)
            _outline(axis, read(predictions / name / f'{case}.nii.gz')[z], 'C1', 1.5)
            axis.set_title(f'{title} (orange), truth (green)', fontsize=9)
            axis.set_xlabel(f'Dice {dice[name][case]:.3f}', fontsize=9)
        samples = sorted((predictions / 'samples' / 'samples').glob(f'{case}_s*.nii.gz'))
        for sample in samples:
            _outline(row[2], read(sample)[z], 'C0', 0.6)
        row[2].set_title(f'{len(samples)} samples', fontsize=9)
        entropy = read(predictions / 'samples' / 'uncertainty' / f'{case}_uncertainty.nii.gz')[z]
        row[3].imshow(np.ma.masked_less(entropy, 0.05), cmap='magma', vmin=0, vmax=1, alpha=0.8)
        row[3].set_title('uncertainty (entropy)', fontsize=9)
        row[0].set_ylabel(case, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _outline(axis: Any, labels: np.ndarray, colour: str, width: float) -> None:
    """Outlines of each label together with all above it, where a slice has both."""
    for label in range(1, int(labels.max()) + 1):
        axis.contour(labels >= label, [0.5], colors=colour, linewidths=width)
