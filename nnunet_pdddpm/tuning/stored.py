"""Sampling settings and calibration into trained models: the checkpoint's buffers change, its weights do not."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_pdddpm.file_names import BEST_CHECKPOINT, FINAL_CHECKPOINT
from nnunet_pdddpm.files import writing
from nnunet_pdddpm.network.checkpoint import load_checkpoint
from nnunet_pdddpm.network.seen import note_calibrated_on
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers
from nnunet_pdddpm.network.state import CALIBRATION, QUALITY, QUALITY_FIELDS, QUALITY_ROWS, SETTING, check_version


def store(fold_folder: Path, settings: SamplingSettings) -> list[Path]:
    """Put settings into the checkpoints of a fold; what intervals of volumes were calibrated by others goes.

    Args:
        fold_folder: in which the final and the best checkpoint are changed, as far as they are there.
        settings: of samples and mask.

    Returns:
        The changed files.

    Raises:
        CheckpointError: if one cannot be read, or is no PDDDPM model of this version.
        OSError: if one cannot be written.
    """
    files = [file for name in (FINAL_CHECKPOINT, BEST_CHECKPOINT) if (file := fold_folder / name).is_file()]
    checkpoints = [_load(file) for file in files]  # all of them, before one is changed
    for file, checkpoint in zip(files, checkpoints, strict=True):
        weights = checkpoint['network_weights']
        for name, value in as_numbers(settings).items():
            weights[SETTING + name].fill_(value)
        weights[CALIBRATION].zero_()
        weights[QUALITY].zero_()
        _replace(file, checkpoint)
    return files


def store_calibration(file: Path, names: Sequence[str], calibration: Tensor, quality: Tensor | None = None) -> None:
    """Put what is known of the volumes of validation cases, and of their masks' quality, into a checkpoint.

    Args:
        file: the checkpoint.
        names: of the cases.
        calibration: (cases, C, fields), see `inference.intervals.FIELDS`.
        quality: (rows, C, fields), see `inference.dice_regression.FIELDS`; None for none.

    Raises:
        CheckpointError: if it cannot be read, or is no PDDDPM model of this version.
        OSError: if it cannot be written.
    """
    checkpoint = _load(file)
    stored = checkpoint['network_weights'][CALIBRATION]
    stored.zero_()
    stored[:len(calibration)] = calibration
    rows = torch.zeros(QUALITY_ROWS, stored.shape[1], QUALITY_FIELDS)
    if quality is not None:
        rows[:len(quality)] = quality
    checkpoint['network_weights'][QUALITY] = rows
    note_calibrated_on(checkpoint['network_weights'], names)
    _replace(file, checkpoint)


def _load(file: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = load_checkpoint(file, 'PDDDPM model')
    check_version(checkpoint['network_weights'], str(file))
    return checkpoint


def _replace(file: Path, checkpoint: dict[str, Any]) -> None:
    """Written beside and renamed: a kill leaves the old one."""
    partial = file.with_name(f'.{file.name}.{os.getpid()}.partial')
    try:
        with writing(file.parent):
            torch.save(checkpoint, partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
