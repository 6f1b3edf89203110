"""Ways to train one network for mask and samples, on validation cases of hippocampus and cells."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cells
import hippocampus
import numpy as np
import torch
from hippocampus import HERE, fold_folder, mean_and_interval, nnunet_environment, parse, train
from scale import AUTOCAST, DEVICE, PLANS, machine

CONFIGURATION = '2d'
DATASETS = {'hippocampus': hippocampus.DATASET, 'cells': cells.DATASET}
BATCH_SIZE = 8
"""Of hippocampus; its slices have half as many pixels as the images of the cells."""
STAGES = ('prepare', 'train', *DATASETS, 'table')
FOLDS = (0, 1, 2)
EVERY = 4
"""Of the validation cases of hippocampus, one in so many is measured."""


@dataclass(frozen=True)
class Candidate:
    """A way to train, and to ask for results."""
    title: str
    end: str
    """Of the trainer's name."""
    for_mask: bool = False
    """See `candidate_trainers.Told`."""
    starts: tuple[str, ...] = ()
    """That it is trained for; empty: all."""
    every_fold: bool = False

    @property
    def trainer(self) -> str:
        """Its trainer, on both data sets."""
        return cells.PDDDPM_TRAINERS[0] + self.end

    @property
    def name(self) -> str:
        """Of its files."""
        return (self.end or 'Default') + '-for_mask' * self.for_mask


STOCK = 'the stock model'
NO_CHAIN = 'no chain (k = 0)'
STARTS = {NO_CHAIN: (1000, 0, False), 'one step from t_start 700': (700, 1, False),
          'one step from t_start 900': (900, 1, False), 'two steps from t_start 960': (960, 2, False),
          'two steps from t_start 960, the second from a drawn mask (redraw)': (960, 2, True)}
"""t_start, number of steps, redraw; without any steps the denoiser sees the pre-segmentation itself."""
CHAINS = tuple(start for start in STARTS if start != NO_CHAIN)
DEFAULT = Candidate('the default', '', every_fold=True)
CANDIDATES = (
    DEFAULT,
    Candidate('bridge to the pre-segmentation, kappa 8', 'Bridge8', every_fold=True),
    Candidate('noise on the pre-segmentation in half of the noisy patches', 'HalfOnPresegmentation'),
    Candidate('the same and told which: as noise on the truth', 'Told', starts=CHAINS),
    Candidate('the same and told which: as noise on the pre-segmentation', 'Told', for_mask=True, starts=CHAINS),
    Candidate('split by level: noise on the pre-segmentation up to t = 500', 'Split'),
    Candidate('its own result shown at level 0 in half of the steps (recycling)', 'Recycling'),
    Candidate('noise on the truth in every patch', 'Truth', starts=CHAINS),
    Candidate('no diffusion: the pre-segmentation in every patch', 'Direct', starts=(NO_CHAIN,)))
VALUES = {'Dice': 4, 'NLL': 4, 'GED²': 3}
"""And their digits."""
Found = dict[str, dict[str, list[float]]]
"""Start -> value -> cases."""
TEXT = """# Candidates for the default

    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/candidates.py -o WORK

Machine: {machine}, training in {autocast}. Both data sets in 2d with reduced plans: the cells as in
[cells.md](cells.md), hippocampus (the split of [hippocampus.md](hippocampus.md)) slice by slice in batches of {batch},
since a training in 3d takes many times as long. The same trainers for both: stock in every fold and each candidate
1,500 iterations, the same seeds and patches. Validation cases of each fold, on which nothing was tuned or stopped for
this table: one in {every} of hippocampus, all images of the cells. Candidates were trained in fold 0, some of them in
all three. No mirroring, no blending. Hippocampus: 8 samples (without a chain one, the mask), Dice and NLL of their
mean, GED² to the truth. Cells: 16 samples, Dice of their mean to the majority of ten raters, NLL and GED² to all of
them. Told which: the network knows which of the two the noise is on; a start is taken for the one or the other. The
network without diffusion has no chain and stands beside every start; with noise on the truth only there is no level 0.
Δ: mean paired difference to the default, with a 95 % bootstrap interval that draws trainings and cases. Bold: the
interval excludes 0. Of one training the interval knows nothing of the noise between trainings.
"""


