"""Table and figure of `cells.py`, from the measurements and the predicted folders."""
from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from cells import CONFIGURATION, CONTROL_TRAINER, DATASET, NUM_FOLDS, NUM_TEST, PDDDPM_TRAINERS, SPLIT_SEED
from cells_evaluation import (
    SAMPLES,
    Metrics,
    Row,
    chosen,
    difference,
    is_trained,
    mean,
    measure,
    nearest_to_raters,
    of_folds,
    seed_rows,
    stock_rows,
    sweep,
    test_rows,
    trained_pdddpm,
)
from cells_trainers import nnUNetTrainerCells
from scale import AUTOCAST, FULL, PLANS, PLANS_IN_WORDS, machine
from skimage import io

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

HEADER = ('| | masks | network calls | GED² | Δ to stock | Δ to its thresholds | IoU between masks | HM-IoU '
          '| Dice to majority | Δ to stock | NLL | ECE | Brier |\n|' + '---|' * 13)


def interval(values: tuple[float, float, float]) -> str:
    """A difference with its interval."""
    return '{:+.3f} ({:+.3f} to {:+.3f})'.format(*values)


def table_row(row: Row, metrics: Metrics, stock: Metrics, thresholds: Metrics) -> str:
    """One line of markdown."""
    ged = ' | '.join(interval(difference(metrics, baseline, 'ged_squared')) for baseline in (stock, thresholds))
    return (f'| {row.title} | {row.samples} | {row.calls} | {mean(metrics, "ged_squared"):.3f} | {ged} '
            f'| {1 - mean(metrics, "sample_diversity"):.3f} | {mean(metrics, "hm_iou"):.3f} '
            f'| {mean(metrics, "dice"):.4f} | {interval(difference(metrics, stock, "dice"))} '
            f'| {mean(metrics, "nll"):.4f} | {mean(metrics, "ece"):.4f} | {mean(metrics, "brier"):.4f} |')


def sweep_table(work: Path) -> list[str]:
    """Everything on the validation images; the other folds' stock models were trained on these."""
    rows = [*(row for row in stock_rows(work) if len(row.folds) == 1 and not row.temperature),
            *(row for trainer in trained_pdddpm(work) for row in sweep(trainer))]
    lines = ['| | GED² | IoU between masks | Dice to majority | NLL |', '|' + '---|' * 5]
    for row in rows:
        metrics = measure(work, 'validation', row)
        lines.append(f'| {row.title} | {mean(metrics, "ged_squared"):.3f} '
                     f'| {1 - mean(metrics, "sample_diversity"):.3f} | {mean(metrics, "dice"):.4f} '
                     f'| {mean(metrics, "nll"):.4f} |')
    raters = 1 - mean(measure(work, 'validation', rows[0]), 'rater_diversity')
    return [*lines, '', f'IoU between the raters: {raters:.3f}.']


def seeds_table(work: Path) -> list[str]:
    """Three trainings each: the folds differ in training images."""
    rows = seed_rows(work)
    if len(rows) < 2:
        return []
    measured = {row: [measure(work, 'test', of_fold) for of_fold in of_folds(row)] for row in rows}
    lines = [f'## {NUM_FOLDS} trainings', '',
             f'The models of folds 0 to {NUM_FOLDS - 1}, {SAMPLES} masks an image, with mirroring, the settings chosen on '
             'the validation images of fold 0. Mean (values of the folds); Δ to the thresholds of the stock model of the '
             'same fold, with an interval that draws images and folds.', '',
             '| | GED² | Δ | Dice to majority | Δ | NLL | Δ |\n|' + '---|' * 7]
    for row, of in measured.items():
        cells = []
        for name, digits in (('ged_squared', 3), ('dice', 3), ('nll', 4)):
            values = [mean(m, name) for m in of]
            cells.append(f'{np.mean(values):.{digits}f} ({", ".join(f"{v:.{digits}f}" for v in values)})')
            cells.append(interval(difference(of, measured[rows[0]], name)) if row != rows[0] else '')
        lines.append(f'| {row.title} | ' + ' | '.join(cells) + ' |')
    return [*lines, '']


