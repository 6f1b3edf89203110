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
    cases = json.loads((predictions / 'pdddpm_summary.json').read_text())['cases']
    number = cases[0]['num_samples']
    of_samples = f'range of {number} samples'
    lines = [f'{"Volume in ml":<24}{"mask":>8}   {"calibrated interval":<24}{of_samples:<22}{"true":>8}']
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
                of = '' if level is None else f'{in_percent(level)}: '
                texts.append(f'{of}{low:.2f} to {high:.2f}' if known else 'none')
            lines.append(f'{case["case"]:<16}{name:<8}{row["volume_ml"]:8.2f}   {texts[0]:<24}{texts[1]:<22}'
                         f'{true:8.2f}')
    counts = [f'{sum(found)} of {len(found)} {name}' for name, found in inside.items() if found]
    return [*lines, f'The true volume is in {", and in ".join(counts)}.']


def draw_figure(raw: Path, predictions: Path, file: Path, num_cases: int = 3) -> None:
    """PNG with image, truth, stock mask, PDDDPM's mask and uncertainty side by side, one row a case.

    Args:
        raw: raw data set with imagesTs and labelsTs.
        predictions: folder with `stock`, `pdddpm`, and `samples` with uncertainty maps.
        file: the PNG to write.
        num_cases: rows.
    """
    cases = sorted(p.name[:-len('.nii.gz')] for p in (raw / 'labelsTs').glob('*.nii.gz'))[:num_cases]
    titles = ['image', 'truth', 'stock nnU-Net', 'PDDDPM', 'uncertainty']
    figure, axes = plt.subplots(len(cases), len(titles), figsize=(2.6 * len(titles), 2.9 * len(cases)), squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        image, truth, stock, pdddpm = (sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in (
            raw / 'imagesTs' / f'{case}_0000.nii.gz', raw / 'labelsTs' / f'{case}.nii.gz',
            predictions / 'stock' / f'{case}.nii.gz', predictions / 'pdddpm' / f'{case}.nii.gz'))
        uncertainty = sitk.GetArrayFromImage(sitk.ReadImage(
            str(predictions / 'samples' / 'uncertainty' / f'{case}_uncertainty.nii.gz')))
        z = int(np.argmax((truth == 2).sum((1, 2))))
        row[0].imshow(image[z], cmap='gray')
        row[0].set_ylabel(case)
        for axis, mask in zip(row[1:4], (truth, stock, pdddpm), strict=True):
            axis.imshow(mask[z], vmin=0, vmax=2, cmap='viridis', interpolation='nearest')
        row[4].imshow(uncertainty[z], vmin=0, vmax=1, cmap='magma')
        for axis in row:
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
