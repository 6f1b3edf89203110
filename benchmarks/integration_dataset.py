"""One data set of integration.py, in nnU-Net's folders as the environment names them.

Training, validation and the search for the best configuration call nnU-Net's classes in this process; the prediction,
ensembling and postprocessing are its commands.
"""
from __future__ import annotations

import json
import multiprocessing
import multiprocessing.dummy
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from integration import CONFIGURATIONS, NUM_TEST, REFINED, STOCK
from nnunetv2.evaluation.find_best_configuration import (
    dumb_trainer_config_plans_to_trained_models_dict,
    find_best_configuration,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprint_dataset,
    plan_experiment_dataset,
    preprocess_dataset,
)
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name

CONVERTERS = {996: 'IntegrationTest_Hippocampus_regions_ignore', 997: 'IntegrationTest_Hippocampus_regions',
              998: 'IntegrationTest_Hippocampus_ignore', 999: 'IntegrationTest_Hippocampus'}
PLANS = 'nnUNetPlansIntegration'
FOLDS = (0, 1, 2)


def folder(variable: str, dataset: int) -> Path:
    return Path(os.environ[variable]) / convert_id_to_dataset_name(dataset)


def plan(dataset: int) -> None:
    """Plan, reduce the plans, add a cascade (hippocampus is too small for one), write the folds, preprocess."""
    os.environ['nnUNet_n_proc_DA'] = '1'  # the planner takes no 0
    extract_fingerprint_dataset(dataset, num_processes=1, check_dataset_integrity=True)
    plan_experiment_dataset(dataset)
    os.environ['nnUNet_n_proc_DA'] = '0'
    preprocessed = folder('nnUNet_preprocessed', dataset)
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    configurations = plans['configurations'] = {name: plans['configurations'][name] for name in ('2d', '3d_fullres')}
    for name, patch in (('2d', [40, 40]), ('3d_fullres', [24, 32, 24])):
        configurations[name].update(patch_size=patch, batch_size=2 if len(patch) == 3 else 8)
        configurations[name]['architecture']['arch_kwargs'].update(
            n_stages=3, features_per_stage=[8, 16, 32], kernel_sizes=[[3] * len(patch)] * 3,
            strides=[[n] * len(patch) for n in (1, 2, 2)], n_conv_per_stage=[1] * 3, n_conv_per_stage_decoder=[1] * 2)
    configurations['3d_lowres'] = {
        'inherits_from': '3d_fullres', 'data_identifier': f'{PLANS}_3d_lowres', 'patch_size': [16, 24, 16],
        'spacing': [1.5 * s for s in configurations['3d_fullres']['spacing']], 'next_stage': '3d_cascade_fullres'}
    configurations['3d_cascade_fullres'] = {'inherits_from': '3d_fullres', 'previous_stage': '3d_lowres'}
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans))
    cases = sorted(p.name[:-7] for p in (folder('nnUNet_raw', dataset) / 'labelsTr').glob('*.nii.gz'))
    splits = [{'train': [c for c in cases if c not in cases[f::3]], 'val': cases[f::3]} for f in FOLDS]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits))
    preprocess_dataset(dataset, PLANS, ('2d', '3d_fullres', '3d_lowres'), (1, 1, 1))


def train(dataset: int, trainer: str, configuration: str, fold: int) -> None:
    """As `nnUNetv2_train --npz` does."""
    torch.manual_seed(fold)
    np.random.seed(fold)
    of_fold = get_trainer_from_args(str(dataset), configuration, fold, trainer, PLANS, device=torch.device('cpu'))
    of_fold.run_training()
    of_fold.perform_actual_validation(save_probabilities=True)