def findings(work: Path) -> list[str]:
    """What the tables say, put into words by their numbers."""
    stock, thresholds = (measure(work, 'test', row) for row in stock_rows(work)[:2])
    raters = 1 - mean(stock, 'rater_diversity')
    simple, refined = (min(rows, key=lambda row: mean(measure(work, 'test', row), 'ged_squared')) for rows in (
        stock_rows(work), [row for trainer in trained_pdddpm(work) for row in test_rows(work, trainer)]))
    of_simple, of_refined = measure(work, 'test', simple), measure(work, 'test', refined)
    lines = [f'- The lowest GED² without PDDDPM is {mean(of_simple, "ged_squared"):.3f} ({simple.title}), with it '
             f'{mean(of_refined, "ged_squared"):.3f} ({refined.title}): the latter is '
             f'{verdict(of_refined, of_simple, "ged_squared")} the former.']
    for trainer in trained_pdddpm(work):
        best, near = chosen(work, trainer), nearest_to_raters(work, trainer)
        of_best, of_near = measure(work, 'test', best), measure(work, 'test', near)
        lines += [f'- {best.title}, chosen: GED² is {verdict(of_best, stock, "ged_squared")} that of the single stock '
                  f'mask and {verdict(of_best, thresholds, "ged_squared")} that of the thresholds of its softmax; '
                  f'NLL is {verdict(of_best, stock, "nll")} and Dice to the majority '
                  f'{verdict(of_best, stock, "dice")} the stock model\'s.',
                  f'- {near.title} was nearest to the raters\' disagreement on the validation images. On the test '
                  f'images its samples agree with IoU {1 - mean(of_near, "sample_diversity"):.3f}, the raters with '
                  f'{raters:.3f}.']
    return lines


def verdict(metrics: Metrics, baseline: Metrics, name: str) -> str:
    """In words, with the difference and its interval."""
    middle, low, high = difference(metrics, baseline, name)
    word = 'below' if high < 0 else 'above' if low > 0 else 'not distinguishable from'
    return f'{word} ({interval((middle, low, high))})'


def not_run(work: Path) -> str:
    """What the table lacks, and what that means for reading it."""
    lacking = [trainer for trainer in (*PDDDPM_TRAINERS, CONTROL_TRAINER) if not is_trained(work, trainer)]
    if not lacking:
        return ''
    control = (' Without the control, what PDDDPM gains on the stock model may come from its further iterations alone.'
               if CONTROL_TRAINER in lacking else '')
    return f'\n**Not run, and so not in the tables: {" and ".join(f"`{name}`" for name in lacking)}.**{control}\n'


def introduction(work: Path) -> str:
    """What was trained, on what, and what is measured."""
    plans = json.loads((work / 'nnUNet_preprocessed' / DATASET / f'{PLANS}.json').read_text())
    plans = plans['configurations'][CONFIGURATION]
    features, iterations = plans['architecture']['arch_kwargs']['features_per_stage'], 250 * nnUNetTrainerCells.epochs
    patch = f'patch {plans["patch_size"]} is the whole image'
    resolution = patch if FULL else f'at half of the resolution ({patch}; masks are compared at full\nresolution)'
    return f"""# Cells with ten raters: masks of stock nnU-Net and samples of PDDDPM

    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/cells.py -o WORK

Machine: {machine()}. Data: BU-BIL,
phase-contrast images of cells, 128 x 128, each with ten masks (five people, two tools). {NUM_TEST} test images split
off first (seed {SPLIT_SEED}), the other 50 in 3 folds by image; each image with each of its masks is a case of its own,
so training sees every opinion. A small test set: read the intervals. Monte-Carlo dropout is left
out: the planned networks have no dropout, and a network with it would be another stock model.

{PLANS_IN_WORDS}: 2d, {resolution}, {features} features, batch {plans["batch_size"]}; {iterations:,} iterations for each model: the stock
model of every fold, PDDDPM (warm start, out-of-fold pre-segmentations), and as the control the stock model
trained that much longer. Rows are of fold 0 unless they say otherwise.
`default`: noise on raters' masks, but half of the patches show
the pre-segmentation itself and ask for the best mask, and high noise levels are more frequent; `truth`: noise on
raters' masks in all patches, at levels drawn uniformly;
`no diffusion`: the same second network, which always sees the pre-segmentation itself; `cross-entropy alone`: with the
loss that the denoiser has at noise levels, nnU-Net's without its Dice part. `temperature`: one number T for the
model's probabilities, softmax(log p / T), with the lowest NLL on the validation images of its fold (Guo et al. 2017).
Same seeds, training in
{AUTOCAST}; no mirroring but where the row says so.

{SAMPLES} samples, or as many masks as a row has. A sample is drawn from the probabilities at the end of its chain with
one threshold for all pixels, another for each sample; `direct` has no chain, only that threshold. GED² and HM-IoU as
`nnUNetv2_pdddpm_evaluate` has them (d = 1 - IoU); GED² of fewer than 16 masks misses some of their spread. NLL, ECE and
Brier score take each rater in turn for the truth, over all pixels: they are best where the probability is the share of
raters. Dice is that of the mask of the mean probability with the majority of the raters. Δ: mean paired difference with
its 95 % bootstrap interval over images.
{not_run(work)}"""


