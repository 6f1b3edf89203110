"""Figures: `headline`, the README's picture; `levels`, the tables of noise levels in trained models."""
from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from datasets.hippocampus import HIPPOCAMPUS, names
from datasets.phantom import PHANTOM
from machine import PLANS
from nnunet import NUM_FOLDS

from nnunet_pdddpm.demo.report import outline
from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.inference.intervals import in_percent

STAGES = ('draw',)


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Folders of the trained models."""
    parser.add_argument('-hippocampus', type=Path, required=True, help='work folder of hippocampus')
    if name == 'levels':
        parser.add_argument('-phantom', type=Path, required=True, help='work folder of phantom')


def run(name: str, args: argparse.Namespace) -> None:
    """The figure."""
    import matplotlib
    matplotlib.use('agg')
    if name == 'levels':
        levels(args.hippocampus.resolve(), args.phantom.resolve(), args.page)
    else:
        headline(args.hippocampus.resolve(), args.folds[0], Path(args.o).resolve(), args.page)


def levels(hippocampus: Path, phantom: Path, file: Path) -> None:
    """Share of uncertainty over log SNR."""
    from matplotlib import pyplot as plt

    from nnunet_pdddpm.network.state import stored_table
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for number, (of, work) in enumerate(((HIPPOCAMPUS, hippocampus), (PHANTOM.dataset, phantom))):
        for fold in range(NUM_FOLDS):
            table = stored_table(of.weights(work, 'denoiser', fold))
            axis.plot(table.log_snr, table.share, color=f'C{number}', linewidth=1,
                      label=f'{of.name}, {NUM_FOLDS} trainings' if fold == 0 else None)
    axis.set(xlabel='log SNR', ylabel='share of uncertainty u that is left')
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def headline(work: Path, fold: int, output: Path, file: Path) -> None:
    """What `nnUNetv2_pdddpm_predict` says of the first test case: three views of the slice with the most foreground,
    and the volumes of the labels."""
    case, raw, images = names(work)[0], HIPPOCAMPUS.raw(work), output / 'images'
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(raw / 'imagesTs' / f'{case}_0000.nii.gz', images / f'{case}_0000.nii.gz')
    HIPPOCAMPUS.call(work, 'nnUNetv2_pdddpm_predict', '-i', str(images), '-o', str(output), '-d', HIPPOCAMPUS.title,
                     '-c', HIPPOCAMPUS.configuration, '-tr', HIPPOCAMPUS.trainer('denoiser'), '-p', PLANS, '-f',
                     str(fold), '-device', 'cpu', '-npp', '1', '-nps', '1', '--save_samples', '--uncertainty',
                     '--save_presegmentation', '--disable_progress_bar')
    draw_views(raw, output, case, file)


def read(file: Path) -> np.ndarray:
    """(Z, Y, X)"""
    import SimpleITK as sitk
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def bounds(places: np.ndarray, size: int) -> tuple[float, float]:
    """From the first to the last of them, with a margin of up to eight voxels."""
    return max(places.min() - 8.5, -0.5), min(places.max() + 8.5, size - 0.5)


def draw_views(raw: Path, output: Path, case: str, file: Path) -> None:
    """The figure of a prediction."""
    from matplotlib import pyplot as plt
    image = read(raw / 'imagesTs' / f'{case}_0000.nii.gz').astype(float)
    truth, stock = read(raw / 'labelsTs' / f'{case}.nii.gz'), read(next(output.glob(f'presegmentation/{case}*.nii.gz')))
    samples = [read(of) for of in sorted((output / 'samples').glob(f'{case}_s*.nii.gz'))]
    entropy = read(output / 'uncertainty' / f'{case}_uncertainty.nii.gz')
    z = int((truth > 0).sum((1, 2)).argmax())
    (top, bottom), (left, right) = (bounds(places, size) for places, size in zip(
        np.nonzero(np.any([truth, *samples], 0)[z]), truth[z].shape, strict=True))
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), width_ratios=(1, 1, 1, 1.3))
    for axis in axes[:3]:
        axis.imshow(image[z], cmap='gray')
        axis.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
    outline(axes[0], stock[z], 'C1', 1.5)
    outline(axes[0], truth[z], 'C2', 1.5)
    axes[0].set_title('stock nnU-Net (orange), truth (green)', fontsize=9)
    for sample in samples:
        outline(axes[1], sample[z], 'C0', 0.7)
    axes[1].set_title(f'{len(samples)} samples', fontsize=9)
    axes[2].imshow(np.ma.masked_less(entropy[z], 0.05), cmap='magma', vmin=0, vmax=1, alpha=0.8)
    axes[2].set_title('uncertainty (entropy)', fontsize=9)
    row = next(row for row in json.loads((output / SUMMARY).read_text())['cases'] if row['case'] == case)
    labels = json.loads((raw / 'dataset.json').read_text())['labels']
    for y, (name, of) in enumerate(row['labels'].items()):
        axes[3].plot([of['volume_ml_low'], of['volume_ml_high']], [y, y], color='C0', linewidth=6, alpha=0.4,
                     solid_capstyle='butt', label=f'interval, {in_percent(of["interval_level"])}' if y == 0 else None)
        axes[3].plot(of['volume_ml'], y, 'o', color='C0', label='mask' if y == 0 else None)
        axes[3].plot((truth == labels[name]).sum() / 1000, y, '|', color='C2', markersize=22, markeredgewidth=2.5,
                     label='truth' if y == 0 else None)
    axes[3].set(yticks=range(len(row['labels'])), yticklabels=row['labels'], ylim=(-0.6, len(row['labels']) - 0.4),
                xlabel='volume in ml')
    axes[3].set_xlim(0, 1.05 * axes[3].get_xlim()[1])
    axes[3].legend(fontsize=8, ncols=3, loc='lower center', bbox_to_anchor=(0.45, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
