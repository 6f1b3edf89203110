"""Stock nnU-Net, its controls and PDDDPM on the Medical Segmentation Decathlon's hippocampus: three trainings."""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from scale import DEVICE, FULL, PLANS, results

from nnunet_pdddpm.inference.intervals import Features
from nnunet_pdddpm.network.settings import package_variables

DATASET_ID = 4
DATASET = 'Dataset004_Hippocampus'
CONFIGURATION = '3d_fullres'
STOCK_TRAINER = 'nnUNetTrainerBenchmark'
CONTROL_TRAINER = 'nnUNetTrainerBenchmarkLonger'
PDDDPM_TRAINER = 'PDDDPMTrainerBenchmark'
SECOND_TRAINER = 'PDDDPMTrainerBenchmarkSecond'
STAGES = ('prepare', 'train', 'tune', 'measure', 'table')
SPLIT_SEED = 2210
NUM_TEST = 50
NUM_FOLDS = 3
TUNING_MINUTES = 6
HERE = Path(__file__).resolve().parent


def find_data(argument: str | None, dataset: str = DATASET, holds: str = 'dataset.json') -> Path:
    """Folder of a data set, which holds a certain file, below the one that the argument or `NNUNET_PDDDPM_DATA` names.
    """
    value = argument or os.environ.get('NNUNET_PDDDPM_DATA')
    if value is None:
        sys.exit(f'Say where {dataset} lies: pass -data FOLDER or set NNUNET_PDDDPM_DATA.')
    folder = Path(value) / dataset
    if not (folder / holds).exists():
        sys.exit(f'{folder} holds no {holds}; -data must name the folder that contains {dataset}.')
    return folder


def nnunet_environment(work: Path) -> dict[str, str]:
    """Environment of the nnU-Net commands: its three folders below `work`, the trainers; on a CPU one data worker."""
    kept = {k: v for k, v in os.environ.items() if k not in package_variables()}
    return {**kept, 'nnUNet_raw': str(work / 'nnUNet_raw'), 'nnUNet_results': str(work / 'nnUNet_results'),
            'nnUNet_preprocessed': str(work / 'nnUNet_preprocessed'),
            'nnUNet_extTrainer': os.pathsep.join([str(HERE / 'trainers'), str(HERE.parent / 'trainers')]),
            **({} if FULL else {'nnUNet_n_proc_DA': '1'}), 'nnUNet_def_n_proc': str(os.cpu_count()),
            'nnUNet_pdddpm_presegmenter': STOCK_TRAINER}