def call(*command: str) -> None:
    """Run a command of nnU-Net; an error ends the data set."""
    print('$', *command, flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


def predict_cascade(dataset: int, trainer: str, previous: Path, output: Path) -> None:
    """The held-out cases in both stages, by all folds of a trainer."""
    for configuration, target, flags in (('3d_lowres', previous, ()),
                                         ('3d_cascade_fullres', output, ('-prev_stage_predictions', str(previous),
                                                                         '--save_probabilities'))):
        call('nnUNetv2_predict', '-i', str(folder('nnUNet_raw', dataset) / 'imagesTs'), '-o', str(target),
             '-d', str(dataset), '-tr', trainer, '-p', PLANS, '-c', configuration, '-f', *map(str, FOLDS),
             '-device', 'cpu', *flags)


def run_printed_commands(dataset: int, output: Path) -> Iterable[str]:
    """The commands of find_best_configuration, which know neither folders nor that there is no GPU.

    It prints no `-prev_stage_predictions` for a cascade, whatever the trainer (nnU-Net 2.8.1): they are made and added.
    """
    text = (folder('nnUNet_results', dataset) / 'inference_instructions.txt').read_text()
    for i, command in enumerate(re.findall(r'^nnUNetv2_.*$', text, re.MULTILINE)):
        words = [str(output / word) if word.startswith('OUTPUT_FOLDER') else word for word in
                 command.replace('INPUT_FOLDER', str(folder('nnUNet_raw', dataset) / 'imagesTs')).split()]
        if words[0] == 'nnUNetv2_predict':
            words += ['-device', 'cpu']
            if words[words.index('-c') + 1] == '3d_cascade_fullres':
                previous = output / f'previous_{i}'
                call(*(str(previous) if word == words[words.index('-o') + 1] else
                       '3d_lowres' if word == '3d_cascade_fullres' else word for word in words))
                words += ['-prev_stage_predictions', str(previous)]
        call(*words)
        yield words[0]


def check_masks(dataset: int, masks: Path) -> None:
    """Every held-out case has a mask with its image's geometry, some foreground and no label that is not predicted."""
    raw = folder('nnUNet_raw', dataset)
    labels = json.loads((raw / 'dataset.json').read_text())['labels']
    known = set(np.hstack([value for name, value in labels.items() if name != 'ignore']))
    images = sorted((raw / 'imagesTs').glob('*.nii.gz'))
    if len(images) != NUM_TEST:
        sys.exit(f'{raw}/imagesTs holds {len(images)} cases instead of {NUM_TEST}.')
    for file in images:
        image, mask = sitk.ReadImage(str(file)), sitk.ReadImage(str(masks / file.name.replace('_0000', '')))
        for of_image, of_mask in ((image.GetSize(), mask.GetSize()), (image.GetSpacing(), mask.GetSpacing()),
                                  (image.GetOrigin(), mask.GetOrigin()), (image.GetDirection(), mask.GetDirection())):
            if not np.allclose(of_image, of_mask):
                sys.exit(f'{masks}: {file.name} has the geometry {of_image} and its mask {of_mask}.')
        found = set(np.unique(sitk.GetArrayFromImage(mask)))
        if not found <= known or found == {0}:
            sys.exit(f'{masks}: the mask of {file.name} holds the labels {sorted(found)}.')


def main(dataset: int, results: Path) -> None:
    done: dict = {'folds': {}}

    def keep() -> None:
        results.write_text(json.dumps(done, indent=1))

    # an own process of nnU-Net's pools imports nnU-Net for seconds, hundreds of times here
    multiprocessing.get_context = lambda method=None: multiprocessing.dummy
    runpy.run_module(f'nnunetv2.dataset_conversion.datasets_for_integration_tests.Dataset{dataset}_{CONVERTERS[dataset]}',
                     run_name='__main__')
    plan(dataset)
    for trainer in (STOCK, REFINED):
        for configuration in CONFIGURATIONS:
            for fold in FOLDS:
                train(dataset, trainer, configuration, fold)
                done['folds'][f'{trainer} {configuration}'] = fold + 1
                keep()

    models = dumb_trainer_config_plans_to_trained_models_dict([STOCK, REFINED], list(CONFIGURATIONS), [PLANS])
    found = find_best_configuration(dataset, models, num_processes=1, folds=FOLDS, strict=True)
    done['dice'] = {f'{m["trainer"]} {m["configuration"]}':
                    found['all_results'][f'{m["trainer"]}__{PLANS}__{m["configuration"]}'] for m in models}
    best = found['best_model_or_ensemble']['selected_model_or_models']
    done['best'] = ' + '.join(f'{m["trainer"]} {m["configuration"]}' for m in best)
    keep()

    output = results.parent / f'predictions_{dataset}'
    commands = list(run_printed_commands(dataset, output))
    check_masks(dataset, output / 'OUTPUT_FOLDER_PP')
    done['printed'] = f'{len(commands)} run'
    keep()

    of_trainers = [output / trainer for trainer in (STOCK, REFINED)]
    for trainer, target in zip((STOCK, REFINED), of_trainers, strict=True):
        predict_cascade(dataset, trainer, output / f'{trainer}_previous', target)
        check_masks(dataset, target)
    call('nnUNetv2_ensemble', '-i', *map(str, of_trainers), '-o', str(output / 'ensemble'), '-np', '1')
    call('nnUNetv2_apply_postprocessing', '-i', str(output / 'ensemble'), '-o', str(output / 'ensemble_pp'),
         '-pp_pkl_file', found['best_model_or_ensemble']['postprocessing_file'],
         '-plans_json', found['best_model_or_ensemble']['some_plans_file'], '-np', '1')
    check_masks(dataset, output / 'ensemble_pp')
    done['ensemble'] = f'{NUM_TEST} cases'
    keep()


if __name__ == '__main__':
    main(int(sys.argv[1]), Path(sys.argv[2]))
