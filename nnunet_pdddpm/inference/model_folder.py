"""The folder of a trained model: whether its files are there, whole, and those it was trained with."""
from __future__ import annotations

import json
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_pdddpm.inference.errors import PredictionError
from nnunet_pdddpm.network.checkpoint import (
    PRESEGMENTER,
    CheckpointError,
    check_weights,
    differences,
    load_checkpoint,
)
from nnunet_pdddpm.network.state import check_version, stored_table


def check_model_folder(folder: Path) -> None:
    """Raise PredictionError if there is no model in a folder, or its plans.json or dataset.json is damaged."""
    if not (folder / 'plans.json').is_file():
        raise PredictionError(f'There is no trained model in {folder}: train it with nnUNetv2_train -tr '
                              f'PDDDPMTrainer, or correct the data set, configuration, trainer and plans that name it.')
    for file in (folder / 'plans.json', folder / 'dataset.json'):
        try:
            damaged = file.is_file() and not isinstance(json.loads(file.read_text()), dict)
        except ValueError:
            damaged = True
        if damaged:
            raise PredictionError(f'{file} is empty or damaged: copy it again from where the model was trained.')


def check_model_file(file: Path) -> None:
    """Refuse a checkpoint that cannot be predicted with, before nnU-Net unpickles it.

    Raises:
        PredictionError: if it is missing.
        CheckpointError: if it is damaged, executes code, or does not fit the plans.json and dataset.json of its model.
    """
    if not file.is_file():
        raise PredictionError(f'{file} does not exist: name the trained folds with -f and the checkpoint with -chk.')
    checkpoint = load_checkpoint(file, 'model')
    weights = checkpoint['network_weights']
    if any(name.startswith(PRESEGMENTER) for name in weights):
        check_version(weights, f'The model {file}')
        try:
            stored_table(weights)
        except ValueError as error:
            raise CheckpointError(f'The model {file} is damaged: {error}') from None
    check_weights(weights, f'The model {file}')
    plans, dataset_json = (load_json(str(file.parents[1] / name)) for name in ('plans.json', 'dataset.json'))
    trained_with = checkpoint['init_args']
    try:
        differing = differences(trained_with, plans, trained_with['configuration'], dataset_json)
    except Exception as error:  # of whatever type: it lies in the files
        raise CheckpointError(f'The plans.json and dataset.json in {file.parents[1]} are not those of the model {file} '
                              f'({type(error).__name__}: {error}). Put back the files that it was trained with.'
                              ) from error
    for what, (trained, here) in differing.items():
        raise CheckpointError(f'The model {file} does not fit the plans.json and dataset.json in {file.parents[1]}: '
                              f'{what} was {trained} when it was trained and is {here} there. Put back the files that '
                              f'it was trained with.')
