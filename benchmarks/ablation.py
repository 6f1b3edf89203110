"""Training with one thing changed at a time, on the phantom of ambiguous.py: equal iterations, three seeds."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from ambiguous import (
    CONFIGURATION,
    DATASET,
    HERE,
    NUM_FOLDS,
    PDDDPM_TRAINER,
    STOCK_TRAINER,
    TRUTH_TRAINER,
    VARIABLES,
    prepare,
)
from hippocampus import nnunet_environment, parse, train
from scale import machine

STAGES = ('prepare', 'train', 'predict', 'evaluate')
VARIANTS = {
    'base': 'PDDDPMTrainerAmbiguousBase',
    'from scratch': 'PDDDPMTrainerAmbiguousScratch',
    'from scratch, half as wide': 'PDDDPMTrainerAmbiguousNarrow',
    'from scratch, twice as wide': 'PDDDPMTrainerAmbiguousWide',
    'pre-segmentation as a further input': 'PDDDPMTrainerAmbiguousConditioned',
    'in-fold pre-segmentations': 'PDDDPMTrainerAmbiguousInFold',
    'weights not averaged': 'PDDDPMTrainerAmbiguousNoAverage',
    "nnU-Net's SGD": 'PDDDPMTrainerAmbiguousSGD',
    'none at level 0': TRUTH_TRAINER,
    'a tenth at level 0': 'PDDDPMTrainerAmbiguousTenth',
    'a half at level 0': 'PDDDPMTrainerAmbiguousHalf',
    'high noise levels more often': 'PDDDPMTrainerAmbiguousHigh',
    'high noise levels more often, a half at level 0: the default': PDDDPM_TRAINER,
    'high noise levels more often, none at level 0': 'PDDDPMTrainerAmbiguousHighNone',
    'the default, density of levels as their eighth power': 'PDDDPMTrainerAmbiguousHigher',
    'the default, noise on the pre-segmentation in half of the noisy patches':
        'PDDDPMTrainerAmbiguousHalfOnPresegmentation',
    'the default, noise on the pre-segmentation up to t = 500 (split by level)': 'PDDDPMTrainerAmbiguousSplit',
    'the default, its own result shown at level 0 in half of the steps (recycling)': 'PDDDPMTrainerAmbiguousRecycling',
    'the default, cross-entropy alone at level 0, too': 'PDDDPMTrainerAmbiguousCE',
    'the default, pre-segmentation as a further input': 'PDDDPMTrainerAmbiguousSeen',
    'the default, both': 'PDDDPMTrainerAmbiguousSeenCE',
    'the default on a bridge to the pre-segmentation, kappa 2': 'PDDDPMTrainerAmbiguousBridge2',
    'the default on a bridge to the pre-segmentation, kappa 8': 'PDDDPMTrainerAmbiguousBridge8',
}
HEADER = ('| | Dice ± images / seeds | Δ to base | NLL | Δ to base | GED² | Δ to base | frequency error '
          '| correlation |\n|' + '---|' * 9)
TEXT = """# Ablation: one thing changed at a time

    .venv/bin/python benchmarks/ablation.py -o WORK

Machine: {machine}. The phantom, the reduced plans, the stock models and the
measures are those of [ambiguous.md](ambiguous.md), the work folder may be the same. {iterations} iterations for every
row, three seeds (folds 0 to 2), {images} test images, {samples} samples, with mirroring, no blending. Nothing was
tuned: all rows are sampled alike. Base: warm start, AdamW, averaged weights, out-of-fold pre-segmentations, a quarter
of the patches at level 0, the others at levels drawn uniformly. High noise levels more often: with a density that grows
as the square of the level. Δ: mean paired difference to the base, with a 95 % bootstrap interval that draws images and
seeds; there are {rows} rows, so an interval that misses 0 by little may be chance.
"""


def main() -> None:
    args = parse(__doc__, 'nothing: this data set is a phantom', 'ablation.md', STAGES)
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work)
    if 'train' in args.stages:
        for trainer in (STOCK_TRAINER, *VARIANTS.values()):
            for fold in range(NUM_FOLDS):
                train(work, trainer, fold, DATASET, CONFIGURATION, **VARIABLES)
    os.environ.update({**nnunet_environment(work), **VARIABLES})
    sys.path.append(str(HERE / 'trainers'))
    if 'predict' in args.stages:
        predict(work)
    if 'evaluate' in args.stages:
        write_table(work, Path(args.table))


def settings() -> dict[str, dict[str, float]]:
    """How every row is sampled."""
    return {'one step from t_start 846': {'t_start': 846, 'steps': 1, 'blend': 0.0},
            'three steps from t_start 960': {'t_start': 960, 'steps': 3, 'eta': 0.0, 'blend': 0.0}}


def predict(work: Path) -> None:
    """All rows whose models are trained."""
    from ambiguous_evaluation import Row, predict_row
    torch.set_num_threads(1)
    for title, of in settings().items():
        for name, trainer in VARIANTS.items():
            row = Row(f'ablation {name}, {title}', trainer, of)
            for fold in row.trained_folds(work):
                predict_row(work, row, fold)


def write_table(work: Path, file: Path) -> None:
    """A table for each way to sample."""
    from ambiguous_evaluation import NUM_TEST, SAMPLES, Row, difference, measure
    from ambiguous_table import interval, spread, values
    from ambiguous_trainers import Ambiguous
    lines = [TEXT.format(machine=machine(), images=NUM_TEST,
                         iterations=Ambiguous.epochs * Ambiguous.iterations, samples=SAMPLES, rows=len(VARIANTS))]
    for title, of in settings().items():
        lines += [f'## {title[0].upper()}{title[1:]}', '', HEADER]
        base = Row(f'ablation base, {title}', VARIANTS['base'], of)
        for name, trainer in VARIANTS.items():
            row = Row(f'ablation {name}, {title}', trainer, of)
            folds = row.predicted_folds(work)
            if len(folds) < NUM_FOLDS:
                continue
            metrics, baseline = measure(work, row), measure(work, base, folds)
            error, _, related = values(metrics)
            deltas = ['' if row == base else interval(difference(metrics, baseline, metric), digits)
                      for metric, digits in (('dice', 3), ('nll', 4), ('ged', 3))]
            lines.append(f'| {name} | {spread(metrics["dice"])} | {deltas[0]} | {metrics["nll"].mean():.4f} '
                         f'| {deltas[1]} | {metrics["ged"].mean():.3f} | {deltas[2]} | {error} | {related} |')
        lines.append('')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(lines))


if __name__ == '__main__':
    main()
