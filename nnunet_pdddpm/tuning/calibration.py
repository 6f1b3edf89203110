"""Volumes and Dice of validation cases beside what the model says of them; intervals and ranking are fitted to both."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from torch import Tensor

from nnunet_pdddpm.geometry import image_voxel_ml
from nnunet_pdddpm.inference.chunks import in_chunks
from nnunet_pdddpm.inference.dice_regression import UNALTERED
from nnunet_pdddpm.inference.errors import NNUNET_INF_ERROR, PredictionError, UnusableLogits
from nnunet_pdddpm.inference.export import as_numpy
from nnunet_pdddpm.inference.intervals import FIELDS, Calibrated, calibrate_by_mask
from nnunet_pdddpm.inference.quality import mask_dice, predicted_labels
from nnunet_pdddpm.inference.ranking import MIN_RANKING_CASES, ranking_of
from nnunet_pdddpm.inference.volume import VolumePrediction
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.labels import foreground_labels, label_channels
from nnunet_pdddpm.network.settings import environment_ignored
from nnunet_pdddpm.network.state import CALIBRATION_CASES, QUALITY_FIELDS
from nnunet_pdddpm.texts import in_percent
from nnunet_pdddpm.tuning.artefacts import ARTEFACTS, STRENGTHS, with_artefact
from nnunet_pdddpm.tuning.cases import Case, ValidationCases
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.stored import store_calibration

COPIES = 2
"""Of a validation case with simulated artefacts, at most."""
SECONDS_A_CASE = 20.0
"""That predicting them may take, on average."""


def open_for_calibration(model_folder: Path, fold: int | str, device: torch.device, checkpoint: str
                         ) -> VolumePredictor:
    """The model of a fold that predicts by its own settings, whatever the environment says.

    Raises:
        TuningError: if there is none, or it is no PDDDPM model.
    """
    predictor = VolumePredictor(device=device, allow_tqdm=False)
    try:
        with environment_ignored():
            predictor.initialize_from_trained_model_folder(str(model_folder), (fold,), checkpoint)
    except PredictionError as error:
        raise TuningError(str(error)) from error
    return predictor


def cases_to_calibrate(names: Sequence[str]) -> list[str]:
    """All of them, or as many as a checkpoint has room for, spread evenly."""
    if len(names) <= CALIBRATION_CASES:
        return list(names)
    return [names[i] for i in np.linspace(0, len(names) - 1, CALIBRATION_CASES).round().astype(int)]


class Measured(NamedTuple):
    """True values of validation cases beside the features that predict them."""
    volumes: Tensor
    """(cases, C, fields) float32, see `intervals.FIELDS`. Empty for a case with ignored voxels, whose true volume is
    not known, and for channels that stand for no label."""
    quality: Tensor
    """(rows, C, fields) float32, see `dice_regression.FIELDS`: a row for each case, and for each copy of it with an
    artefact."""
    names: list[str]
    """Of the cases."""


def measure(predictor: VolumePredictor, cases: ValidationCases, names: Sequence[str], first: int = 0, step: int = 1
            ) -> Measured:
    """Predict cases as `nnUNetv2_pdddpm_predict` does, and measure their volumes and the quality of their masks.

    Where the cases are enough to find an order by, copies of them with simulated artefacts are predicted too, at most
    COPIES a case, as long as that takes at most SECONDS_A_CASE for each.

    Args:
        predictor: of one model, see `open_for_calibration`.
        cases: of its fold.
        names: of those that are measured.
        first, step: only every so many of them are measured, from this one on.
    """
    channels = label_channels(predictor.dataset_json, predictor.plans_manager)
    volumes, quality, seconds, copies = [], [], 0.0, first
    for number in range(first, len(names), step):
        case = cases.load(names[number])
        volumes.append(torch.zeros(predictor.refiner.num_channels, len(FIELDS)))
        start = time.perf_counter()
        prediction = _predicted(predictor, case.image, case.name)
        duration = time.perf_counter() - start
        if prediction is None:
            cases.log(f'Nothing is measured on {case.name}: the networks give NaN or infinite values for it.')
            continue
        if (true := cases.true_volumes(case.name)) is not None:
            for (label, channel), volume in zip(channels.items(), _mask_ml(predictor, case, prediction), strict=True):
                volumes[-1][channel] = torch.tensor([true[label], volume, 1])
        quality.append(quality_row(predictor, case, prediction, number, UNALTERED))
        del prediction
        seconds += SECONDS_A_CASE
        for _ in range(COPIES if len(names) >= MIN_RANKING_CASES else 0):
            if duration > seconds:
                break
            start = time.perf_counter()
            quality += _copy(predictor, case, number, copies)
            seconds -= time.perf_counter() - start
            copies += step
    empty = torch.zeros(0, predictor.refiner.num_channels, QUALITY_FIELDS)
    return Measured(torch.stack(volumes) if volumes else empty[..., :len(FIELDS)],
                    torch.stack(quality) if quality else empty, list(names[first::step]))


def _copy(predictor: VolumePredictor, case: Case, number: int, copy: int) -> list[Tensor]:
    """The row of a copy of case `number` with an artefact; empty if the networks give no numbers for it.

    Families and strengths of artefacts take turns over the copies.
    """
    family, strength = copy % len(ARTEFACTS), copy // len(ARTEFACTS) % STRENGTHS
    image = with_artefact(case.image.numpy(), list(ARTEFACTS)[family], strength,
                          predictor.configuration_manager.normalization_schemes, [number, copy])
    prediction = _predicted(predictor, torch.from_numpy(image), case.name)
    return [] if prediction is None else [quality_row(predictor, case, prediction, number, UNALTERED + 1 + family)]


def _predicted(predictor: VolumePredictor, image: Tensor, name: str) -> VolumePrediction | None:
    """None if the networks give NaN or infinite values."""
    try:
        prediction = predictor.predict_volume(image, case=name, stock=False)
        prediction.require_finite()
    except UnusableLogits:
        return None
    except RuntimeError as error:
        if NNUNET_INF_ERROR not in str(error):
            raise
        return None
    return prediction


def quality_row(predictor: VolumePredictor, case: Case, prediction: VolumePrediction, number: int, kind: int
                ) -> Tensor:
    """What a predicted case knows of its Dice, (C, fields) float32, see `dice_regression.FIELDS`.

    Empty for labels without an estimate, which are neither in the mask nor in a sample, and for those without a Dice,
    which are neither in the mask nor in the truth. Voxels to be ignored do not count.

    Args:
        predictor: that has predicted it.
        case: with the truth in the network's grid.
        prediction: of its image, or of a copy.
        number: of the case.
        kind: `dice_regression.UNALTERED`, or that and the number of the artefact's family, counted from 1.
    """
    row = torch.zeros(predictor.refiner.num_channels, QUALITY_FIELDS)
    manager, values = predictor.label_manager, foreground_labels(predictor.dataset_json)
    mask = predicted_labels(in_chunks(prediction.logits), prediction.counts,
                            tuple(slice(0, n) for n in prediction.logits.shape[1:]))
    counted = np.ones(mask.shape, bool) if manager.ignore_label is None else case.labels != manager.ignore_label
    for name, channel in label_channels(predictor.dataset_json, predictor.plans_manager).items():
        features = prediction.quality[name].features
        if features is not None and np.isfinite(features).all():  # a checkpoint with others would be refused
            one, other = (np.isin(labels, values[name]) & counted for labels in (mask, case.labels))
            if one.any() or other.any():
                row[channel] = torch.tensor([kind, number, mask_dice(one, other), *features])
    return row


def _mask_ml(predictor: VolumePredictor, case: Case, prediction: VolumePrediction) -> np.ndarray:
    """Volumes of a predicted case's mask, (labels,)."""
    mask = convert_predicted_logits_to_segmentation_with_correct_shape(
        as_numpy(prediction.logits), predictor.plans_manager, predictor.configuration_manager,
        predictor.label_manager, case.properties)
    ml = image_voxel_ml(case.properties, predictor.plans_manager.transpose_backward)
    return np.array([np.isin(mask, values).sum() * ml for values in foreground_labels(predictor.dataset_json).values()])


