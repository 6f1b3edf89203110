"""nnU-Net as the benchmarks call it: folders, commands, plans and folds of a data set, and its trained models."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE, FULL, PLANS

from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.network.settings import package_variables

HERE = Path(__file__).resolve().parent
TRAINERS = {'stock': 'nnUNetTrainer{}', 'longer': 'nnUNetTrainer{}Longer', 'denoiser': 'PDDDPMTrainer{}',
            'second': 'PDDDPMTrainer{}Second', 'ssn': 'nnUNetTrainer{}SSN', 'paper': 'PDDDPMTrainer{}Paper'}
"""Networks of a benchmark -> their trainers, of a family: see `trainers/benchmark_trainers.py`."""
NUM_FOLDS = 3
"""Each is a training."""
LONGER = 25 if FULL else 1
"""As many times the epochs."""
MEAN_OF_SAMPLES: dict[str, Any] = {'mask_stock': 0.0, 'mask_blind': 0.0}
"""Settings with which it is the mask."""
FOLDERS = ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results')


@dataclass(frozen=True)
class Dataset:
    """A data set of nnU-Net, and the networks that are trained on it."""
    number: int
    name: str
    configuration: str
    family: str
    """Of trainers."""
    features: tuple[int, ...]
    """Of the reduced network."""
    changes: tuple[tuple[str, Any], ...]
    """What else is reduced in the plan's configuration."""
    epochs: tuple[int, int]
    """Of the stock model, and of all others."""
    iterations: tuple[int, int]
    """Of an epoch."""
    one_thread: bool = True
    """Whether data are augmented in the training process, whose seed is fixed."""
    tuning_minutes: int = 6

    @property
    def title(self) -> str:
        """nnU-Net's name."""
        return f'Dataset{self.number:03d}_{self.name}'

    @property
    def total_iterations(self) -> tuple[int, int]:
        """Of the stock model, and of all others."""
        stock, others = (LONGER * e * i for e, i in zip(self.epochs, self.iterations, strict=True))
        return stock, others

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment, beside nnU-Net's folders."""
        workers = {'nnUNet_n_proc_DA': '0'} if self.one_thread else {} if FULL else {'nnUNet_n_proc_DA': '1'}
        return {**workers, 'nnUNet_def_n_proc': '1' if self.one_thread else str(os.cpu_count()),
                'nnUNet_pdddpm_presegmenter': self.trainer('stock')}

    def raw(self, work: Path) -> Path:
        """Folder of nnU-Net's raw data set."""
        return work / 'nnUNet_raw' / self.title

    def preprocessed(self, work: Path) -> Path:
        """Its folder with plans and splits."""
        return work / 'nnUNet_preprocessed' / self.title

    def trainer(self, network: str) -> str:
        """Class of a network's trainer."""
        return TRAINERS[network].format(self.family)

    def model(self, work: Path, network: str) -> Path:
        """Folder of a trained model."""
        return work / 'nnUNet_results' / self.title / f'{self.trainer(network)}__{PLANS}__{self.configuration}'

    def checkpoint(self, work: Path, network: str, fold: int) -> Path:
        """Of a finished training."""
        return self.model(work, network) / f'fold_{fold}' / FINAL_CHECKPOINT

    def trained(self, work: Path, network: str, fold: int) -> Path:
        """The same, which is there."""
        if not (file := self.checkpoint(work, network, fold)).is_file():
            sys.exit(f'{file} is missing: first prepare and train {self.name} there by its benchmark.')
        return file

    def splits(self, work: Path) -> list[dict[str, list[str]]]:
        """Names of the training and validation cases of each fold."""
        return json.loads((self.preprocessed(work) / 'splits_final.json').read_text())

    def planned(self, work: Path) -> dict[str, Any]:
        """The configuration that is trained."""
        plans = json.loads((self.preprocessed(work) / f'{PLANS}.json').read_text())
        return plans['configurations'][self.configuration]

    def call(self, work: Path, *command: str, **variables: str) -> None:
        """Run an nnU-Net command beside this Python; stop at the first failure."""
        folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
        executable = shutil.which(command[0], path=folders)
        if executable is None:
            sys.exit(f'{command[0]} is neither beside {sys.executable} nor in PATH: install nnU-Net and this project.')
        print('$', *(f'{name}={value}' for name, value in variables.items()), *command, flush=True)
        if subprocess.run([executable, *command[1:]], env={**self.environment(work), **variables}).returncode:
            sys.exit(f'{command[0]} failed, see above. What is done in {work} is not done again by the next call.')

    def environment(self, work: Path) -> dict[str, str]:
        """Of nnU-Net's commands: its folders below `work`, the trainers, no sampling settings of the user."""
        kept = {k: v for k, v in os.environ.items() if k not in package_variables()}
        trainers = os.pathsep.join([str(HERE / 'trainers'), str(HERE.parent / 'trainers')])
        return {**kept, **{name: str(work / name) for name in FOLDERS}, 'nnUNet_extTrainer': trainers, **self.variables}

    def enter(self, work: Path) -> None:
        """Make this the environment of the process. nnU-Net reads its folders once, when it is imported."""
        os.environ.update(self.environment(work))
        sys.path.append(str(HERE / 'trainers'))
        read = getattr(sys.modules.get('nnunetv2.paths'), FOLDERS[1], None)
        if read not in (None, os.environ[FOLDERS[1]]):
            sys.exit(f'This call has already used {Path(read).parent}; call it again for {work}.')

    def is_prepared(self, work: Path) -> bool:
        """Whether its splits, which are written last, are there."""
        return (self.preprocessed(work) / 'splits_final.json').is_file()

    def plan(self, work: Path, description: dict[str, Any], splits: Sequence[tuple[Sequence[str], Sequence[str]]]
             ) -> None:
        """Plan and preprocess raw images, reduce the plan on a CPU, write the splits: training and validation cases."""
        (self.raw(work) / 'dataset.json').write_text(json.dumps(description, indent=1))
        processes = self.variables['nnUNet_def_n_proc']
        self.call(work, 'nnUNetv2_plan_and_preprocess', '-d', str(self.number), '-c', self.configuration, '-npfp',
                  processes, '-np', processes, '--verify_dataset_integrity',
                  nnUNet_n_proc_DA='1')  # which the planner takes for its number of threads: 0 would end it
        if not FULL:
            self._reduce(self.preprocessed(work))
        of_folds = [{'train': list(train), 'val': list(validation)} for train, validation in splits]
        (self.preprocessed(work) / 'splits_final.json').write_text(json.dumps(of_folds, indent=1))

    def _reduce(self, preprocessed: Path) -> None:
        """A smaller network, and whatever else is smaller; preprocessed data are those of the whole plan."""
        plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
        configuration = plans['configurations'][self.configuration]
        configuration.update(dict(self.changes))
        network = configuration['architecture']['arch_kwargs']
        stages = min(len(self.features), network['n_stages'])
        for name in ('n_conv_per_stage', 'kernel_sizes', 'strides'):
            network[name] = network[name][:stages]
        network.update(n_stages=stages, features_per_stage=list(self.features[:stages]),
                       n_conv_per_stage_decoder=network['n_conv_per_stage_decoder'][:stages - 1])
        (preprocessed / f'{PLANS}.json').write_text(json.dumps({**plans, 'plans_name': PLANS}, indent=1))

    def train(self, work: Path, network: str, fold: int) -> None:
        """`nnUNetv2_train` unless its final checkpoint is there; resumes if interrupted."""
        if not self.checkpoint(work, network, fold).is_file():
            other = network != 'stock'
            self.call(work, 'nnUNetv2_train', self.title, self.configuration, str(fold), '-tr', self.trainer(network),
                      '-p', PLANS, '-device', DEVICE, '--c', benchmark_epochs=str(self.epochs[other] * LONGER),
                      benchmark_iterations=str(self.iterations[other]))

    def tune(self, work: Path, fold: int, *arguments: str) -> None:
        """`nnUNetv2_pdddpm_tune` of the denoiser unless it has been."""
        if not self.sweep(work, fold).is_file():
            self.call(work, 'nnUNetv2_pdddpm_tune', self.title, self.configuration, str(fold), '-tr',
                      self.trainer('denoiser'), '-p', PLANS, '-device', DEVICE, '-budget', str(self.tuning_minutes),
                      '--disable_progress_bar', *arguments)

    def sweep(self, work: Path, fold: int) -> Path:
        """File of what the tuning measured."""
        return self.model(work, 'denoiser') / f'fold_{fold}' / 'sampling_sweep.json'

    def tuned(self, work: Path) -> str:
        """What the tuning chose in each fold, as Markdown."""
        return '\n'.join(f'- fold {fold}: ' + '; '.join(json.loads(self.sweep(work, fold).read_text())['log'])
                         for fold in range(NUM_FOLDS) if self.sweep(work, fold).is_file())

    def open(self, work: Path, network: str, folds: Sequence[int], kind: type | Any, **arguments: Any) -> Any:
        """A predictor of a kind, with the weights of these folds."""
        for fold in folds:
            self.trained(work, network, fold)
        predictor = kind(device=torch.device(DEVICE), allow_tqdm=False, **arguments)
        predictor.initialize_from_trained_model_folder(str(self.model(work, network)), tuple(folds))
        return predictor

    def weights(self, work: Path, network: str, fold: int) -> dict[str, torch.Tensor]:
        """Of a checkpoint."""
        return torch.load(self.trained(work, network, fold), map_location='cpu', weights_only=False)['network_weights']


def find_data(argument: str | None, dataset: str, holds: str) -> Path:
    """Folder of a data set, which holds a certain file, below the one that the argument or `NNUNET_PDDDPM_DATA` names.
    """
    value = argument or os.environ.get('NNUNET_PDDDPM_DATA')
    if value is None:
        sys.exit(f'Say where {dataset} lies: pass -data FOLDER or set NNUNET_PDDDPM_DATA.')
    folder = Path(value) / dataset
    if not (folder / holds).exists():
        sys.exit(f'{folder} holds no {holds}; -data must name the folder that contains {dataset}.')
    return folder
