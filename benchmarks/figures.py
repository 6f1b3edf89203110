"""Figures: `headline`, the README's picture; `levels`, the tables of noise levels in trained models; `differences`,
what this package gains or loses, from the pages of results, whose forest plots it draws anew."""
from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets.hippocampus import HIPPOCAMPUS, names
from datasets.phantom import PHANTOM
from datasets.raters import RATER_SETS
from image_page import CALIBRATED_CONTROL
from machine import PLANS, results
from matplotlib.figure import Figure
from nnunet import NUM_FOLDS
from page import draw_intervals, forest, interval, read_column
from statistics_of_trainings import Interval

from nnunet_pdddpm.demo.report import outline
from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.texts import in_percent

STAGES = ('draw',)
CHAIN, BLIND = 'PDDDPM, start 0.8, 2 steps, copula of objects', 'PDDDPM, blind mask, thresholds'
TUNED = 'PDDDPM as tuned, with mirroring'
MIRRORED = 'second network, cross-entropy alone, one temperature, copula of objects, with mirroring'
BY_OBJECT, FRESH = 'start 0.8, 2 steps, drawn an object at a time', 'fresh images'
UNTUNED = 'start 0.6, 1 step, drawn as one'
IDEAL = 'exact samples'
HIGHER = ('Dice', 'F1 of objects', 'one of the shapes')
"""Columns in which higher is better."""


class Place(NamedTuple):
    """Of a difference: page, row and column; the base, if it is not the table's; words of the section and of the
    difference's column."""
    page: str
    row: str
    column: str
    base: str | None = None
    section: str = ''
    delta: str = 'Δ'


DIFFERENCES = {
    'mask, hippocampus: Dice': Place('hippocampus', 'PDDDPM, blind mask', 'Dice'),
    **{f'mask, {name}: Dice': Place(name, BLIND, 'Dice') for name in RATER_SETS},
    **{f'mask, {name}: F1 of objects': Place(name, BLIND, 'F1 of objects') for name in RATER_SETS},
    'probabilities, hippocampus: NLL': Place('hippocampus', 'PDDDPM, blind mask', 'NLL'),
    **{f'probabilities, {name}: NLL': Place(name, BLIND, 'NLL', CALIBRATED_CONTROL, delta=f'Δ to {CALIBRATED_CONTROL}')
       for name in RATER_SETS},
    **{f'the same to the second network, {name}: NLL': Place(name, BLIND, 'NLL') for name in RATER_SETS},
    'mean of 8 chains as the mask, hippocampus: Dice': Place(
        'hippocampus', 'PDDDPM, mean of 8 samples (start 0.8, 2 steps)', 'Dice'),
    'chains, fresh phantoms: GED²': Place('phantom', BY_OBJECT, 'GED²', section=FRESH),
    'chains, fresh phantoms: objects of a true shape': Place('phantom', BY_OBJECT, 'one of the shapes', section=FRESH),
    'chains before tuning, fresh phantoms: GED²': Place('phantom', UNTUNED, 'GED²', section=FRESH),
    'chains before tuning, fresh phantoms: objects of a true shape': Place(
        'phantom', UNTUNED, 'one of the shapes', section=FRESH),
    **{f'chains, {name}: GED²': Place(name, CHAIN, 'GED²') for name in RATER_SETS},
    **{f'samples as tuned, {name}: GED²': Place(name, TUNED, 'GED²', MIRRORED) for name in RATER_SETS},
    'map of chains, fresh phantoms: NLL': Place('phantom', BY_OBJECT, 'NLL', section=FRESH),
    **{f'map of chains, {name}: NLL': Place(name, CHAIN, 'NLL') for name in RATER_SETS}}
