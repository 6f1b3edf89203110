"""Tables and figure of `ambiguous.py`."""
from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from ambiguous import (
    CONFIGURATION,
    DATASET,
    NUM_CASES,
    NUM_FOLDS,
    NUM_TEST,
    PDDDPM_TRAINER,
    TEST_SEED,
    TRUTH_TRAINER,
    TUNING_MINUTES,
    model_fold,
)
from ambiguous_evaluation import CLEAN, ROWS, SAMPLES, STOCK, Metrics, Row, correlation, difference, ideal, measure
from ambiguous_phantom import phantom
from ambiguous_trainers import Ambiguous
from scale import AUTOCAST, PLANS, PLANS_IN_WORDS, SECONDS, machine
from skimage import io

matplotlib.use('Agg')
from matplotlib import pyplot as plt  # noqa: E402

HEADER = ('| | masks | Dice ± images / seeds | Δ to stock | NLL | Δ to stock | ECE | GED² | Δ to stock '
          '| Δ to its thresholds | frequency error | one of the three shapes | correlation | network calls '
          f'| {SECONDS} |\n|' + '---|' * 15)
THRESHOLDS = ROWS[1]


def interval(values: tuple[float, float, float], digits: int = 3) -> str:
    """A difference with its interval."""
    return '{:+.{d}f} ({:+.{d}f} to {:+.{d}f})'.format(*values, d=digits)


def spread(values: np.ndarray) -> str:
    """Of (seeds, images): mean, standard deviation of an image's mean, standard deviation of a seed's mean."""
    of_seeds = f'{values.mean(1).std(ddof=1):.3f}' if len(values) > 1 else 'one seed'
    return f'{values.mean():.4f} ± {values.mean(0).std(ddof=1):.3f} / {of_seeds}'


def cost(work: Path, row: Row) -> dict[str, float]:
    """Network calls and CPU seconds an image, mean over seeds."""
    files = [row.folder(work, fold) / 'cost.json' for fold in row.predicted_folds(work)]
    costs = [json.loads(file.read_text()) for file in files]
    return {name: float(np.mean([c[name] for c in costs])) for name in costs[0]}


def values(metrics: Metrics) -> tuple[str, str, str]:
    """The columns that need no baseline."""
    of_seeds = correlation(metrics)
    related = '' if np.isnan(of_seeds).all() else f'{np.nanmean(of_seeds):.2f}'
    return (f'{metrics["frequency_error"].mean():.3f}', f'{metrics["clean"].mean():.0%}', related)


def table_row(work: Path, row: Row) -> str:
    """One line of markdown; baselines are of the same seeds and images."""
    metrics, folds = measure(work, row), row.predicted_folds(work)
    stock, thresholds = measure(work, STOCK, folds), measure(work, THRESHOLDS, folds)
    few = '' if row.images == NUM_TEST else f' ({row.images} images)'
    costs = cost(work, row)
    return (f'| {row.title}{few} | {row.masks} | {spread(metrics["dice"])} '
            f'| {interval(difference(metrics, stock, "dice"))} | {metrics["nll"].mean():.4f} '
            f'| {interval(difference(metrics, stock, "nll"), 4)} | {metrics["ece"].mean():.4f} '
            f'| {metrics["ged"].mean():.3f} | {interval(difference(metrics, stock, "ged"))} '
            f'| {interval(difference(metrics, thresholds, "ged"))} | {" | ".join(values(metrics))} '
            f'| {costs["network_calls"]:.0f} | {costs["cpu_seconds"]:.2f} |')


def ideal_row(title: str, samples: int) -> str:
    """Of the exact distribution."""
    metrics = ideal(samples)
    return (f'| {title} | {samples} | {metrics["dice"].mean():.4f} | | {metrics["nll"].mean():.4f} | | '
            f'{metrics["ece"].mean():.4f} | {metrics["ged"].mean():.3f} | | | {" | ".join(values(metrics))} | | |')


def tuned(work: Path) -> list[str]:
    """What the settings were tuned to, a line a model."""
    lines = []
    for trainer in (PDDDPM_TRAINER, TRUTH_TRAINER):
        for fold in range(NUM_FOLDS):
            file = model_fold(work, trainer, fold) / 'sampling_sweep.json'
            if file.is_file():
                lines.append(f'- `{trainer}`, fold {fold}: {json.loads(file.read_text())["in_one_line"]}')
    return lines


