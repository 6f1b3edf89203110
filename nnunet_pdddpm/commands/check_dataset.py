"""The part of nnUNetv2_pdddpm_check that looks at one data set: its plans, its stock models, its refined models."""
from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.commands.arguments import TRAINER
from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.network.checkpoint import PRESEGMENTER, CheckpointError, check_weights, checksum, load_checkpoint
from nnunet_pdddpm.network.settings import PRESEGMENTER_VARIABLE, SamplingSettings, effective_settings
from nnunet_pdddpm.network.state import check_version, stored_settings, stored_table
from nnunet_pdddpm.training.presegmenters import TrainingContext, checkpoint_file
from nnunet_pdddpm.training.previous_stage import PreviousStage


def row(name: str, value: object) -> None:
    """Print one line of the report."""
    print(f'  {name:<27} {value}')


def _listed(values: Iterable[object], separator: str = ', ') -> str:
    return separator.join(map(str, values)) or 'none'


def device_flag() -> str:
    """What nnU-Net's commands need where their default, cuda, is not there."""
    if torch.cuda.is_available():
        return ''
    return ' -device mps' if torch.backends.mps.is_available() else ' -device cpu'


@dataclass(frozen=True)
class DataSet:
    """A preprocessed data set and plans of it, as named on the command line and as read."""
    named: str
    plans_named: str
    name: str
    plans_name: str
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    data_folders: dict[str, Path]
    """Configuration -> folder of its preprocessed cases, whether it exists or not."""

    def context(self, configuration: str) -> TrainingContext:
        """What a stock model of a configuration has to fit."""
        return TrainingContext(self.plans, configuration, self.dataset_json)

    def train_command(self, configuration: str, fold: int | str, trainer: str) -> str:
        """The command that trains a fold."""
        return f'nnUNetv2_train {self.named} {configuration} {fold} -tr {trainer} -p {self.plans_named}{device_flag()}'

    def predict_command(self, configuration: str, folds: Sequence[int | str], trainer: str) -> str:
        """The command that predicts with trained folds; a model folder bears the name that stands in the plans."""
        return (f'nnUNetv2_pdddpm_predict -i INPUT_FOLDER -o OUTPUT_FOLDER -d {self.named} -c {configuration} '
                f'-tr {trainer} -p {self.plans_name} -f {_listed(folds, " ")}{device_flag()} --save_samples --report')


def check_dataset(named: str, plans_named: str, configuration: str | None, problems: list[str]) -> list[str]:
    """Stock and refined models of one configuration, or of each of the plans; the commands that can be run next."""
    try:
        data = read_dataset(named, plans_named)
        stock_folders = {c: data.context(c).model_folder for c in choose_configurations(data, configuration)}
    except ValueError as error:
        problems.append(str(error))
        return []
    print(f'Data set {data.name}, plans {plans_named}')
    obstacles: list[str] = []
    commands: list[str] = []
    for name, stock_folder in stock_folders.items():
        print(f' {name}')
        stock = check_stock(data.context(name), stock_folder, problems)
        refined = check_refined(data, name, stock, problems)
        obstacle = obstacle_to_training(data, name, stock_folder) or check_previous_stage(data, name)
        if obstacle:
            row('note' if configuration is None else 'problem', obstacle)
            obstacles.append(obstacle)
        elif left := [fold for fold in stock if fold not in refined[TRAINER]]:
            commands.append(data.train_command(name, left[0], TRAINER))
        commands += [data.predict_command(name, folds, trainer) for trainer, folds in refined.items() if folds]
    if len(obstacles) == len(stock_folders):
        problems += obstacles
    return commands


def read_dataset(named: str, plans_named: str) -> DataSet:
    """Raises ValueError, with what to do, if the data set is unknown, not preprocessed, or has no such plans."""
    folder = preprocessed_folder(named)
    plans_there = {file.stem for file in folder.glob('*.json')} - {'dataset', 'dataset_fingerprint', 'splits_final'}
    if plans_there and plans_named not in plans_there:
        raise ValueError(f'{folder.name} has no plans {plans_named}: choose from {_listed(sorted(plans_there))} '
                         f'with -p.')
    try:
        plans, dataset_json = (json.loads((folder / f'{name}.json').read_text()) for name in (plans_named, 'dataset'))
        manager = PlansManager(plans)
        base = folder.parent / manager.dataset_name
        data_folders = {name: base / manager.get_configuration(name).data_identifier
                        for name in plans['configurations']}
        return DataSet(named, plans_named, manager.dataset_name, manager.plans_name, plans, dataset_json, data_folders)
    except Exception as error:  # of whatever type: it lies in the files
        raise ValueError(f'nnU-Net cannot read {plans_named}.json and dataset.json in {folder} '
                         f'({type(error).__name__}: {error}): {_planning(folder.name)}') from error


def preprocessed_folder(named: str) -> Path:
    """Folder of a data set in nnUNet_preprocessed; raises ValueError, with what to do, if there is none."""
    try:
        name = str(maybe_convert_to_dataset_name(named))
    except ValueError:
        raise ValueError(f'DATASET must be an id such as 4 or a name such as Dataset004_Hippocampus, got "{named}".'
                         ) from None
    except RuntimeError as error:
        found = ', '.join(sorted(map(str, find_candidate_datasets(int(named)))))
        raise ValueError(f'{str(error).split(". ")[0]}{f" ({found})" if found else ""}: there must be one '
                         f'DatasetXXX_NAME with it in nnUNet_raw, nnUNet_preprocessed and nnUNet_results.') from None
    folder = Path(os.environ['nnUNet_preprocessed'], name)
    if folder.is_dir():
        return folder
    if Path(os.environ.get('nnUNet_raw', ''), name).is_dir():
        raise ValueError(f'{name} is not preprocessed: {_planning(name)}')
    raise ValueError(f'There is no data set {name} in nnUNet_raw or nnUNet_preprocessed: correct the name or these '
                     f'variables.')