def of_hippocampus(work: Path, candidate: Candidate, fold: int) -> Found:
    """On validation cases, in the network's grid."""
    from nnunetv2.run.run_training import get_trainer_from_args

    from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
    from nnunet_pdddpm.network.settings import SamplingSettings
    from nnunet_pdddpm.tuning.cases import ValidationCases
    from nnunet_pdddpm.tuning.sweep import CaseSweep, stock_settings
    dataset, trainer = DATASETS['hippocampus'], candidate.trainer
    model, device = fold_folder(work, trainer, fold, dataset, CONFIGURATION).parent, torch.device(DEVICE)
    predictor = VolumePredictor(device=device, allow_tqdm=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    cases = ValidationCases(get_trainer_from_args(dataset, CONFIGURATION, fold, trainer, PLANS, device=device))
    asked = {STOCK: stock_settings(predictor.refiner)}
    for start in candidate.starts or STARTS:
        t_start, steps, redraw = STARTS[start]
        asked[start] = SamplingSettings(t_start=t_start, steps=steps, samples=8 if steps else 1, redraw=redraw)
    found: Found = {start: {value: [] for value in VALUES} for start in asked}
    for case in cases.names[::EVERY]:
        with torch.inference_mode():
            of_case = CaseSweep(predictor, cases.load(case))
            of_case.measure([settings for settings in asked.values() if not settings.is_stock])
            for start, settings in asked.items():
                for value, name in (('Dice', 'dice'), ('NLL', 'nll'), ('GED²', 'ged')):
                    found[start][value].append(float(of_case.scores[settings][name]))
    return found


def of_cells(work: Path, candidate: Candidate, fold: int) -> Found:
    """On validation images."""
    from cells_evaluation import Row, measure, predict_row

    @dataclass(frozen=True)
    class OfCandidate(Row):
        @property
        def folder(self) -> str:
            return super().folder + '-for_mask' * candidate.for_mask
    part = cells.validation_part(fold)
    rows = {STOCK: Row(f'stock, fold {fold}', folds=(fold,))}
    for start in candidate.starts or STARTS:
        t_start, steps, redraw = STARTS[start]
        rows[start] = OfCandidate(f'{candidate.title}, fold {fold}: {start}', candidate.trainer, (fold,),
                                  settings=(t_start, steps, 0.0), redraw=redraw)
    found = {}
    for start, row in rows.items():
        predict_row(work, part, row)
        metrics = measure(work, part, row)
        found[start] = {'Dice': metrics['dice'], 'NLL': metrics['nll'], 'GED²': metrics['ged_squared']}
    return found


MEASURES: dict[str, Callable[[Path, Candidate, int], Found]] = {'hippocampus': of_hippocampus, 'cells': of_cells}


def measured(work: Path, candidate: Candidate, fold: int) -> Path:
    """File of what a model gives."""
    return work / 'candidates' / f'{candidate.name}_{fold}.json'


def table(work: Path) -> list[str]:
    """Of a data set, for each start: all candidates in fold 0, then those that were trained in every fold."""
    found = {c: {fold: json.loads(measured(work, c, fold).read_text()) for fold in FOLDS
                 if measured(work, c, fold).is_file()} for c in CANDIDATES}
    if 0 not in found[DEFAULT]:
        return ['**Not run.**', '']
    lines = [f'Validation cases of fold 0: {len(found[DEFAULT][0][NO_CHAIN]["NLL"])}.', '']
    for folds in (FOLDS[:1], FOLDS):
        there = {c: [of[fold] for fold in folds] for c, of in found.items() if set(folds) <= set(of)}
        if len(there) < 2:
            continue
        lines += [f'### {"Three trainings" if len(folds) > 1 else "Fold 0, one training"}', '',
                  f'| | | {" | ".join(f"{value} | Δ" for value in VALUES)} |\n|' + '---|' * (2 + 2 * len(VALUES))]
        for start in STARTS:
            default = there[DEFAULT]
            rows = [(DEFAULT.title, default, start), (STOCK, default, STOCK), *(
                (c.title, of, NO_CHAIN if c.starts == (NO_CHAIN,) else start) for c, of in there.items()
                if c is not DEFAULT and (start in (c.starts or STARTS) or c.starts == (NO_CHAIN,)))]
            lines += [f'| {start} | {title} | {columns(of, which, default, start)} |' for title, of, which in rows]
        lines.append('')
    return lines


def columns(of: list[Found], which: str, default: list[Found], start: str) -> str:
    """Means over folds and cases, and differences to the default."""
    texts = []
    number = min(len(fold[start]['NLL']) for fold in default)
    for value, digits in VALUES.items():
        one, other = (np.array([fold[key][value][:number] for fold in folds])
                      for folds, key in ((of, which), (default, start)))
        delta = interval(mean_and_interval(one - other), digits) if (one != other).any() else ''
        texts.append(f'{one.mean():.{digits}f} | {delta}')
    return ' | '.join(texts)


def interval(values: tuple[float, float, float], digits: int) -> str:
    """A difference with its interval, bold if that excludes 0."""
    text = '{:+.{d}f} ({:+.{d}f} to {:+.{d}f})'.format(*values, d=digits)
    return f'**{text}**' if values[1] * values[2] > 0 else text


def main() -> None:
    args = parse(__doc__, 'Dataset004_Hippocampus and bubil_cells', 'candidates.md', STAGES)
    work = Path(args.o).resolve()
    parts = [part for part in DATASETS if part in args.stages]
    if not parts and args.stages != ['table']:
        sys.exit(f'Name a data set beside the stages {" ".join(args.stages)}: {" or ".join(DATASETS)}.')
    for part in parts if 'prepare' in args.stages else ():
        if part == 'cells':
            cells.prepare(work / part, cells.find_data(args.data))
        else:
            hippocampus.prepare(work / part, hippocampus.find_data(args.data), CONFIGURATION, BATCH_SIZE)
    for part in parts if 'train' in args.stages else ():
        train_all(work / part, DATASETS[part])
    for part in parts:
        if len(args.stages) > 1:  # each has nnU-Net's folders of its own
            subprocess.run([sys.executable, __file__, '-o', str(work), '--stages', part], check=True)
        else:
            os.environ.update({**nnunet_environment(work / part), **cells.VARIABLES})
            measure(work / part, part)
    if 'table' in args.stages:
        write_table(work, Path(args.table))


def train_all(work: Path, dataset: str) -> None:
    """Stock in every fold, candidates in fold 0 or in every fold."""
    for fold in FOLDS:
        train(work, cells.STOCK_TRAINER, fold, dataset, CONFIGURATION, **cells.VARIABLES)
    for candidate in CANDIDATES:
        for fold in FOLDS if candidate.every_fold else FOLDS[:1]:
            train(work, candidate.trainer, fold, dataset, CONFIGURATION, **cells.VARIABLES)


def measure(work: Path, part: str) -> None:
    """Of all models that are trained, what is not there yet."""
    torch.set_num_threads(1)
    sys.path.append(str(HERE / 'trainers'))
    for fold in FOLDS:
        for candidate in CANDIDATES:
            file = measured(work, candidate, fold)
            model = fold_folder(work, candidate.trainer, fold, DATASETS[part], CONFIGURATION)
            if not file.is_file() and (model / 'checkpoint_final.pth').is_file():
                file.parent.mkdir(exist_ok=True)
                with asked_for_mask(candidate.for_mask):
                    file.write_text(json.dumps(MEASURES[part](work, candidate, fold)))


@contextmanager
def asked_for_mask(asked: bool) -> Iterator[None]:
    """Within it a network that was told which takes x_t for one of the pre-segmentation, if asked."""
    os.environ['BENCHMARK_FOR_MASK'] = str(int(asked))
    try:
        yield
    finally:
        del os.environ['BENCHMARK_FOR_MASK']


def write_table(work: Path, file: Path) -> None:
    """Of the data sets that were measured."""
    lines = [TEXT.format(machine=machine(), autocast=AUTOCAST, batch=BATCH_SIZE, every=EVERY)]
    for part in MEASURES:
        lines += [f'## {part.capitalize()}', '', *table(work / part)]
    file.write_text('\n'.join(lines))


if __name__ == '__main__':
    main()
