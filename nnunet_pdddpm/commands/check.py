"""nnUNetv2_pdddpm_check: what training and prediction need, whether it is there, and what to do where it is not."""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import nnunetv2
import numpy as np
import torch

import nnunet_pdddpm
from nnunet_pdddpm.commands.arguments import PLANS, TRAINER
from nnunet_pdddpm.commands.check_dataset import check_dataset, environment_problem, row
from nnunet_pdddpm.network.settings import ENVIRONMENT_PREFIX, package_variables
from nnunet_pdddpm.versions import require_nnunet

SHIM = Path('nnunetv2', 'training', 'nnUNetTrainer', 'variants', 'pdddpm')


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report; exit with 1 if training or predicting would fail."""
    parser = argparse.ArgumentParser(
        description='Check that everything is in place for training and prediction with PDDDPMTrainer.')
    parser.add_argument('dataset', metavar='DATASET', nargs='?',
                        help='id or name of a data set to check as well (default: none)')
    parser.add_argument('-c', metavar='CONFIG', help='its configuration (default: all configurations of the plans)')
    parser.add_argument('-p', metavar='PLANS', default=PLANS, help='its plans (default: %(default)s)')
    args = parser.parse_args(arguments)
    if args.c is not None and args.dataset is None:
        parser.error('-c needs a DATASET')

    problems: list[str] = []
    commands = ['nnUNetv2_pdddpm_check DATASET']
    check_versions(problems)
    if not problems:
        check_trainer(problems)
    folders_are_there = check_folders(problems)
    print_devices()
    check_environment(problems)
    if args.dataset is not None and folders_are_there:
        commands = check_dataset(args.dataset, args.p, args.c, problems)
    elif args.dataset is not None:
        print(f'Data set {args.dataset}: not checked without these folders')
    print()
    for problem in problems:
        print(f'Problem: {problem}')
    if problems:
        sys.exit(1)
    print('Ready. What can be run next:')
    for command in commands:
        print(f'  {command}')


def check_versions(problems: list[str]) -> None:
    """Versions, and where this package and nnU-Net are imported from."""
    try:
        nnunet = require_nnunet()
    except ImportError as error:
        nnunet = 'not usable'
        problems.append(str(error))
    print('Versions')
    row('nnunet-pdddpm', f'{nnunet_pdddpm.__version__} in {Path(nnunet_pdddpm.__file__).parent}')
    row('nnunetv2', f'{nnunet} in {nnunetv2.__path__[0]}')
    row('torch', torch.__version__)
    row('numpy', np.__version__)
    row('Python', platform.python_version())


def check_trainer(problems: list[str]) -> None:
    """Look the trainer up as nnU-Net does, and tell where it was found."""
    problem = find_trainer(TRAINER)
    if problem:
        problems.append(problem)
    print('Trainer')
    row(TRAINER, 'not found' if problem else discovery_route())


def find_trainer(trainer: str) -> str:
    """Let nnU-Net find a trainer; the empty string if it does, else why not and what to do."""
    if getattr(nnunetv2, '__file__', None) is None:
        return ('nnunetv2 is installed editable (pip install -e), and what nnunet-pdddpm installs into nnunetv2 hides '
                'it from Python: install it again with pip install PATH_OF_NNUNET, or with pip install -e '
                'PATH_OF_NNUNET --config-settings editable_mode=compat.')
    try:
        from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name  # not in older versions
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            recursive_find_trainer_class_by_name(trainer)
    except RuntimeError:
        return f'nnU-Net does not find {trainer}: {discovery_remedy()}'
    except Exception as error:  # noqa: BLE001 a trainer that is imported may raise anything
        return (f"nnU-Net's search for {trainer} ends at a trainer that cannot be imported ({type(error).__name__}: "
                f'{error}): repair that trainer, or take its folder out of nnUNet_extTrainer.')
    return ''


def external_folders() -> list[str]:
    """The folders in nnUNet_extTrainer."""
    return [folder for folder in os.environ.get('nnUNet_extTrainer', '').split(os.pathsep) if folder.strip()]


def discovery_route() -> str:
    """Where nnU-Net has found the trainer. It searches itself first."""
    shim = Path(nnunetv2.__path__[0]).parent / SHIM
    if (shim / f'{TRAINER}.py').is_file():
        return f'installed in nnunetv2: {shim}'
    for folder in external_folders():
        if Path(folder, f'{TRAINER}.py').is_file():
            return f'by nnUNet_extTrainer: {folder}'
    return 'found in another module that imports it'


def discovery_remedy() -> str:
    """The export line for the shims of a checkout, or of a wheel whose nnunetv2 is not the imported one."""
    beside = Path(nnunet_pdddpm.__file__).resolve().parents[1]
    for folder in (beside / 'trainers', beside / SHIM):
        if (folder / f'{TRAINER}.py').is_file():
            value = os.pathsep.join([*external_folders(), str(folder)])
            return f'export nnUNet_extTrainer={shlex.quote(value)}'
    return 'in a clone of nnunet-pdddpm run pip install . (without -e), in the environment of nnunetv2.'


def check_folders(problems: list[str]) -> bool:
    """nnU-Net's three folders; whether the two that training needs are there."""
    print('Folders')
    all_there = True
    for variable in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'):
        folder = os.environ.get(variable)
        fault = 'not set' if not folder else '' if Path(folder).is_dir() else f'{folder} does not exist'
        if fault and variable == 'nnUNet_raw':
            fault += ' (needed only for planning and preprocessing)'
        elif fault:
            holds = 'trained models' if variable == 'nnUNet_results' else 'preprocessed data sets'
            problems.append(f'{variable}: {fault}. Name the folder of your {holds}: export {variable}=FOLDER')
            all_there = False
        row(variable, fault or folder)
    return all_there


def print_devices() -> None:
    """The devices torch can use."""
    print('Devices')
    row('cpu', f'{os.cpu_count()} cores')
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        row(f'cuda:{i}', f'{properties.name}, {properties.total_memory / 2 ** 30:.1f} GiB')
    if torch.backends.mps.is_available():
        row('mps', 'available')


def check_environment(problems: list[str]) -> None:
    """The variables of this package; values that no model accepts are a problem."""
    variables = sorted(package_variables())
    print('Environment variables' if variables else f'Environment variables {ENVIRONMENT_PREFIX}*: none')
    for variable in variables:
        row(variable, os.environ[variable])
    problem = environment_problem()
    if problem:
        problems.append(problem)


if __name__ == '__main__':
    main()