def _planning(name: str) -> str:
    return f'nnUNetv2_plan_and_preprocess -d {name[7:10]}'


def choose_configurations(data: DataSet, configuration: str | None) -> list[str]:
    """The configuration asked for; else all of the plans, or that of the model folder the environment names."""
    if configuration is None:
        named = os.environ.get(PRESEGMENTER_VARIABLE, '').rstrip(os.sep).rpartition('__')[2]
        return [named] if named in data.data_folders else list(data.data_folders)
    if configuration not in data.data_folders:
        raise ValueError(f'The plans {data.plans_named} of {data.name} have no configuration {configuration}: choose '
                         f'from {_listed(data.data_folders)} with -c.')
    return [configuration]


def check_stock(context: TrainingContext, folder: Path, problems: list[str]) -> dict[int | str, int | None]:
    """The trained folds of the stock model, each loaded and compared with the plans: fold -> checksum, None if bad."""
    folds = trained_folds(folder)
    row('stock model', f'trained folds: {_listed(folds)} in {folder}')
    checksums: dict[int | str, int | None] = dict.fromkeys(folds)
    for fold in folds:
        try:
            checksums[fold] = checksum(context.stock_network(fold).state_dict())
        except CheckpointError as error:
            problems.append(str(error))
    return checksums


def check_refined(data: DataSet, configuration: str, stock: Mapping[int | str, int | None], problems: list[str]
                  ) -> dict[str, list[int | str]]:
    """Trained folds of PDDDPMTrainer and of every trainer whose name starts with that.

    `stock`: of the stock model's folds, their checksums. Those that are not embedded any more are named.
    """
    results = Path(os.environ['nnUNet_results'], data.name)
    ending = f'__{data.plans_name}__{configuration}'
    refined: dict[str, list[int | str]] = {}
    for trainer in [TRAINER, *sorted(f.name[:-len(ending)] for f in results.glob(f'{TRAINER}?*{ending}'))]:
        folder = results / f'{trainer}{ending}'
        refined[trainer] = trained_folds(folder)
        row(trainer, f'trained folds: {_listed(refined[trainer])}')
        for fold in refined[trainer]:
            problem, embedded = check_model(checkpoint_file(folder, fold))
            if problem:
                problems.append(problem)
            if None not in (embedded, stock.get(fold)) and embedded != stock[fold]:
                row('note', f'fold {fold} of {trainer} holds another stock model than the one that is there now: that '
                            f'was trained again since. Prediction uses the one it was trained with; to use the new '
                            f'one, train fold {fold} of {trainer} again.')
    return refined


def check_model(file: Path) -> tuple[str, int | None]:
    """Why a trained refined model could not be used for prediction in this environment (empty if it could).

    And the checksum of the stock model that is embedded in it, if it can be read.
    """
    try:
        weights = load_checkpoint(file, 'model')['network_weights']
        check_version(weights, f'The model {file}')
        check_weights(weights, f'The model {file}')
    except CheckpointError as error:
        return str(error), None
    embedded = checksum(weights, PRESEGMENTER)
    try:
        stored_table(weights)
        settings = stored_settings(weights)
    except ValueError as error:
        problem = str(error)
    else:  # what no model accepts is reported already
        problem = '' if environment_problem() else environment_problem(settings)
    return f'The model {file} cannot be used for prediction: {problem}' if problem else '', embedded


def environment_problem(settings: SamplingSettings | None = None) -> str:
    """What is wrong with the environment's overrides of a model's settings; empty if nothing.

    `settings`: the model's; None for what no model accepts.
    """
    try:
        effective_settings(settings or SamplingSettings(mask_stock=0.0, mask_blind=0.0))
    except ValueError as error:
        return str(error)
    return ''


def trained_folds(model_folder: Path) -> list[int | str]:
    """Folds whose training is finished, in order, `all` last."""
    names = [file.parent.name[len('fold_'):] for file in model_folder.glob(f'fold_*/{FINAL_CHECKPOINT}')]
    return [*sorted(int(name) for name in names if name.isdecimal()), *(name for name in names if name == 'all')]


def obstacle_to_training(data: DataSet, configuration: str, stock_folder: Path) -> str:
    """What has to be done before PDDDPMTrainer can be trained for a configuration; empty if nothing."""
    if not data.data_folders[configuration].is_dir():
        return (f'{data.name} is not preprocessed for {configuration}: nnUNetv2_preprocess -d {data.name[7:10]} '
                f'-plans_name {data.plans_named} -c {configuration}')
    if not trained_folds(stock_folder):
        command = data.train_command(configuration, 0, stock_folder.name.partition('__')[0])
        return (f'No stock model is trained for {configuration} (another can be named in {PRESEGMENTER_VARIABLE}): '
                f'{command}')
    return ''


def check_previous_stage(data: DataSet, configuration: str) -> str:
    """The predictions a cascade is trained on; what has to be done if they are not there, or empty."""
    previous = PlansManager(data.plans).get_configuration(configuration).previous_stage_name
    if previous is None:
        return ''
    folder = str(data.data_folders[configuration])
    listed = infer_dataset_class(folder).get_identifiers
    cases = listed(folder)
    stage = PreviousStage(previous, data.context(configuration), TRAINER)
    missing = stage.missing(cases, listed)
    for trainer, predictions in stage.folders.items():
        row('previous stage', f'{len(cases) - missing[trainer]} of {len(cases)} cases in {predictions}')
    return stage.missing_message(missing, len(cases)) if all(missing.values()) else ''