def interval_lines(scores: Tensor, channels: dict[str, int]) -> list[str]:
    """What intervals the scores (cases, C, fields) give, a line for each label."""
    return [f'Volume of {name}: {_in_words(scores[:, channel].numpy())}' for name, channel in channels.items()]


def _in_words(scores: np.ndarray) -> str:
    calibrated = calibrate_by_mask([scores]).with_label
    if isinstance(calibrated, str):
        return f'no calibrated interval: {calibrated}'
    return (f'{in_percent(calibrated.level)} interval by {len(calibrated.errors)} validation cases, errors relative to '
            f'{calibrated.rule.describe()}: {_width(calibrated, scores)}')


def _width(calibrated: Calibrated, scores: np.ndarray) -> str:
    known = scores[(scores[:, FIELDS.index('known')] > 0) & (scores[:, FIELDS.index('mask')] > 0)].astype(float)
    ends = [calibrated.interval(mask) for mask in known[:, FIELDS.index('mask'), None]]
    widths = [high - low for low, high in (end for end in ends if end is not None)]
    return f'{np.mean(widths):.3g} ml wide for a volume of {known[:, 0].mean():.3g} ml, on average'


def store_measured(file: Path, measured: Measured, channels: dict[str, int], log: Callable[[str], None]) -> None:
    """Store what was measured in a checkpoint, and log the intervals and the ranking that it gives."""
    store_calibration(file, measured.names, measured.volumes, measured.quality)
    for line in interval_lines(measured.volumes, channels):
        log(line)
    log(ranking_of(measured.quality.numpy(), channels, measured.volumes.numpy()).describe())
