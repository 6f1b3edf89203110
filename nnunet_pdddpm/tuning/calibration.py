"""What the volumes of validation cases are and what the model says of them: the scores that intervals are made of."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor

from nnunet_pdddpm.inference.counting import grid_voxel_ml
from nnunet_pdddpm.inference.export import as_numpy
from nnunet_pdddpm.inference.intervals import FIELDS, Calibrated, Features, calibrate_by_mask, in_percent
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.labels import foreground_labels, label_channels
from nnunet_pdddpm.network.refiner import CALIBRATION_CASES, stored_settings
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.stored import store_calibration


def open_for_calibration(model_folder: Path, fold: int | str, device: torch.device, checkpoint: str
                         ) -> VolumePredictor:
    """The model of a fold that predicts by its own settings, whatever the environment says."""
    predictor = VolumePredictor(device=device, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder), (fold,), checkpoint)
    predictor.fold_settings = [stored_settings(parameters) for parameters in predictor.list_of_parameters]
    predictor.num_samples = predictor.fold_settings[0].samples
    return predictor


def cases_to_calibrate(names: Sequence[str]) -> list[str]:
    """All of them; of more than a checkpoint has room for, as many as it has, spread evenly."""
    if len(names) <= CALIBRATION_CASES:
        return list(names)
    return [names[i] for i in np.linspace(0, len(names) - 1, CALIBRATION_CASES).round().astype(int)]


def measure_volumes(predictor: VolumePredictor, cases: ValidationCases, names: Sequence[str]) -> Tensor:
    """Predict cases as `nnUNetv2_pdddpm_predict` does, and note their volumes.

    Args:
        predictor: of one model, see `open_for_calibration`.
        cases: of its fold.
        names: of those that are measured.

    Returns:
        (names, C, fields) float32, see `intervals.FIELDS`. Empty for a case whose true volume is not known, as with
        ignored voxels, and for channels that stand for no label.
    """
    scores = torch.zeros(len(names), predictor.refiner.num_channels, len(FIELDS))
    channels = label_channels(predictor.dataset_json, predictor.plans_manager)
    for row, name in zip(scores, names, strict=True):
        true = cases.true_volumes(name)
        if true is None:
            continue
        for (label, channel), of in zip(channels.items(), _features(predictor, cases, name), strict=True):
            row[channel] = torch.tensor([true[label], *(float(value[0]) for value in of), predictor.num_samples])
    return scores


def _features(predictor: VolumePredictor, cases: ValidationCases, name: str) -> list[Features]:
    """Of a case, for each label. Nothing of its prediction, as large as a volume, is there afterwards."""
    case = cases.load(name)
    prediction = predictor.predict_volume(case.image, case=name, stock=False)
    mask = convert_predicted_logits_to_segmentation_with_correct_shape(
        as_numpy(prediction.logits), predictor.plans_manager, predictor.configuration_manager,
        predictor.label_manager, case.properties)
    ml = cases.voxel_ml(case)
    mask_ml = np.array([np.isin(mask, values).sum() * ml
                        for values in foreground_labels(predictor.dataset_json).values()])
    return prediction.counts.features(prediction.counts.voxel_ml(
        mask_ml, grid_voxel_ml(case.properties, case.image.shape[1:], ml)))


def lines(scores: Tensor, channels: dict[str, int]) -> list[str]:
    """What intervals the scores (cases, C, fields) give, a line for each label."""
    return [f'Volume of {name}: {_in_words(scores[:, channel].numpy())}' for name, channel in channels.items()]


def _in_words(scores: np.ndarray) -> str:
    calibrated = calibrate_by_mask([scores], with_samples=True).found
    if isinstance(calibrated, str):
        return f'no calibrated interval: {calibrated}'
    return (f'{in_percent(calibrated.level)} interval by {len(calibrated.errors)} validation cases, errors relative to '
            f'{calibrated.rule.words()}: {_width(calibrated, scores)}')


def _width(calibrated: Calibrated, scores: np.ndarray) -> str:
    known = scores[(scores[:, FIELDS.index('samples')] > 0) & (scores[:, FIELDS.index('mask')] > 0)]
    ends = [calibrated.interval(Features(*(of[i:i + 1] for i in range(1, 6)))) for of in known.astype(float)]
    widths = [high - low for low, high in (end for end in ends if end is not None)]
    return f'{np.mean(widths):.3g} ml wide for a volume of {known[:, 0].mean():.3g} ml, on average'


def keep(file: Path, scores: Tensor, channels: dict[str, int], log: Callable[[str], None]) -> None:
    """Put the scores (cases, C, fields) into a checkpoint, and say what intervals they give."""
    store_calibration(file, scores)
    for line in lines(scores, channels):
        log(line)