def introduction(work: Path) -> str:
    """What was trained, on what, and what is measured."""
    plans = json.loads((work / 'nnUNet_preprocessed' / DATASET / f'{PLANS}.json').read_text())
    plans = plans['configurations'][CONFIGURATION]
    features, iterations = plans['architecture']['arch_kwargs']['features_per_stage'], \
        Ambiguous.epochs * Ambiguous.iterations
    return f"""# A known ambiguity: masks and samples against the exact distribution of the truth

    .venv/bin/python benchmarks/ambiguous.py -o WORK

Machine: {machine()}. Data: the phantom of
`benchmarks/ambiguous_phantom.py`, 64 x 64, two objects an image. For each object for itself the truth is a random
draw: its core, core and rim, or core and lobe; all of it can be seen in every image, and the size of a dot in the
core says how probable they are (core 0.7 to 0.1, rim 0.1 to 0.7, lobe 0.2). {NUM_CASES} images with one draw each for
training, in {NUM_FOLDS} folds; {NUM_TEST} further images for the test.

{PLANS_IN_WORDS}: 2d, patch {plans["patch_size"]}, {features} features, batch {plans["batch_size"]}; {iterations:,}
iterations for every model, in {AUTOCAST}. Three seeds: folds 0, 1 and 2, each with a seed of its own, so they
differ in training cases, too. PDDDPM: warm start, out-of-fold pre-segmentations. Control: the stock model of the fold
trained that much longer. No diffusion: a second network of the same size, warm start and training, which only ever
sees the pre-segmentation (out-of-fold) without noise.

Every number is an expectation over the distribution of the truth, not over draws of it: Dice of the mask, NLL and ECE
of the probabilities (all pixels), GED² with d = 1 - IoU. Frequency error: half of the summed absolute differences
between the frequencies of the three shapes in the samples and their probabilities, mean over objects. A sample's
object is one of the three shapes if it has an IoU of {CLEAN} with it (rim and lobe together have 0.78). Correlation:
of "more than the core" between the two objects of a sample; 0 in the truth. Thresholds: at 1/32, 3/32, ..., 31/32 of
the stock model's probability. With mirroring unless the row says otherwise. {SECONDS} an image, of one thread, with
reading and writing. Δ: mean paired difference with a 95 % bootstrap interval that draws images and seeds; three seeds
are few to draw from.
"""


def write_results(work: Path, file: Path) -> None:
    """Markdown with the tables, and the figure beside it."""
    rows = [row for row in ROWS if row.predicted_folds(work)]
    lacking = [row.title for row in ROWS if row not in rows]
    lines = [introduction(work)]
    if lacking:
        lines += [f'**Not run, and so not in the table: {"; ".join(lacking)}.**', '']
    lines += [
        f'## {NUM_TEST} test images, {len(STOCK.predicted_folds(work))} seeds', '', HEADER,
        *(table_row(work, row) for row in rows),
        ideal_row('ideal sampler', SAMPLES), ideal_row('ideal sampler', 1), '',
        'The last rows are draws from the distribution itself, with its mean as the probabilities and that above 0.5 '
        'as the mask.', '',
        '## Tuned settings', '',
        f'By `nnUNetv2_pdddpm_tune -budget {TUNING_MINUTES}` on the validation cases of the fold, whose truth is one '
        'draw:', '', *tuned(work), '',
        f'![Frequencies and samples]({file.with_suffix(".png").name})', '',
        'Left: how often the rim is in the samples of an object against how probable it is; fifths of the objects, all '
        'seeds. Right: an image, the share of the truth, and samples; fold 0.', '']
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines))
    draw(work, file.with_suffix('.png'))


def draw(work: Path, file: Path) -> None:
    """Calibration of the rim's frequency, and some samples."""
    shown = [row for row in ROWS if row.masks == SAMPLES and row.images == NUM_TEST and row.predicted_folds(work)]
    figure = plt.figure(figsize=(14, 1.3 * len(shown) + 1))
    left, right = figure.subfigures(1, 2, width_ratios=(5, 9))
    axis = left.subplots()
    axis.plot([0, 0.8], [0, 0.8], 'k--', lw=1, label='the truth')
    of_object = np.array([[o.probabilities[1] for o in phantom(TEST_SEED + i).objects] for i in range(NUM_TEST)])
    groups = np.array_split(np.argsort(of_object.ravel()), 5)
    for row in shown:
        metrics = measure(work, row)
        frequency = np.stack([metrics['rim_0'], metrics['rim_1']], 2).mean(0).ravel()
        axis.plot([of_object.ravel()[g].mean() for g in groups], [frequency[g].mean() for g in groups], 'o-', ms=3,
                  label=row.title)
    axis.set(xlabel='probability of the rim', ylabel='its frequency in 16 samples', ylim=(-0.02, 1))
    axis.legend(fontsize=7, frameon=False)
    axes = right.subplots(len(shown), 10, squeeze=False)
    case, name = phantom(TEST_SEED), f'phantom_{TEST_SEED}'
    masks, weights = case.distribution()
    for line, row in zip(axes, shown, strict=True):
        folder = row.folder(work, 0)
        if row.thresholds:
            p = np.load(folder / f'{name}.npz')['probabilities'][1].reshape(case.image.shape)
            samples = [p > (2 * i + 1.5) / SAMPLES for i in range(8)]
        else:
            samples = [io.imread(f) for f in sorted((folder / 'samples').glob(f'{name}_s*.png'))[:8]]
        panels = [case.image, np.einsum('k,kyx->yx', weights, masks), *samples]
        for a, panel in zip(line, panels, strict=True):
            a.imshow(panel, 'gray')
            a.set(xticks=[], yticks=[])
        line[0].set_title(row.title, fontsize=7, loc='left', pad=2)
    figure.savefig(file, dpi=80)
    plt.close(figure)