def call(work: Path, *command: str, **variables: str) -> None:
    """Run an nnU-Net command beside this Python, with further environment variables; stop at the first failure."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    executable = shutil.which(command[0], path=folders)
    if executable is None:
        sys.exit(f'{command[0]} is neither beside {sys.executable} nor in PATH: install nnU-Net and this project.')
    print('$', *(f'{name}={value}' for name, value in variables.items()), *command, flush=True)
    subprocess.run([executable, *command[1:]], env={**nnunet_environment(work), **variables}, check=True)


def prepare(work: Path, data: Path, configuration: str = CONFIGURATION, batch_size: int = 2,
            num_test: int = NUM_TEST) -> None:
    """Split off the test cases, write the raw data set, plan, reduce the plan, preprocess, write the folds."""
    raw = work / 'nnUNet_raw' / DATASET
    preprocessed = work / 'nnUNet_preprocessed' / DATASET
    if (preprocessed / 'splits_final.json').is_file():
        return
    cases = sorted(p.name[:-len('.nii.gz')] for p in (data / 'labelsTr').glob('*.nii.gz'))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(cases))
    test = sorted(cases[i] for i in order[:num_test])
    development = [cases[i] for i in order[num_test:]]
    for case in cases:
        part = 'Ts' if case in test else 'Tr'
        for kind, suffix in (('images', '_0000'), ('labels', '')):
            target = raw / (kind + part)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / f'{kind}Tr' / f'{case}{suffix}.nii.gz', target / f'{case}{suffix}.nii.gz')
    description = json.loads((data / 'dataset.json').read_text())
    description['numTraining'] = len(development)
    (raw / 'dataset.json').write_text(json.dumps(description, indent=1))

    call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(DATASET_ID), '-c', configuration, '-np', str(os.cpu_count()),
         '--verify_dataset_integrity')
    if not FULL:
        plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
        plans['plans_name'] = PLANS
        planned = plans['configurations'][configuration]
        planned['batch_size'] = batch_size
        planned['architecture']['arch_kwargs']['features_per_stage'] = [16, 32, 64, 128]
        (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans, indent=1))
    folds = [sorted(development[f::NUM_FOLDS]) for f in range(NUM_FOLDS)]
    splits = [{'train': sorted(set(development) - set(fold)), 'val': fold} for fold in folds]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits, indent=1))


def fold_folder(work: Path, trainer: str, fold: int, dataset: str = DATASET,
                configuration: str = CONFIGURATION) -> Path:
    """Of a trained model."""
    return work / 'nnUNet_results' / dataset / f'{trainer}__{PLANS}__{configuration}' / f'fold_{fold}'


def train(work: Path, trainer: str, fold: int, dataset: str = DATASET, configuration: str = CONFIGURATION,
          **variables: str) -> None:
    """Train one fold with `nnUNetv2_train` unless its final checkpoint is there; resumes if interrupted.

    `variables`: further environment variables.
    """
    if not (fold_folder(work, trainer, fold, dataset, configuration) / 'checkpoint_final.pth').is_file():
        call(work, 'nnUNetv2_train', dataset, configuration, str(fold), '-tr', trainer, '-p', PLANS, '-device', DEVICE,
             '--c', **variables)


def volume_row(true: float, features: Features, volumes: np.ndarray) -> dict[str, list[float]]:
    """What intervals of a label's volume are made of and measured by in one case: see `inference.intervals.FIELDS`."""
    return {'fields': [true, *(float(of[0]) for of in features), float(len(volumes))], 'samples': volumes.tolist()}


def tune(work: Path, trainer: str, fold: int) -> None:
    """`nnUNetv2_pdddpm_tune` unless it has been."""
    if not (fold_folder(work, trainer, fold) / 'sampling_sweep.json').is_file():
        call(work, 'nnUNetv2_pdddpm_tune', DATASET, CONFIGURATION, str(fold), '-tr', trainer, '-p', PLANS, '-device',
             DEVICE, '-budget', str(TUNING_MINUTES), '--disable_progress_bar')


def parse(description: str | None, dataset: str, table: str, stages: Sequence[str],
          numbers: Mapping[str, tuple[int, str]] = MappingProxyType({})) -> argparse.Namespace:
    """The command line of a benchmark in stages.

    Args:
        description: of the benchmark.
        dataset: folder of the data set.
        table: file name of the table in docs/results.
        stages: names of the stages, all of which are run unless some are named.
        numbers: further arguments, each with its default and its help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('-data', help=f'folder that contains {dataset} (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, help="work folder: nnU-Net's three folders, predictions and measurements")
    parser.add_argument('-table', default=str(results() / table),
                        help='the table to write; figures beside it')
    parser.add_argument('--stages', nargs='+', choices=stages, default=list(stages))
    for name, (default, text) in numbers.items():
        parser.add_argument(name, type=int, default=default, help=f'{text} (default {default})')
    return parser.parse_args()


def main() -> None:
    args = parse(__doc__, DATASET, 'hippocampus.md', STAGES)
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work, find_data(args.data))
    for fold in range(NUM_FOLDS):
        if 'train' in args.stages:
            for trainer in (STOCK_TRAINER, CONTROL_TRAINER, SECOND_TRAINER, PDDDPM_TRAINER):
                train(work, trainer, fold)
        if 'tune' in args.stages:
            tune(work, PDDDPM_TRAINER, fold)
    os.environ.update(nnunet_environment(work))
    sys.path.append(str(HERE / 'trainers'))
    if {'measure', 'table'} & set(args.stages):
        from hippocampus_rows import measure, write_table  # reads nnU-Net's folders from the environment
        if 'measure' in args.stages:
            measure(work)
        if 'table' in args.stages:
            write_table(work, Path(args.table))


if __name__ == '__main__':
    main()