def write_results(work: Path, file: Path) -> None:
    """Markdown with all tables, and the figure beside it."""
    stock, thresholds = (measure(work, 'test', row) for row in stock_rows(work)[:2])
    rows = [*stock_rows(work), *(row for trainer in trained_pdddpm(work) for row in test_rows(work, trainer))]
    picked = ' and '.join(chosen(work, trainer).title for trainer in trained_pdddpm(work))
    validation = len(measure(work, 'validation', stock_rows(work)[0])['dice'])
    lines = [
        introduction(work),
        f'## Sweep on the {validation} validation images of fold 0', '', *sweep_table(work), '',
        f'Chosen, for the lowest GED²: {picked}. The chosen, the settings nearest to the raters\' disagreement, '
        'and some starts beside them go on to the test images.', '',
        f'## {len(stock["dice"])} test images', '',
        f'IoU between the raters of an image: {1 - mean(stock, "rater_diversity"):.3f}. The row `stock` is the model '
        'that PDDDPM refines; thresholds are at 1/32, 3/32, ..., 31/32 of the probability.', '',
        HEADER, *(table_row(row, measure(work, 'test', row), stock, thresholds) for row in rows), '',
        *seeds_table(work),
        '## What the tables say', '', *findings(work), '',
        f'![Raters and samples]({file.with_suffix(".png").name})', '',
        'Four test images by the disagreement of their raters, from the least to the most. Raters: the first tool of '
        f'three people. Samples 0 to 2 of {best_row(work).title}.', '',
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines))
    draw(work, file.with_suffix('.png'))


def best_row(work: Path) -> Row:
    """The chosen row of the trainer that has the lower GED² on the validation images."""
    return min((chosen(work, trainer) for trainer in trained_pdddpm(work)),
               key=lambda row: mean(measure(work, 'validation', row), 'ged_squared'))


def draw(work: Path, file: Path) -> None:
    """Image, raters and their share, samples and their share, stock probability; four test images."""
    row, part = best_row(work), work / 'test'
    images = sorted(path.stem[:-len('_0000')] for path in (part / 'images').glob('*.png'))
    order = np.argsort(measure(work, 'test', row)['rater_diversity'])
    figure, axes = plt.subplots(4, 10, figsize=(14, 6))
    titles = ['image', *['rater'] * 3, 'share of raters', *['sample'] * 3, f'share of {SAMPLES} samples', 'stock']
    for line, index in zip(axes, np.linspace(0, len(order) - 1, 4).round().astype(int), strict=True):
        name = images[order[index]]
        image = io.imread(part / 'images' / f'{name}_0000.png')
        raters = [io.imread(path) for path in sorted((part / 'raters').glob(f'{name}__*.png'))]
        folder = work / 'predictions' / 'test'
        samples = [io.imread(path) for path in sorted((folder / row.folder / 'samples').glob(f'{name}_s*.png'))]
        stock = np.load(folder / stock_rows(work)[0].folder / f'{name}.npz')['probabilities'][1, 0]
        panels = [None, *raters[:6:2], np.mean(raters, 0), *samples[:3], np.mean(samples, 0), stock]
        for axis, panel, title in zip(line, panels, titles, strict=True):
            axis.axis('off')
            if title.startswith(('share', 'stock')):
                axis.imshow(panel, 'magma', vmin=0, vmax=1)
            else:
                axis.imshow(image, 'gray')
                if panel is not None:
                    axis.contour(panel, [0.5], colors=['#ffb000' if title == 'rater' else '#00c8ff'], linewidths=1.2)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=90)
    plt.close(figure)
