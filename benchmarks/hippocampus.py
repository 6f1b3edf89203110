"""Stock nnU-Net against PDDDPM on the Medical Segmentation Decathlon's hippocampus, with nnU-Net's own commands."""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scale import DEVICE, FULL, PLANS, results

DATASET_ID = 4
DATASET = 'Dataset004_Hippocampus'
CONFIGURATION = '3d_fullres'
STOCK_TRAINER = 'nnUNetTrainerBenchmark'
CONTROL_TRAINER = 'nnUNetTrainerBenchmarkLonger'
PDDDPM_TRAINER = 'PDDDPMTrainerBenchmark'
DIRECT_TRAINER = 'PDDDPMTrainerBenchmarkDirect'
DIRECT_CE_TRAINER = 'PDDDPMTrainerBenchmarkDirectCE'
TRUTH_TRAINER = 'PDDDPMTrainerBenchmarkTruth'
PAPER_TRAINER = 'PDDDPMTrainerBenchmarkPaper'
STAGES = ('prepare', 'stock', 'pdddpm', 'tune', 'evaluate')
SPLIT_SEED = 2210
NUM_TEST = 50
NUM_FOLDS = 3
TUNING_MINUTES = (10, 4, 4)  # by fold
HERE = Path(__file__).resolve().parent


def find_data(argument: str | None, dataset: str = DATASET) -> Path:
    """Folder of a data set below the one that the argument or `NNUNET_PDDDPM_DATA` names."""
    value = argument or os.environ.get('NNUNET_PDDDPM_DATA')
    if value is None:
        sys.exit(f'Say where {dataset} lies: pass -data FOLDER or set NNUNET_PDDDPM_DATA.')
    folder = Path(value) / dataset
    if not (folder / 'dataset.json').is_file():
        sys.exit(f'{folder} holds no dataset.json; -data must name the folder that contains {dataset}.')
    return folder


def nnunet_environment(work: Path) -> dict[str, str]:
    """Environment of the nnU-Net commands: its three folders below `work`, the trainers; on a CPU one data worker."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith('nnUNet_pdddpm_')}
    return {**kept, 'nnUNet_raw': str(work / 'nnUNet_raw'), 'nnUNet_results': str(work / 'nnUNet_results'),
            'nnUNet_preprocessed': str(work / 'nnUNet_preprocessed'),
            'nnUNet_extTrainer': os.pathsep.join([str(HERE / 'trainers'), str(HERE.parent / 'trainers')]),
            **({} if FULL else {'nnUNet_n_proc_DA': '1'}), 'nnUNet_def_n_proc': '2',
            'nnUNet_pdddpm_presegmenter': STOCK_TRAINER}


def call(work: Path, *command: str, **variables: str) -> None:
    """Run an nnU-Net command beside this Python, with further environment variables; stop at the first failure."""
    executable = Path(sys.executable).parent / command[0]
    print('$', *(f'{name}={value}' for name, value in variables.items()), *command, flush=True)
    subprocess.run([str(executable), *command[1:]], env={**nnunet_environment(work), **variables}, check=True)


def prepare(work: Path, data: Path, configuration: str = CONFIGURATION, batch_size: int = 2) -> None:
    """Split off the test cases, write the raw data set, plan, reduce the plan, preprocess, write the folds."""
    raw = work / 'nnUNet_raw' / DATASET
    preprocessed = work / 'nnUNet_preprocessed' / DATASET
    if (preprocessed / 'splits_final.json').is_file():
        return
    cases = sorted(p.name[:-len('.nii.gz')] for p in (data / 'labelsTr').glob('*.nii.gz'))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(cases))
    test = sorted(cases[i] for i in order[:NUM_TEST])
    development = [cases[i] for i in order[NUM_TEST:]]
    for case in cases:
        part = 'Ts' if case in test else 'Tr'
        for kind, suffix in (('images', '_0000'), ('labels', '')):
            target = raw / (kind + part)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / f'{kind}Tr' / f'{case}{suffix}.nii.gz', target / f'{case}{suffix}.nii.gz')
    description = json.loads((data / 'dataset.json').read_text())
    description['numTraining'] = len(development)
    (raw / 'dataset.json').write_text(json.dumps(description, indent=1))

    call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(DATASET_ID), '-c', configuration, '-np', '2',
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


def tune(work: Path, trainer: str, fold: int) -> None:
    """`nnUNetv2_pdddpm_tune` unless it has been."""
    if not (fold_folder(work, trainer, fold) / 'sampling_sweep.json').is_file():
        call(work, 'nnUNetv2_pdddpm_tune', DATASET, CONFIGURATION, str(fold), '-tr', trainer, '-p', PLANS, '-device',
             DEVICE, '-budget', str(TUNING_MINUTES[fold]))


def mean_and_interval(of: np.ndarray) -> tuple[float, float, float]:
    """Mean of differences (trainings, cases), and its 95 % interval: a bootstrap that draws both."""
    rng = np.random.default_rng(0)
    trainings, cases = (rng.integers(n, size=(10_000, n)) for n in of.shape)
    low, high = np.quantile(of[trainings[:, :, None], cases[:, None, :]].mean((1, 2)), [0.025, 0.975])
    return float(of.mean()), float(low), float(high)


def parse(description: str | None, dataset: str, table: str, stages: Sequence[str]) -> argparse.Namespace:
    """The command line of a benchmark in stages.

    Args:
        description: of the benchmark.
        dataset: folder of the data set.
        table: file name of the table in docs/results.
        stages: names of the stages, all of which are run unless some are named.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('-data', help=f'folder that contains {dataset} (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, help="work folder: nnU-Net's three folders, predictions and measurements")
    parser.add_argument('-table', default=str(results() / table),
                        help='the table to write; figures beside it')
    parser.add_argument('--stages', nargs='+', choices=stages, default=list(stages))
    return parser.parse_args()


def main() -> None:
    args = parse(__doc__, DATASET, 'hippocampus.md', STAGES)
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work, find_data(args.data))
    if 'stock' in args.stages:
        for fold in range(NUM_FOLDS):
            train(work, STOCK_TRAINER, fold)
    if 'pdddpm' in args.stages:
        for trainer in (PDDDPM_TRAINER, DIRECT_TRAINER, DIRECT_CE_TRAINER, TRUTH_TRAINER, CONTROL_TRAINER):
            train(work, trainer, 0)
        for fold in range(1, NUM_FOLDS):
            train(work, PDDDPM_TRAINER, fold)
        train(work, PAPER_TRAINER, 0)
    if 'tune' in args.stages:
        for trainer, fold in ((TRUTH_TRAINER, 0), *((PDDDPM_TRAINER, fold) for fold in range(NUM_FOLDS))):
            tune(work, trainer, fold)
        shutil.copyfile(fold_folder(work, PDDDPM_TRAINER, 0) / 'sampling_sweep.png',
                        Path(args.table).with_name('sampling_sweep.png'))
    if 'evaluate' in args.stages:
        os.environ.update(nnunet_environment(work))
        sys.path.append(str(HERE / 'trainers'))
        from hippocampus_evaluation import evaluate, write_table  # reads nnU-Net's folders from the environment
        evaluate(work)
        write_table(work, Path(args.table))


if __name__ == '__main__':
    main()
