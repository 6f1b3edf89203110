"""Tune a fold: sweep, choose, report, store."""
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.choice import TuningError, choose_mask
from nnunet_pdddpm.tuning.intervals import FARTHEST, FEWEST_CASES, FEWEST_ERRORS, conformal_widths
from nnunet_pdddpm.tuning.report import Choice, lines, write
from nnunet_pdddpm.tuning.stored import store
from nnunet_pdddpm.tuning.sweep import sweep

if TYPE_CHECKING:
    from nnunet_pdddpm.training.trainer import PDDDPMTrainer


def open_model(model_folder: Path, fold: int | str, device: torch.device) -> VolumePredictor:
    """The trained model of a fold, as it is to predict.

    Raises:
        TuningError: if its folder cannot be written to, or its levels are the paper's.
        PredictionError: if there is none, or it is no PDDDPM model.
    """
    predictor = VolumePredictor(device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), (fold,))
    folder = model_folder / f'fold_{fold}'
    if predictor.refiner.design.paper_levels:
        raise TuningError(f"{folder} holds a model of {predictor.trainer_name}, whose settings are the paper's: there "
                          f'is nothing to tune.')
    if not os.access(folder, os.W_OK):
        raise TuningError(f'{folder} cannot be written to: the tuned settings are stored in its checkpoints.')
    return predictor


def tune(trainer: PDDDPMTrainer, predictor: VolumePredictor, seconds: float | None = None, raters: Path | None = None,
         progress: bool = False, log: Callable[[str], None] = print) -> Choice:
    """Find the sampling settings of a trained fold on its validation cases, report them and put them into the model.

    Args:
        trainer: of the fold; it need not be initialised.
        predictor: from `open_model`.
        seconds: time budget, None for none.
        raters: folder of several people's masks, `CASE__RATER`.
        progress: whether to show a bar.
        log: told what was chosen, and what was left out.

    Raises:
        TuningError: if there is nothing to tune on, or no time. The model is as before.
        EvaluationError: if the raters' masks cannot be used.
        OSError: if the results cannot be written.
    """
    measured = sweep(predictor, ValidationCases(trainer, raters), seconds, progress=progress)
    settings = choose_mask(measured.masks).settings  # with the chosen samples
    widths = conformal_widths(measured.volume_errors)
    choice = Choice(settings, (0.0,) * (predictor.refiner.num_channels - len(widths)) + widths)
    folder = Path(trainer.output_folder)
    # the sweep last: where it is, training that is gone on with takes its settings for stored
    files = [*store(folder, choice.settings, choice.interval_sd), *write(folder, measured, choice)]
    for line in lines(measured, choice):
        log(line)
    if not any(choice.interval_sd):
        log(f'Intervals of volumes are not calibrated. That takes several samples, {FEWEST_CASES} validation cases '
            f'without ignored voxels, {FEWEST_ERRORS} volumes in them, and true volumes that are within {FARTHEST} '
            f'standard deviations of the samples in all but 5 % of them.')
    log('Written: ' + ', '.join(map(str, files)))
    return choice
