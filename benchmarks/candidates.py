"""Ways to train one network for mask and samples, on validation cases of hippocampus and cells: three trainings."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cells
import numpy as np
import torch
from hippocampus import (
    CONFIGURATION,
    DATASET,
    HERE,
    PDDDPM_TRAINER,
    fold_folder,
    mean_and_interval,
    nnunet_environment,
    parse,
    train,
)
from scale import DEVICE, PLANS, machine

STAGES = ('train', 'hippocampus', 'cells', 'table')
FOLDS = (0, 1, 2)
EVERY = 2
"""Of the validation cases of hippocampus, one in so many is measured."""
CANDIDATES = {'the default': '', 'noise on the pre-segmentation in half of the noisy patches': 'HalfOnPresegmentation',
              'bridge to the pre-segmentation, kappa 8': 'Bridge8', 'cross-entropy alone at level 0, too': 'CE',
              'both: bridge, and cross-entropy alone': 'Bridge8CE'}
"""What it is, and the end of its trainers' names."""
STARTS = {'no chain (k = 0)': (1000, 0), 'one step from t_start 700': (700, 1), 'one step from t_start 900': (900, 1),
          'three steps from t_start 960': (960, 3)}
"""t_start and number of steps; without any the denoiser sees the pre-segmentation itself."""
VALUES = {'Dice': 4, 'NLL': 4, 'GED²': 3}
"""And their digits."""
Found = dict[str, dict[str, list[float]]]
"""Start -> value -> cases."""
TEXT = """# Candidates for the default

    .venv/bin/python benchmarks/candidates.py -o WORK

after `benchmarks/evidence.py -o WORK`, whose stock models and default it compares with. Machine: {machine}. Validation
cases of each fold, on which nothing was tuned or stopped for this table: one in {every} of hippocampus, all images of
the cells. Trainings of each candidate, the folds, at equal iterations, by the trainers of
`benchmarks/trainers/candidate_trainers.py`, on as many folds as the table says (means are over these; a difference is
to the default on the same folds). Hippocampus: with mirroring, the mask from one draw (Dice, NLL), 8 samples (GED² to
the truth). Cells: no mirroring, 16 samples, Dice of their mean to the majority of ten raters, NLL and GED² to all of
them. No blending. Δ: mean paired difference to the default, with a 95 % bootstrap interval that draws trainings and
cases. Bold: the interval excludes 0.
"""


