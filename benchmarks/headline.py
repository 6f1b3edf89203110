"""The picture of the README: what `nnUNetv2_pdddpm_predict` says of the first test case of `hippocampus.py`."""
from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import SimpleITK as sitk
from hippocampus import CONFIGURATION, DATASET, PDDDPM_TRAINER, PLANS, call

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402


def predict(work: Path, fold: int) -> tuple[Path, str]:
    """Folder of the prediction of the first test case, and its name."""
    raw, output = work / 'nnUNet_raw' / DATASET, work / 'headline'
    case = sorted((raw / 'labelsTs').glob('*.nii.gz'))[0].name[:-len('.nii.gz')]
    images = output / 'images'
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(raw / 'imagesTs' / f'{case}_0000.nii.gz', images / f'{case}_0000.nii.gz')
    call(work, 'nnUNetv2_pdddpm_predict', '-i', str(images), '-o', str(output), '-d', DATASET, '-c', CONFIGURATION,
         '-tr', PDDDPM_TRAINER, '-p', PLANS, '-f', str(fold), '-device', 'cpu', '-npp', '1', '-nps', '1',
         '--save_samples', '--uncertainty', '--save_presegmentation', '--disable_progress_bar')
    return output, case


def read(file: Path) -> np.ndarray:
    """(Z, Y, X)"""
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def draw(work: Path, output: Path, case: str, file: Path) -> None:
    """Three views of the slice with the most foreground, and the volumes of the labels."""
    image = read(output / 'images' / f'{case}_0000.nii.gz').astype(float)
    truth = read(work / 'nnUNet_raw' / DATASET / 'labelsTs' / f'{case}.nii.gz')
    stock = read(next(output.glob(f'presegmentation/{case}*.nii.gz')))
    samples = [read(of) for of in sorted((output / 'samples').glob(f'{case}_s*.nii.gz'))]
    entropy = read(output / 'uncertainty' / f'{case}_uncertainty.nii.gz')
    row = next(row for row in json.loads((output / 'pdddpm_summary.json').read_text())['cases'] if row['case'] == case)
    z = int((truth > 0).sum((1, 2)).argmax())
    figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), width_ratios=(1, 1, 1, 1.25))
    for axis in axes[:3]:
        axis.imshow(image[z], cmap='gray')
        axis.set(xticks=[], yticks=[])
    axes[0].contour(stock[z] > 0, [0.5], colors='C1', linewidths=1.5)
    axes[0].contour(truth[z] > 0, [0.5], colors='C2', linewidths=1.5)
    axes[0].set_title('stock nnU-Net (orange), truth (green)', fontsize=9)
    for sample in samples:
        axes[1].contour(sample[z] > 0, [0.5], colors='C0', linewidths=0.7)
    axes[1].set_title(f'{len(samples)} samples', fontsize=9)
    axes[2].imshow(np.ma.masked_less(entropy[z], 0.05), cmap='magma', vmin=0, vmax=1, alpha=0.8)
    axes[2].set_title('uncertainty (entropy)', fontsize=9)
    labels = json.loads((work / 'nnUNet_raw' / DATASET / 'dataset.json').read_text())['labels']
    spacing = np.prod(sitk.ReadImage(str(output / 'images' / f'{case}_0000.nii.gz')).GetSpacing()) / 1000
    for y, (name, of) in enumerate(row['labels'].items()):
        axes[3].plot([of['volume_ml_low'], of['volume_ml_high']], [y, y], color='C0', linewidth=6, alpha=0.4,
                     label=f'interval, {100 * of["interval_level"]:.0f} %' if y == 0 else None)
        axes[3].plot(of['volume_ml'], y, 'o', color='C0', label='mask' if y == 0 else None)
        axes[3].plot((truth == labels[name]).sum() * spacing, y, '|', color='C2', markersize=22, markeredgewidth=2.5,
                     label='truth' if y == 0 else None)
    axes[3].set(yticks=range(len(row['labels'])), yticklabels=row['labels'], ylim=(-0.6, len(row['labels']) + 0.3),
                xlabel='volume in ml')
    axes[3].legend(fontsize=8, ncols=3, loc='upper center', frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work', type=Path, help='work folder of hippocampus.py')
    parser.add_argument('-fold', type=int, default=0, help='training (default 0)')
    parser.add_argument('-o', type=Path, default=Path(__file__).parent.parent / 'docs' / 'results' / 'headline.png')
    args = parser.parse_args()
    draw(args.work.resolve(), *predict(args.work.resolve(), args.fold), args.o)


if __name__ == '__main__':
    main()
