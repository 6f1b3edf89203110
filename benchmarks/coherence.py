"""Whether a sample is a mask that could be true: the phantom of `ambiguous.py` with ten times its data and training."""
from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from ambiguous import CONFIGURATION, DATASET, NUM_FOLDS, NUM_TEST, VARIABLES, prepare
from hippocampus import HERE, nnunet_environment, parse, train
from scale import PLANS_IN_WORDS, machine

if TYPE_CHECKING:  # reading nnU-Net's folders from the environment
    from ambiguous_evaluation import Row

STOCK = 'nnUNetTrainerCoherence'
DEFAULT = 'PDDDPMTrainerCoherence'
SECOND, TRUTH, BRIDGE = (DEFAULT + end for end in ('DirectCE', 'Truth', 'Bridge8'))
NUM_CASES = 1800
DRAWN = 'mask drawn between them'
STAGES = ('prepare', 'train', 'predict', 'table')
TEXT = """# Is a sample a mask that could be true?

    .venv/bin/python benchmarks/coherence.py -o WORK

Machine: {machine}. Two objects in each image; the truth of each is, independently, one of three shapes (the phantom
and the measures of [ambiguous.md](ambiguous.md)), but with {cases:,} images, two thirds of which train each fold, and
longer trainings: stock {stock:,} iterations, the others {others:,}. {plans}. Three trainings (folds), the {test} test
images of ambiguous.md, 16 masks each, eta 1, no mirroring, no blending; nothing was tuned. ± is the spread over
images, then over trainings. Truth in every patch: none at level 0, levels with a density that grows as their eighth
power. One of the shapes: share of the objects of the masks whose IoU with the nearest of their three shapes is at
least 0.85. Correlation: of "more than the core" between the two objects, over the masks of an image. Frequency error:
half of the summed differences between frequencies and probabilities of the shapes. Δ: paired difference to the second
network, on the same trainings, with a 95 % bootstrap interval that draws trainings and images; of one training it
knows nothing of the noise between trainings. Mask drawn between them (`redraw`): the chain goes on from a mask drawn
from the estimate, not from the estimate itself; this was first tried on one of these trainings and these images, then
on 40 others.

| | one of the shapes | Δ | correlation | Dice of the mean | Δ | NLL | GED² | Δ | frequency error |
|---|---|---|---|---|---|---|---|---|---|
"""


def rows() -> list[Row]:
    """Of the table."""
    from ambiguous_evaluation import CHAIN, Row
    one = {'t_start': 960, 'steps': 1, 'blend': 0.0}
    drawn = {'t_start': 960, 'redraw': 1, 'blend': 0.0}
    return [Row(title, trainer, settings, mirroring=False, thresholds=settings is None)
            for title, trainer, settings in (
                ('stock, 16 thresholds', STOCK, None),
                ('no diffusion: second network, cross-entropy alone', SECOND,
                 {'t_start': 1000, 'steps': 0, 'blend': 0.0}),
                ('PDDDPM, t_start 960, 1 step', DEFAULT, one),
                (f'PDDDPM, t_start 960, 2 steps, {DRAWN}', DEFAULT, {**drawn, 'steps': 2}),
                (f'PDDDPM, t_start 960, 3 steps, {DRAWN}', DEFAULT, {**drawn, 'steps': 3}),
                ('PDDDPM, t_start 960, 3 steps', DEFAULT, {'t_start': 960, **CHAIN, 'steps': 3}),
                ('PDDDPM, t_start 960, 10 steps', DEFAULT, {'t_start': 960, **CHAIN}),
                ('PDDDPM, t_start 1000, 10 steps', DEFAULT, {'t_start': 1000, **CHAIN}),
                ('truth in every patch, t_start 960, 1 step', TRUTH, one),
                (f'truth in every patch, t_start 960, 2 steps, {DRAWN}', TRUTH, {**drawn, 'steps': 2}),
                ('truth in every patch, t_start 1000, 10 steps', TRUTH, {'t_start': 1000, **CHAIN}),
                ('bridge, kappa 8, t_start 960, 1 step', BRIDGE, one),
                ('bridge, kappa 8, t_start 960, 10 steps', BRIDGE, {'t_start': 960, **CHAIN}))]


def lines(work: Path) -> list[str]:
    """Of the table."""
    from ambiguous_evaluation import SAMPLES, Metrics, correlation, difference, ideal, measure
    from ambiguous_table import interval, spread
    table = rows()
    found: dict[str, Metrics] = {row.title: measure(work, row) for row in table if row.predicted_folds(work)}
    second = found[table[1].title]
    found['ideal sampler'] = ideal(SAMPLES)
    text = []
    for title, of in found.items():
        delta = {name: '' if of is second or title == 'ideal sampler' else interval(difference(of, second, name), 3)
                 for name in ('clean', 'dice', 'ged')}
        seeds = '' if len(of['ged']) == len(second['ged']) or title == 'ideal sampler' else ' (one training)'
        text.append(f'| {title}{seeds} | {spread(of["clean"])} | {delta["clean"]} | {np.mean(correlation(of)):+.2f} '
                    f'| {spread(of["dice"])} | {delta["dice"]} | {of["nll"].mean():.4f} | {of["ged"].mean():.3f} '
                    f'| {delta["ged"]} | {of["frequency_error"].mean():.3f} |')
    return text


def main() -> None:
    args = parse(__doc__, 'nothing: this data set is a phantom', 'coherence.md', STAGES)
    work = Path(args.o).resolve()
    variables = {**VARIABLES, 'nnUNet_pdddpm_presegmenter': STOCK}
    if 'prepare' in args.stages:
        prepare(work, NUM_CASES)
    if 'train' in args.stages:
        for trainer in (STOCK, SECOND, DEFAULT, TRUTH, BRIDGE):
            for fold in range(NUM_FOLDS):
                train(work, trainer, fold, DATASET, CONFIGURATION, **variables)
    os.environ.update({**nnunet_environment(work), **variables})
    sys.path.append(str(HERE / 'trainers'))
    if 'predict' in args.stages:
        from ambiguous_evaluation import predict_row
        torch.set_num_threads(1)
        for row in rows():
            for fold in row.trained_folds(work):
                predict_row(work, row, fold)
    if 'table' in args.stages:
        import coherence_trainers
        stock, others = (trainer.epochs * trainer.iterations for trainer in
                         (coherence_trainers.nnUNetTrainerCoherence, coherence_trainers.PDDDPMTrainerCoherence))
        text = TEXT.format(machine=machine(), cases=NUM_CASES, test=NUM_TEST, stock=stock, others=others,
                           plans=PLANS_IN_WORDS)
        Path(args.table).write_text(text + '\n'.join(lines(work)) + '\n')


if __name__ == '__main__':
    main()