"""What is compared -> where it stands."""


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Folders of the trained models."""
    if name != 'differences':
        parser.add_argument('-hippocampus', type=Path, required=True, help='work folder of hippocampus')
    if name == 'levels':
        parser.add_argument('-phantom', type=Path, required=True, help='work folder of phantom')


def run(name: str, args: argparse.Namespace) -> None:
    """The figure."""
    if name == 'levels':
        levels(args.hippocampus.resolve(), args.phantom.resolve(), args.page)
    elif name == 'differences':
        differences(args.page)
        forests(args.page.parent)
    else:
        headline(args.hippocampus.resolve(), args.folds[0], Path(args.o).resolve(), args.page)


def levels(hippocampus: Path, phantom: Path, file: Path) -> None:
    """Share of uncertainty over log SNR."""
    from nnunet_pdddpm.network.state import stored_table
    figure = Figure(figsize=(6, 3.6))
    axis = figure.subplots()
    for number, (dataset, work) in enumerate(((HIPPOCAMPUS, hippocampus), (PHANTOM.dataset, phantom))):
        for fold in range(NUM_FOLDS):
            table = stored_table(dataset.weights(work, 'denoiser', fold))
            axis.plot(table.log_snr, table.share, color=f'C{number}', linewidth=1,
                      label=f'{dataset.name}, {NUM_FOLDS} trainings' if fold == 0 else None)
    axis.set(xlabel='log SNR', ylabel='share of uncertainty u that is left')
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def difference(place: Place) -> Interval:
    """Mean and 95 % interval of a row's difference to its base, in % of the base's error; above 0 is worse.

    The error is the metric, or 1 less what is better when higher. Unless it is named, the base is the one row without a
    difference and a note.
    """
    _, section, text = (results() / f'{place.page}.md').read_text().partition(place.section or '\n')
    rows = read_column(section + text, place.column, place.delta)
    base = place.base or next(title for title, (value, delta) in rows.items()
                              if not delta and '(' not in value and title != IDEAL)
    error = float(rows[base][0].split()[0])
    mean, low, high = interval(rows[place.row][1])
    if place.column in HIGHER:
        error, mean, low, high = 1 - error, -mean, -high, -low
    return 100 * mean / error, 100 * low / error, 100 * high / error


def differences(file: Path) -> None:
    """All of them, in one picture."""
    draw_intervals({title: difference(place) for title, place in DIFFERENCES.items()},
                   "difference to the baseline in % of the baseline's error; left of 0 is better", file, True)


def forests(folder: Path) -> None:
    """Forest plots of the pages of results, into a folder."""
    import image_models
    import volumes
    for name, images in {'phantom': PHANTOM, **RATER_SETS}.items():
        rows, base = image_models.rows(images)
        forest((results() / f'{name}.md').read_text(), image_models.plotted(rows), 'GED²', base, 'lower',
               folder / f'{name}.md')
    rows, base = volumes.rows()
    forest((results() / 'hippocampus.md').read_text(), dict.fromkeys(row.title for row in rows), 'Dice', base, 'higher',
           folder / 'hippocampus.md')


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
    image = read(raw / 'imagesTs' / f'{case}_0000.nii.gz').astype(float)
    truth, stock = read(raw / 'labelsTs' / f'{case}.nii.gz'), read(next(output.glob(f'presegmentation/{case}*.nii.gz')))
    samples = [read(sample) for sample in sorted((output / 'samples').glob(f'{case}_s*.nii.gz'))]
    entropy = read(output / 'uncertainty' / f'{case}_uncertainty.nii.gz')
    z = int((truth > 0).sum((1, 2)).argmax())
    (top, bottom), (left, right) = (bounds(places, size) for places, size in zip(
        np.nonzero(np.any([truth, *samples], 0)[z]), truth[z].shape, strict=True))
    figure = Figure(figsize=(12, 3.2))
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.3))
    for axis in axes[:3]:
        axis.imshow(image[z], cmap='gray')
        axis.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
    outline(axes[0], stock[z], 'C1', 1.5)
    outline(axes[0], truth[z], 'C2', 1.5)
    axes[0].set_title('stock (orange), truth (green)', fontsize=9)
    for sample in samples:
        outline(axes[1], sample[z], 'C0', 0.7)
    axes[1].set_title(f'{len(samples)} samples', fontsize=9)
    axes[2].imshow(np.ma.masked_less(entropy[z], 0.05), cmap='magma', vmin=0, vmax=1, alpha=0.8)
    axes[2].set_title('uncertainty (entropy)', fontsize=9)
    row = next(row for row in json.loads((output / SUMMARY).read_text())['cases'] if row['case'] == case)
    labels = json.loads((raw / 'dataset.json').read_text())['labels']
    for y, (name, label) in enumerate(row['labels'].items()):
        level = in_percent(label['interval_level'])
        axes[3].plot([label['volume_ml_low'], label['volume_ml_high']], [y, y], color='0.75', linewidth=6,
                     solid_capstyle='butt', label=f'interval, {level}' if y == 0 else None)
        axes[3].plot(label['volume_ml'], y, 'o', color='k', label='mask' if y == 0 else None)
        axes[3].plot((truth == labels[name]).sum() / 1000, y, '|', color='C2', markersize=22, markeredgewidth=2.5,
                     label='truth' if y == 0 else None)
    axes[3].set(yticks=range(len(row['labels'])), yticklabels=row['labels'], ylim=(-0.6, len(row['labels']) - 0.4),
                xlabel='volume in ml')
    axes[3].set_xlim(0, 1.05 * axes[3].get_xlim()[1])
    axes[3].legend(fontsize=8, ncols=3, loc='lower center', bbox_to_anchor=(0.45, 1), frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
