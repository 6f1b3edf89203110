"""What a trained model holds beside its weights: the names of these tensors in its state dict, and their readers."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunet_pdddpm.diffusion.levels import LevelTable
from nnunet_pdddpm.network.checkpoint import CheckpointError
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers, from_numbers

SETTING = 'setting_'
"""Prefix of the sampling settings."""
CALIBRATION = 'calibration'
"""What is known of the volumes of validation cases, see `inference.intervals.FIELDS`."""
CALIBRATION_CASES, CALIBRATION_FIELDS = 256, 3
QUALITY = 'quality'
"""Dice of validation cases and what may tell it, see `inference.dice_regression.FIELDS`."""
QUALITY_ROWS, QUALITY_FIELDS = 768, 14
LEVELS = ('level_log_snr', 'level_share', 'level_cross_entropy', 'level_count')
"""The table of noise levels, and what it was measured by (see `LevelMeter`)."""


def check_version(weights: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError for a refiner's state that holds other things beside the weights than this version does."""
    settings = {SETTING + name for name in as_numbers(SamplingSettings())}
    found = {name for name in weights if name.startswith(SETTING)}
    rows = {CALIBRATION: CALIBRATION_FIELDS, QUALITY: QUALITY_FIELDS}
    if (found != settings or not {*LEVELS, *rows} <= weights.keys()
            or any(weights[name].shape[-1] != fields for name, fields in rows.items())):
        raise CheckpointError(f'{source} is of another version of PDDDPMTrainer: train it again with this version.')


def stored_settings(weights: Mapping[str, Tensor]) -> SamplingSettings:
    """The settings in a refiner's state dict, without any override; raises KeyError if it is no refiner's."""
    return from_numbers({name: weights[SETTING + name].item() for name in as_numbers(SamplingSettings())})


def stored_table(weights: Mapping[str, Tensor]) -> LevelTable:
    """The table of noise levels in a refiner's state dict; raises ValueError if it is not monotone."""
    return LevelTable(*(tuple(weights[name].tolist()) for name in LEVELS[:2]))
