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

from nnunet_pdddpm.file_names import SAMPLES, SUMMARY, UNCERTAINTY
from nnunet_pdddpm.inference.quality import mask_dice
from nnunet_pdddpm.texts import in_percent

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

TRUTH, MASK, SAMPLE = '#4be38a', '#ff8c42', '#4cc9ff'
ROWS = {'stock': 'stock nnU-Net', 'longer': 'stock trained longer', 'pdddpm': 'PDDDPM',
        'samples': 'the same, {samples} samples'}
"""Of the table, in their order."""


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


def num_samples(predictions: Path) -> int:
    """Samples of each case in an output folder of `nnUNetv2_pdddpm_predict`."""
    return int(json.loads((predictions / SUMMARY).read_text())['cases'][0]['num_samples'])


def format_table(summary: dict[str, Any], samples: int) -> str:
    """The table that the demo prints; a row for each of `ROWS` that is there.

    Args:
        summary: what the demo writes into summary.json.
        samples: number of samples of a case, for the title of the last row.
    """
    labels = list(summary['dice']['stock'])
    lines = ['Dice on held-out cases'.ljust(24) + ''.join(label.rjust(9) for label in labels) + 's/case'.rjust(9)]
    for name, title in ((name, title) for name, title in ROWS.items() if name in summary['dice']):
        lines.append(title.format(samples=samples).ljust(24)
                     + ''.join(f'{summary["dice"][name][label]:9.4f}' for label in labels)
                     + f'{summary["seconds_per_case"][name]:9.1f}')
    lines.append(f'{summary["cases"]} cases; seconds include starting the program and file I/O')
    if 'longer' not in summary['dice']:
        lines.append('PDDDPM continues from the stock model for as long again: --control trains stock as long as both.')
    return '\n'.join(lines)


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
        true_labels, voxel_ml = _read(truth / f'{case["case"]}.nii.gz')
        for name, value in labels.items():
            row = case['labels'][name]
            true = (true_labels == value).sum() * voxel_ml
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


def draw_figure(raw: Path, predictions: Path, file: Path, labels: dict[str, int], num_cases: int = 3) -> None:
    """PNG with a row a case, from the worst to the best: outlines of truth and stock mask, of truth and this package's
    mask, and of the samples, on the image; and the entropy. Under each stand Dice and volumes of the whole case.

    Args:
        raw: raw data set with imagesTs and labelsTs.
        predictions: folder with `stock` and, by `nnUNetv2_pdddpm_predict`, `samples` with samples and uncertainty maps,
            both evaluated by `mean_dice`.
        file: the PNG to write.
        labels: name to value of the labels that were scored.
        num_cases: rows; with more than one the worst and the best are among them.
    """
    dice = {name: dice_of_cases(predictions / name) for name in ('stock', 'samples')}
    order = sorted(dice['samples'], key=lambda case: dice['samples'][case])
    cases = [order[round(i)] for i in np.linspace(0, len(order) - 1, num_cases)]
    figure, axes = plt.subplots(len(cases), 4, figsize=(12, 3.6 * len(cases)), squeeze=False, layout='constrained')
    for row, case in zip(axes, cases, strict=True):
        _draw_case(row, raw, predictions, case, labels, {name: values[case] for name, values in dice.items()})
        which = {0: ' (worst)', len(order) - 1: ' (best)'}.get(order.index(case), '')
        row[0].set_ylabel(f'{case}{which}', fontsize=9)
    figure.colorbar(row[3].images[-1], ax=axes[:, 3], shrink=0.5, label='uncertainty (entropy), 0 to 1')
    lines = [Line2D([], [], color=colour, linewidth=width, label=name) for name, colour, width in
             (('truth', TRUTH, 2), ('mask', MASK, 1.5), ('samples', SAMPLE, 0.8))]
    figure.legend(handles=lines, loc='outside upper center', ncols=3, fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw_case(row: Any, raw: Path, predictions: Path, case: str, labels: dict[str, int], dice: dict[str, float]
               ) -> None:
    """One row of the picture, in the axial slice with most of the highest label."""
    truth, voxel_ml = _read(raw / 'labelsTs' / f'{case}.nii.gz')
    z = int(np.argmax((truth == max(labels.values())).sum((1, 2))))
    masks = {name: _read(predictions / name / f'{case}.nii.gz')[0] for name in dice}
    samples = [_read(file)[0] for file in sorted((predictions / 'samples' / SAMPLES).glob(f'{case}_s*.nii.gz'))]
    true = {name: (truth == value).sum() * voxel_ml for name, value in labels.items()}

    image = _read(raw / 'imagesTs' / f'{case}_0000.nii.gz')[0][z]
    for axis in row:
        axis.imshow(image, cmap='gray')
        axis.set(xticks=[], yticks=[])
    for axis, (name, title) in zip(row, (('stock', 'stock nnU-Net'), ('samples', 'PDDDPM')), strict=False):
        outline(axis, truth[z], TRUTH, 2)
        outline(axis, masks[name][z], MASK, 1.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('\n'.join([f'Dice {dice[name]:.3f}', *(
            f'{label} {(masks[name] == value).sum() * voxel_ml:.2f} ml, true {true[label]:.2f}'
            for label, value in labels.items())]), fontsize=9)
    for sample in samples:
        outline(row[2], sample[z], SAMPLE, 0.8)
    outline(row[2], truth[z], TRUTH, 1)
    row[2].set_title(f'{len(samples)} samples', fontsize=10)
    volumes = {label: [(sample == value).sum() * voxel_ml for sample in samples] for label, value in labels.items()}
    dice_of_samples = [np.mean([mask_dice(sample == value, truth == value) for value in labels.values()])
                       for sample in samples]
    row[2].set_xlabel('\n'.join([f'Dice {min(dice_of_samples):.3f} to {max(dice_of_samples):.3f}', *(
        f'{label} {min(ml):.2f} to {max(ml):.2f} ml, true {true[label]:.2f}' for label, ml in volumes.items() if ml)]),
        fontsize=9)
    entropy = _read(predictions / 'samples' / UNCERTAINTY / f'{case}_{UNCERTAINTY}.nii.gz')[0][z]
    row[3].imshow(np.ma.masked_less(entropy, 0.05), cmap='magma', vmin=0, vmax=1, alpha=0.8)
    row[3].set_title('uncertainty', fontsize=10)


def _read(file: Path) -> tuple[np.ndarray, float]:
    """Voxels (z, y, x) of an image, and the volume of one in ml."""
    image = sitk.ReadImage(str(file))
    return sitk.GetArrayFromImage(image), float(np.prod(image.GetSpacing())) / 1000


def outline(axis: Any, labels: np.ndarray, colour: str, width: float) -> None:
    """Outlines of each label together with all above it, where a slice has both."""
    for label in range(1, int(labels.max()) + 1):
        axis.contour(labels >= label, [0.5], colors=colour, linewidths=width)
