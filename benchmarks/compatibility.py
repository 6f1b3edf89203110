"""Cells of the compatibility table on real data, with nnU-Net's own commands: regions in 2d and 3d, a large volume.

Hippocampus as overlapping regions (whole = {1, 2}, posterior = {2}), and MSLesion: three channels, 182 x 218 x 182
voxels, three cases with an own split. A token number of iterations each; seconds and peak memory of every command.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hippocampus import DATASET as HIPPOCAMPUS
from hippocampus import find_data, nnunet_environment
from integration import copy_cases

LESION = 'Dataset006_MSLesion'
PLANS = 'nnUNetPlansReduced'
FEATURES = [8, 16, 32, 64]
NUM_TRAINING, NUM_TEST = 45, 5


class Run(NamedTuple):
    """What is trained and predicted: a stock model, then PDDDPM, of fold 0."""
    dataset: str
    configuration: str
    patch_size: list[int]
    batch_size: int
    length: str
    """Ending of the trainers' names, see trainers/short_trainers.py."""


RUNS = (Run('Dataset804_HippocampusRegions', '3d_fullres', [40, 56, 40], 2, 'Token'),
        Run(LESION, '3d_fullres', [96, 96, 96], 2, 'Glimpse'),
        Run('Dataset804_HippocampusRegions', '2d', [56, 40], 16, 'Token'))


def measured(work: Path, trainer: str, *command: str) -> tuple[float, float]:
    """Run a command; seconds, and GiB of the largest of its processes. An error ends the benchmark.

    Args:
        work: the work folder.
        trainer: the stock trainer, for PDDDPM to find its model.
        command: with its arguments.
    """
    print('$', *command, flush=True)
    environment = {**nnunet_environment(work), 'nnUNet_pdddpm_presegmenter': trainer}
    start = time.monotonic()
    process = subprocess.Popen([str(Path(sys.executable).parent / command[0]), *command[1:]], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f'{" ".join(command)} failed with exit status {process.returncode}.')
    return time.monotonic() - start, usage.ru_maxrss / (1024 ** 3 if sys.platform == 'darwin' else 1024 ** 2)


def prepare(work: Path, data: str | None, all_runs: Sequence[Run] = RUNS) -> None:
    """Raw data sets, nnU-Net's planning and preprocessing, reduced plans, three folds (MSLesion: one case each)."""
    for dataset in dict.fromkeys(run.dataset for run in all_runs):
        raw, preprocessed = work / 'nnUNet_raw' / dataset, work / 'nnUNet_preprocessed' / dataset
        if (preprocessed / f'{PLANS}.json').is_file():
            continue
        if dataset == LESION:
            shutil.copytree(find_data(data, LESION), raw, dirs_exist_ok=True)
            shutil.copytree(raw / 'imagesTr', raw / 'imagesTs', dirs_exist_ok=True,
                            ignore=lambda folder, names: [n for n in names if not n.startswith('ms_07')])
        else:
            copy_cases(find_data(data, HIPPOCAMPUS), raw, NUM_TRAINING, NUM_TEST, regions_class_order=[1, 2],
                       labels={'background': 0, 'whole': [1, 2], 'posterior': 2})
        runs = [run for run in all_runs if run.dataset == dataset]
        measured(work, '', 'nnUNetv2_plan_and_preprocess', '-d', dataset[7:10], '-c', *(r.configuration for r in runs),
                 '-npfp', '2', '-np', *['2'] * len(runs), '--verify_dataset_integrity')
        plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
        plans['plans_name'] = PLANS
        for run in runs:
            dims = len(run.patch_size)
            plans['configurations'][run.configuration].update(patch_size=run.patch_size, batch_size=run.batch_size)
            plans['configurations'][run.configuration]['architecture']['arch_kwargs'].update(
                n_stages=4, features_per_stage=FEATURES, kernel_sizes=[[3] * dims] * 4,
                strides=[[n] * dims for n in (1, 2, 2, 2)], n_conv_per_stage=[2] * 4, n_conv_per_stage_decoder=[2] * 3)
        (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans))
        cases = sorted(p.name[:-7] for p in (raw / 'labelsTr').glob('*.nii.gz'))
        splits = [{'train': [c for c in cases if c not in cases[f::3]], 'val': cases[f::3]} for f in range(3)]
        (preprocessed / 'splits_final.json').write_text(json.dumps(splits))


def execute(work: Path, run: Run) -> None:
    """Train, validate and predict; prints the rows of a table."""
    stock, refined = (f'{kind}{run.length}' for kind in ('nnUNetTrainer', 'PDDDPMTrainer'))
    model = ('-p', PLANS, '-device', 'cpu')
    for trainer in (stock, refined):
        training = measured(work, stock, 'nnUNetv2_train', run.dataset, run.configuration, '0', '-tr', trainer, *model)
        validation = (work / 'nnUNet_results' / run.dataset / f'{trainer}__{PLANS}__{run.configuration}' / 'fold_0' /
                      'validation' / 'summary.json')
        dice = json.loads(validation.read_text())['foreground_mean']['Dice']
        commands = {'nnUNetv2_predict': ()}
        if trainer == refined:
            commands['nnUNetv2_pdddpm_predict'] = ('--report',)
        for command, flags in commands.items():
            source = work / 'nnUNet_raw' / run.dataset / 'imagesTs'
            output = work / 'predictions' / f'{run.dataset}_{run.configuration}_{trainer}_{command}'
            seconds, memory = measured(work, stock, command, '-i', str(source), '-o', str(output), '-d', run.dataset,
                                       '-c', run.configuration, '-tr', trainer, '-f', '0', '-npp', '1', '-nps', '1',
                                       *model, *flags)
            images = list(source.glob('*_0000.nii.gz'))
            if missing := [i.name for i in images if not (output / i.name.replace('_0000', '')).is_file()]:
                sys.exit(f'{output} lacks the masks of {missing}.')
            patch = 'x'.join(map(str, run.patch_size))
            print(f'| {run.dataset[11:]} | {run.configuration}, patch {patch}, batch {run.batch_size} | '
                        f'{trainer} | {training[0]:.0f} | {training[1]:.1f} | {dice:.3f} | '
                        f'{" ".join([command, *flags])} | '
                        f'{seconds / len(images):.0f} ({len(images)}) | {memory:.1f} |', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-data', help=f'folder that contains {HIPPOCAMPUS} and {LESION} (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, help="work folder: nnU-Net's three folders and predictions")
    args = parser.parse_args()
    work = Path(args.o).resolve()
    prepare(work, args.data)
    print('| data set | configuration | trainer | training, s | GiB | Dice in validation | prediction '
          '| s per case (cases) | GiB |', '|---' * 9 + '|', sep='\n', flush=True)
    for run in RUNS:
        execute(work, run)


if __name__ == '__main__':
    main()