def of_hippocampus(work: Path, name: str, fold: int) -> Found:
    """On validation cases, in the network's grid."""
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
    from nnunet_pdddpm.network.settings import SamplingSettings
    from nnunet_pdddpm.tuning.cases import ValidationCases
    from nnunet_pdddpm.tuning.sweep import CaseSweep
    model, device = fold_folder(work, PDDDPM_TRAINER + name, fold).parent, torch.device(DEVICE)
    predictor = VolumePredictor(device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    cases = ValidationCases(get_trainer_from_args(DATASET, CONFIGURATION, fold, PDDDPM_TRAINER + name, PLANS,
                                                  device=device))
    found: Found = {start: {value: [] for value in VALUES} for start in STARTS}
    for case in cases.names[::EVERY]:
        with torch.inference_mode():
            of_case = CaseSweep(predictor, cases.load(case))
            for start, (t_start, steps) in STARTS.items():
                mask, samples = (SamplingSettings(t_start=t_start, steps=steps, samples=number, blend=0.0)
                                 for number in (1, 8 if steps else 1))
                of_case.measure([mask, samples])
                for value, settings in (('Dice', mask), ('NLL', mask), ('GED²', samples)):
                    scores = of_case.scores[settings]
                    found[start][value].append(float(scores['ged' if value == 'GED²' else value.lower()]))
    return found


def of_cells(work: Path, name: str, fold: int) -> Found:
    """On validation images."""
    from cells_evaluation import Row, measure, predict_row
    part = cells.validation_part(fold)
    found = {}
    for start, (t_start, steps) in STARTS.items():
        row = Row(f'{name} fold {fold}: {start}', cells.PDDDPM_TRAINERS[0] + name, (fold,),
                  settings=(t_start, steps, 0.0))
        predict_row(work, part, row)
        metrics = measure(work, part, row)
        found[start] = {'Dice': metrics['dice'], 'NLL': metrics['nll'], 'GED²': metrics['ged_squared']}
    return found


MEASURES: dict[str, Callable[[Path, str, int], Found]] = {'hippocampus': of_hippocampus, 'cells': of_cells}


def is_trained(work: Path, part: str, name: str, fold: int) -> bool:
    """Whether there is something to measure."""
    model = (fold_folder(work, PDDDPM_TRAINER + name, fold) if part == 'hippocampus' else
             fold_folder(work, cells.PDDDPM_TRAINERS[0] + name, fold, cells.DATASET, cells.CONFIGURATION))
    return (model / 'checkpoint_final.pth').is_file()


def measured(work: Path, name: str, fold: int) -> Path:
    """File of what a model gives."""
    return work / 'candidates' / f'{name or "Default"}_{fold}.json'


def table(work: Path) -> list[str]:
    """Of a data set, for each start; a candidate on the folds it was trained on."""
    found = {name: {fold: json.loads(measured(work, end, fold).read_text()) for fold in FOLDS
                    if measured(work, end, fold).is_file() and measured(work, '', fold).is_file()}
             for name, end in CANDIDATES.items()}
    found = {name: folds for name, folds in found.items() if folds}
    if not found:
        return ['**Not run.**', '']
    number = min(len(of[start]['NLL']) for folds in found.values() for of in folds.values() for start in STARTS)
    lines = [f'Validation cases of each fold: {number}.', '']
    for start in STARTS:
        lines += [f'### {start[0].upper()}{start[1:]}', '',
                  f'| | trainings | {" | ".join(f"{value} | Δ" for value in VALUES)} |\n|'
                  + '---|' * (2 + 2 * len(VALUES))]
        for name, folds in found.items():
            columns = []
            for value, digits in VALUES.items():
                one, default = (np.array([of[fold][start][value][:number] for fold in folds])
                                for of in (folds, found['the default']))
                delta = '' if name == 'the default' else interval(mean_and_interval(one - default), digits)
                columns.append(f'{one.mean():.{digits}f} | {delta}')
            lines.append(f'| {name} | {len(folds)} | {" | ".join(columns)} |')
        lines.append('')
    return lines


def interval(values: tuple[float, float, float], digits: int) -> str:
    """A difference with its interval, bold if that excludes 0."""
    text = '{:+.{d}f} ({:+.{d}f} to {:+.{d}f})'.format(*values, d=digits)
    return f'**{text}**' if values[1] * values[2] > 0 else text


def main() -> None:
    args = parse(__doc__, 'Dataset004_Hippocampus and bubil_cells', 'candidates.md', STAGES)
    work = Path(args.o).resolve()
    for name in CANDIDATES.values() if 'train' in args.stages else ():
        for fold in FOLDS:
            train(work / 'cells', cells.PDDDPM_TRAINERS[0] + name, fold, cells.DATASET, cells.CONFIGURATION,
                  **cells.VARIABLES)
            train(work / 'hippocampus', PDDDPM_TRAINER + name, fold)
    for part in MEASURES:
        if part in args.stages and len(args.stages) > 1:  # each has nnU-Net's folders of its own
            subprocess.run([sys.executable, __file__, '-o', str(work), '--stages', part], check=True)
        elif part in args.stages:
            os.environ.update({**nnunet_environment(work / part), **(cells.VARIABLES if part == 'cells' else {})})
            measure(work / part, part)
    if 'table' in args.stages:
        write_table(work, Path(args.table))


def measure(work: Path, part: str) -> None:
    """Of all models that are trained, what is not there yet."""
    torch.set_num_threads(1)
    sys.path.append(str(HERE / 'trainers'))
    for name in CANDIDATES.values():
        for fold in FOLDS:
            file = measured(work, name, fold)
            if not file.is_file() and is_trained(work, part, name, fold):
                file.parent.mkdir(exist_ok=True)
                file.write_text(json.dumps(MEASURES[part](work, name, fold)))


def write_table(work: Path, file: Path) -> None:
    """Of the data sets that were measured."""
    lines = [TEXT.format(machine=machine(), every=EVERY)]
    for part in MEASURES:
        lines += [f'## {part.capitalize()}', '', *table(work / part)]
    file.write_text('\n'.join(lines))


if __name__ == '__main__':
    main()
