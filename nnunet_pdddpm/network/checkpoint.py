"""Checkpoints: read without executing anything in them, refused where they are damaged or hold NaN."""
from __future__ import annotations

import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_pdddpm.file_names import BEST_CHECKPOINT
from nnunet_pdddpm.network.settings import PRESEGMENTER_VARIABLE

PRESEGMENTER = 'presegmenter.'
CHECKSUM = 'presegmenter_checksum'
"""Key in the metadata of a refiner's state dict. Models without it are older; they load as ever, unchecked."""

# What nnU-Net writes into a checkpoint beside tensors: numpy scalars in the log and in the plans.
# numpy 2 renamed its core; 1.26 has an empty _core
_NUMPY_CORE: Any = getattr(np, '_core' if np.lib.NumpyVersion(np.__version__) >= '2.0.0' else 'core')
_NUMPY_SCALARS: list[Any] = [np.dtype, *{type(np.dtype(t)) for t in 'bBhHiIlLqQefd?'},
                             *((_NUMPY_CORE.multiarray.scalar, f'numpy.{core}.multiarray.scalar')
                               for core in ('core', '_core'))]


class CheckpointError(ValueError):
    """A trained model is missing, damaged, or does not fit: the message says which file, why, and what to do."""


def load_checkpoint(file: Path, what: str = 'stock model') -> dict[str, Any]:
    """An nnU-Net checkpoint on the CPU, read with `weights_only=True`: nothing in it is executed.

    torch.save notes a CRC-32 of every tensor and torch.load does not look at it: that is done here.

    Args:
        file: its path.
        what: what to call it in an error.

    Raises:
        CheckpointError: if the file is missing, truncated or damaged, holds more than tensors and numbers, or is no
            nnU-Net checkpoint.
    """
    if not file.is_file():
        raise CheckpointError(f'The {what} {file} does not exist: train it first with nnUNetv2_train, or name '
                              f'another trained model in {PRESEGMENTER_VARIABLE}.')
    try:
        if not zipfile.is_zipfile(file):
            raise CheckpointError(f'The {what} {file} is truncated or no checkpoint; train or copy it again.')
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
            folders = [entry.filename for entry in archive.infolist() if entry.external_attr & 0x10]
        if damaged is not None:
            raise CheckpointError(f'The {what} {file} is damaged: the checksum of {damaged} in it is wrong; train or '
                                  f'copy it again.')
        if folders:  # torch.save writes none, and torch.load gives a tensor that is marked as one any values
            raise CheckpointError(f'The {what} {file} is damaged: {folders[0]} in it is no file; train or copy it '
                                  f'again.')
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r'GLOBAL (\S+)', str(error))
        raise CheckpointError(f'The {what} {file} holds objects that nnU-Net does not write'
                              f'{f" ({found[1]})" if found else ""} and is not loaded: use a checkpoint written by '
                              f'nnUNetv2_train.') from error
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of whatever type: it lies in the file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'The {what} {file} cannot be read ({reason}); train or copy it again.') from error
    if not (isinstance(checkpoint, dict) and {'network_weights', 'init_args', 'trainer_name'} <= checkpoint.keys()
            and isinstance(checkpoint['init_args'], dict)):
        raise CheckpointError(f'{file} is no nnU-Net v2 checkpoint: it has no network_weights, init_args and '
                              f'trainer_name.')
    return checkpoint


def differences(trained_with: Mapping[str, Any], plans: dict[str, Any], configuration: str,
                dataset_json: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a network cannot be used without knowing and is not as it was in training.

    Args:
        trained_with: the checkpoint's `init_args`.
        plans, configuration, dataset_json: what the network is to be used with.

    Returns:
        What -> (value in training, value here), of the labels, the channels and the plans.
    """
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for key in ('labels', 'channel_names', 'regions_class_order'):
        theirs[key], ours[key] = trained_with['dataset_json'].get(key), dataset_json.get(key)
    if theirs['labels'] == ours['labels'] and ours['regions_class_order']:  # channels are in the order of the names
        theirs['the order of labels'], ours['the order of labels'] = list(theirs['labels']), list(ours['labels'])
    trained_plans = trained_with['plans']
    if configuration not in trained_plans.get('configurations', {}):
        return {"the plans' list of configurations": (list(trained_plans.get('configurations', {})),
                                                      list(plans['configurations']))}
    there = PlansManager(trained_plans).get_configuration(configuration).configuration
    here = PlansManager(plans).get_configuration(configuration).configuration
    for key in ('spacing', 'patch_size', 'normalization_schemes', 'use_mask_for_norm', 'preprocessor_name',
                'resampling_fn_data', 'resampling_fn_data_kwargs', 'architecture', 'previous_stage'):
        theirs[f"the plans' {key}"], ours[f"the plans' {key}"] = there.get(key), here.get(key)
    for key in ('transpose_forward', 'foreground_intensity_properties_per_channel'):
        theirs[f"the plans' {key}"], ours[f"the plans' {key}"] = trained_plans.get(key), plans.get(key)
    return {key: (value, ours[key]) for key, value in theirs.items() if value != ours[key]}


def checksum(weights: Mapping[str, Tensor], prefix: str = '') -> int:
    """CRC-32 of the names, without the prefix, and values of all tensors whose name starts with the prefix."""
    crc = 0
    for name in sorted(name for name in weights if name.startswith(prefix)):
        crc = zlib.crc32(name[len(prefix):].encode(), crc)
        values = weights[name].detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(values.view(torch.uint8).numpy().data, crc)
    return crc


def stored_checksum(weights: Mapping[str, Any]) -> int | None:
    """Checksum of the embedded pre-segmenter as noted when it was embedded; None if the model notes none."""
    return getattr(weights, '_metadata', {}).get('', {}).get(CHECKSUM)


def check_weights(weights: Mapping[str, Any], source: str, known: int | None = None) -> int | None:
    """Refuse a refiner's weights that cannot be predicted with.

    Args:
        weights: its state dict.
        source: what to call it in an error, such as 'The model FILE'.
        known: a stored checksum that has been compared already and need not be again.

    Returns:
        The stored checksum of the pre-segmenter.

    Raises:
        CheckpointError: if a weight is NaN or infinite, or the pre-segmenter is not the one that was embedded.
    """
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f'{source} has NaN or infinite weights ({name}): a mask of it would mean nothing. '
                                  f'Train it again, or predict with another checkpoint of the training '
                                  f'(nnUNetv2_pdddpm_predict -chk {BEST_CHECKPOINT}).')
    stored = stored_checksum(weights)
    if stored is not None and stored != known and stored != checksum(weights, PRESEGMENTER):
        raise CheckpointError(f'{source} is damaged: the stock model in it is not the one that it was trained with '
                              f'(its checksum differs). Copy or train it again.')
    return stored


def note_checksum(module: Any, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Hook of the refiner's `state_dict`: the checksum travels in the state's metadata, as no key of it."""
    if module.presegmenter_checksum is not None:
        metadata[CHECKSUM] = module.presegmenter_checksum
