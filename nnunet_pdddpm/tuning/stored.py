"""Sampling settings into trained models: the checkpoint's buffers change, its weights do not."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from nnunet_pdddpm.files import writing
from nnunet_pdddpm.network.checkpoint import load_checkpoint
from nnunet_pdddpm.network.refiner import INTERVAL, SETTING, refuse_earlier
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers

CHECKPOINTS = ('checkpoint_final.pth', 'checkpoint_best.pth')


def store(fold_folder: Path, settings: SamplingSettings, interval_sd: Sequence[float]) -> list[Path]:
    """Put settings into the checkpoints of a fold, each written beside and renamed: a kill leaves the old one.

    Args:
        fold_folder: in which those of `CHECKPOINTS` that are there are changed.
        settings: of samples and mask.
        interval_sd: of the volumes, see `Choice`; for the final checkpoint, on which they were measured.

    Returns:
        The changed files.

    Raises:
        CheckpointError: if one cannot be read, or is no PDDDPM model of this version.
        OSError: if one cannot be written.
    """
    files = [fold_folder / name for name in CHECKPOINTS if (fold_folder / name).is_file()]
    checkpoints = [load_checkpoint(file, 'PDDDPM model') for file in files]  # all of them, before one is changed
    for file, checkpoint in zip(files, checkpoints, strict=True):
        refuse_earlier(checkpoint['network_weights'], str(file))
    for file, checkpoint in zip(files, checkpoints, strict=True):
        weights = checkpoint['network_weights']
        for name, value in as_numbers(settings).items():
            weights[SETTING + name].fill_(value)
        known = interval_sd if file.name == CHECKPOINTS[0] else [0.0] * len(interval_sd)
        weights[INTERVAL] = torch.tensor(known)
        partial = file.with_name(f'.{file.name}.{os.getpid()}.partial')
        try:
            with writing(fold_folder):
                torch.save(checkpoint, partial)
            os.replace(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    return files
