"""Tune a fold: sweep, choose, report, store."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from nnunet_pdddpm.file_names import FINAL_CHECKPOINT
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.labels import label_channels
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.calibration import cases_to_calibrate, measure, open_for_calibration, store_measured
from nnunet_pdddpm.tuning.cases import ValidationCases, exclude_seen_cases
from nnunet_pdddpm.tuning.choice import choose_measured
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.fold import FoldData
from nnunet_pdddpm.tuning.plain import plain_dice
from nnunet_pdddpm.tuning.report import summary_lines, write_sweep
from nnunet_pdddpm.tuning.stored import store
from nnunet_pdddpm.tuning.sweep import sweep


def open_model(model_folder: Path, fold: int | str, device: torch.device) -> VolumePredictor:
    """The trained model of a fold, as it is to predict, whatever the environment says.

    Raises:
        TuningError: if there is none, its folder cannot be written to, or its levels are the paper's.
    """
    predictor = open_for_calibration(model_folder, fold, device, FINAL_CHECKPOINT)
    folder = model_folder / f'fold_{fold}'
    if predictor.refiner.design.paper_levels:
        raise TuningError(f"{folder} holds a model of {predictor.trainer_name}, whose settings are the paper's: there "
                          f'is nothing to tune.')
    if not os.access(folder, os.W_OK):
        raise TuningError(f'{folder} cannot be written to: the tuned settings are stored in its checkpoints.')
    return predictor


def tune(data: FoldData, predictor: VolumePredictor, seconds: float | None = None, raters: Path | None = None,
         progress: bool = False) -> SamplingSettings:
    """Find the sampling settings of a trained fold on its validation cases, report them and put them into the model.

    Args:
        data: of the fold; its log is told what was chosen, and what was left out.
        predictor: from `open_model`.
        seconds: time budget, None for none.
        raters: folder of several people's masks, `CASE__RATER`.
        progress: whether to show a bar.

    Raises:
        TuningError: if there is nothing to tune on, or no time, or too few cases that the model was not trained on. It
            is as before.
        EvaluationError: if the raters' masks cannot be used.
        OSError: if the results cannot be written.
    """
    cases = ValidationCases(data, raters)
    exclude_seen_cases(cases, predictor.list_of_parameters[0], data.log)
    measured = sweep(predictor, cases, seconds, progress=progress)
    settings, plain = choose_measured(measured.masks, lambda s: plain_dice(predictor, cases, measured.cases, s),
                                      measured.images)
    folder = data.output
    # the sweep's files come last: a resumed training that finds them does not tune again
    files = [*store(folder, settings), *write_sweep(folder, measured, settings, plain)]
    for line in summary_lines(measured, settings, plain):
        data.log(line)
    data.log('Written: ' + ', '.join(map(str, files)))
    return settings


def calibrate_fold(data: FoldData, device: torch.device) -> None:
    """Calibrate the intervals of volumes of a trained fold on its validation cases, and put that into the model.

    Args:
        data: of the fold; its log is told what came of it.
        device: to predict on.

    Raises:
        TuningError: if there are too few validation cases that the model was not trained on. It is as before.
        OSError: if the model cannot be written.
    """
    cases = ValidationCases(data)
    predictor = open_for_calibration(data.output.parent, data.fold, device, FINAL_CHECKPOINT)
    exclude_seen_cases(cases, predictor.list_of_parameters[0], data.log)
    measured = measure(predictor, cases, cases_to_calibrate(cases.names))
    channels = label_channels(data.dataset_json, data.plans)
    store_measured(data.output / FINAL_CHECKPOINT, measured, channels, data.log)
