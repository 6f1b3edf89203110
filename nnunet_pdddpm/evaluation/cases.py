"""All metrics of one case."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, region_or_label_to_mask

from nnunet_pdddpm.evaluation.calibration import (
    Reliability,
    area_under_risk_coverage,
    area_under_roc,
)
from nnunet_pdddpm.evaluation.folders import Folders, Label, Mask
from nnunet_pdddpm.evaluation.overlap import iou_matrix, lesion_f1, mean_of_pairs
from nnunet_pdddpm.evaluation.parts import Measurements, measure
from nnunet_pdddpm.evaluation.raters import best_dice, fair_ged_squared, ged_squared, hungarian_matched_iou
from nnunet_pdddpm.evaluation.scores import fair_crps, fair_energy_score
from nnunet_pdddpm.evaluation.surfaces import hd95_and_surface_dice
from nnunet_pdddpm.evaluation.voxelwise import Calibration, class_statistics, region_statistics
from nnunet_pdddpm.file_names import UNCERTAINTY
from nnunet_pdddpm.geometry import voxel_volume_ml
from nnunet_pdddpm.image_files import sample_files

MARGIN_MM = 10.0
"""What the box around the reference's foreground is enlarged by."""
VOLUME_SCORES = ('crps_volume_ml', 'crps_components', 'energy_octants_ml', 'energy_components_ml')
NAN = float('nan')


@dataclass
class CaseResult:
    """Values of a case; nan where a metric is undefined, absent where its input is.

    Attributes:
        labels: by label name, then by metric.
        voxelwise: calibration and error-uncertainty by region of voxels, `all` and `near`, then by metric.
        bins: reliability by region of voxels.
        values: of the case as a whole: `dice`, `estimated_dice`, `samples`, `raters`.
        best_dice_per_rater: mean over labels, by rater.
        measurements: of samples and of raters (else the reference), by label name; empty if there are fewer than two
            samples or the reference has ignored voxels.
    """
    case: str
    labels: dict[str, dict[str, float]]
    voxelwise: dict[str, dict[str, float]] = field(default_factory=dict)
    bins: dict[str, Reliability] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    best_dice_per_rater: dict[str, float] = field(default_factory=dict)
    measurements: dict[str, tuple[Measurements, Measurements]] = field(default_factory=dict)


class _Case:
    """Reference and prediction of a case, with the voxels of the ignore label known."""

    def __init__(self, folders: Folders, case: str) -> None:
        self.folders, self.name = folders, case
        self.reference = folders.read_mask(folders.references / f'{case}{folders.ending}')
        self.prediction = folders.read_mask(folders.predictions / f'{case}{folders.ending}', self.reference)
        self.valid = np.ones(self.reference.array.shape, bool)
        if folders.ignore_label is not None:
            self.valid = self.reference.array != folders.ignore_label
        self.voxel_ml = voxel_volume_ml(self.valid.shape, self.reference.spacing)

    def mask(self, source: Mask, label: Label) -> np.ndarray:
        """(z, y, x) bool of a label or region, False where the reference has the ignore label."""
        return region_or_label_to_mask(source.array, label) & self.valid


def evaluate_case(folders: Folders, case: str, tolerance: float) -> CaseResult:
    """Every metric that the files of a case allow.

    Args:
        folders: from `open_folders`.
        case: one of its cases.
        tolerance: mm within which a surface counts as found.

    Raises:
        EvaluationError: if a file is unreadable or does not fit the reference.
    """
    data = _Case(folders, case)
    result = CaseResult(case, _accuracy(data, tolerance))
    result.values['dice'] = _nanmean(metrics['dice'] for metrics in result.labels.values())
    _add_voxelwise(data, result)
    samples = [folders.read_mask(file, data.reference)
               for file in sample_files(folders.predictions, case, folders.ending)]
    _add_estimates(data, samples, result)
    _add_samples_and_raters(data, samples, result)
    return result


def _accuracy(data: _Case, tolerance: float) -> dict[str, dict[str, float]]:
    folders = data.folders
    by_nnunet = compute_metrics(str(data.reference.file), str(data.prediction.file), folders.reader,
                                list(folders.labels.values()), folders.ignore_label)['metrics']
    labels = {}
    for name, label in folders.labels.items():
        reference, prediction = (data.mask(mask, label) for mask in (data.reference, data.prediction))
        distance, surface_dice = hd95_and_surface_dice(reference, prediction, data.reference.spacing, tolerance)
        volume, true_volume = (int(by_nnunet[label][key]) * data.voxel_ml for key in ('n_pred', 'n_ref'))
        labels[name] = {'dice': float(by_nnunet[label]['Dice']), 'iou': float(by_nnunet[label]['IoU']),
                        'hd95_mm': distance, 'surface_dice': surface_dice,
                        'lesion_f1': lesion_f1(reference, prediction),
                        'volume_ml': volume, 'reference_volume_ml': true_volume,
                        'volume_difference_ml': abs(volume - true_volume)}
    return labels


def _add_voxelwise(data: _Case, result: CaseResult) -> None:
    """Calibration where there are probabilities; error against uncertainty where there are these or a map."""
    folders = data.folders
    npz = folders.predictions / f'{data.name}.npz'
    map_file = folders.predictions / UNCERTAINTY / f'{data.name}_{UNCERTAINTY}{folders.ending}'
    uncertainty = folders.read_map(map_file, data.reference) if map_file.is_file() else None
    foreground = data.valid & (data.reference.array > 0)
    places = {'all': data.valid, 'near': data.valid & _box_around(foreground, data.reference.spacing)}
    calibration, entropy = _probability_statistics(data, npz, places) if npz.is_file() else ({}, None)
    uncertainty = entropy if uncertainty is None else uncertainty
    wrong = np.zeros(data.valid.shape, bool)
    for label in folders.labels.values():
        wrong |= data.mask(data.reference, label) != data.mask(data.prediction, label)
    for name, voxels in places.items():
        metrics: dict[str, float] = {}
        if name in calibration and voxels.any():
            metrics, result.bins[name] = calibration[name].metrics, calibration[name].bins
        if uncertainty is not None and voxels.any() and data.name not in folders.foreign_masks:
            metrics |= {'aurc': area_under_risk_coverage(uncertainty[voxels], wrong[voxels]),
                        'auroc': area_under_roc(uncertainty[voxels], wrong[voxels])}
        if metrics:
            result.voxelwise[name] = {'voxels': int(np.count_nonzero(voxels)), **metrics}


def _probability_statistics(data: _Case, npz: Path, places: dict[str, np.ndarray]
                      ) -> tuple[dict[str, Calibration], np.ndarray]:
    """What the probabilities in a file say against the reference: in each place, a mask (z, y, x), and their entropy
    (z, y, x), of regions the mean over them."""
    channels, labels = data.folders.read_probabilities(npz, data.reference), data.folders.labels.values()
    problems = region_statistics(channels, (region_or_label_to_mask(data.reference.array, label) for label in labels)) \
        if data.folders.has_regions else [class_statistics(channels, data.reference.array)]
    calibration, entropy, number = {name: Calibration() for name in places}, np.zeros(data.valid.shape, np.float32), 0
    for problem in problems:
        for name, voxels in places.items():
            calibration[name].add(problem.inside(voxels))
        entropy += problem.entropy
        number += 1
    return calibration, entropy / np.float32(number)


def _box_around(foreground: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The bounding box of a bool mask, enlarged by MARGIN_MM to all sides, as a mask; empty if the mask is."""
    box = np.zeros_like(foreground)
    if foreground.any():
        sides = []
        for axis, step in enumerate(spacing):
            there = np.flatnonzero(foreground.any(tuple(a for a in range(foreground.ndim) if a != axis)))
            margin = int(MARGIN_MM / step + 1e-6)
            sides.append(slice(max(0, there[0] - margin), there[-1] + 1 + margin))
        box[tuple(sides)] = True
    return box


def _add_estimates(data: _Case, samples: list[Mask], result: CaseResult) -> None:
    """The model's estimate of Dice, its calibrated interval of the volume and the range of the samples' volumes.

    They come from the summary; without one, estimate and range from the samples. A mask that is not the summary's has
    none.
    """
    entry = data.folders.summary.get(data.name)
    if entry is not None:
        result.values['estimated_dice'] = _number(entry.get('estimated_dice'))
        comparable = bool(data.valid.all())  # the summary's volumes include what the reference ignores
        for name, metrics in result.labels.items():
            given = entry.get('labels', {}).get(name, {})
            calibrated = not np.isnan(_number(given.get('interval_level')))  # ends without a level promise nothing
            keys = {'volume_low_ml': 'volume_ml_low', 'volume_high_ml': 'volume_ml_high',
                    'samples_low_ml': 'samples_low_ml', 'samples_high_ml': 'samples_high_ml'}
            metrics |= {ours: _number(given.get(theirs)) if comparable and (calibrated or ours == theirs) else NAN
                        for ours, theirs in keys.items()}
            metrics['estimated_dice'] = _number(given.get('estimated_dice'))
    elif len(samples) > 1 and data.name not in data.folders.foreign_masks:
        for name, label in data.folders.labels.items():
            masks = np.stack([data.mask(sample, label) for sample in samples])
            volumes = np.count_nonzero(masks.reshape(len(masks), -1), 1) * data.voxel_ml
            p, mask = masks.mean(0), data.mask(data.prediction, label)
            size = np.count_nonzero(mask) + p.sum()
            result.labels[name] |= {'estimated_dice': float(2 * p[mask].sum() / size) if size > 0 else NAN,
                                    'samples_low_ml': float(volumes.min()), 'samples_high_ml': float(volumes.max())}
        result.values['estimated_dice'] = _nanmean(metrics['estimated_dice'] for metrics in result.labels.values())
    for metrics in result.labels.values():
        _add_shares_inside(metrics, 'reference', [metrics['reference_volume_ml']])


def _add_samples_and_raters(data: _Case, samples: list[Mask], result: CaseResult) -> None:
    """Diversity and scores of the samples; with raters, the distances between both.

    Without samples the mask is the only one, and has no score.
    """
    rater_files = data.folders.rater_files(data.name)
    raters = [data.folders.read_mask(file, data.reference) for file in rater_files.values()]
    drawn = samples or [data.prediction]
    result.values |= {'samples': len(drawn), 'raters': len(raters)}
    per_rater = []
    for name, label in data.folders.labels.items():
        metrics = result.labels[name]
        sample_masks, observed = (np.stack([data.mask(mask, label) for mask in masks])
                                  for masks in (drawn, raters or [data.reference]))
        cross, between_samples, between_observed = (iou_matrix(*pair) for pair in (
            (sample_masks, observed), (sample_masks, sample_masks), (observed, observed)))
        if len(samples) > 1:
            metrics |= {'sample_diversity': mean_of_pairs(1 - between_samples),
                        'ged_squared_fair': fair_ged_squared(cross, between_samples, between_observed)}
            _add_scores(data, name, sample_masks, observed, result)
        if not raters:
            continue
        per_rater.append(best_dice(cross))
        metrics |= {'rater_diversity': mean_of_pairs(1 - between_observed),
                    'ged_squared': ged_squared(cross, between_samples, between_observed),
                    'hm_iou': hungarian_matched_iou(cross), 'best_dice': float(per_rater[-1].mean())}
        _add_shares_inside(metrics, 'raters', np.count_nonzero(observed.reshape(len(raters), -1), 1) * data.voxel_ml)
    if per_rater:
        result.best_dice_per_rater = dict(zip(rater_files, map(float, np.mean(per_rater, 0)), strict=True))


def _add_scores(data: _Case, name: str, samples: np.ndarray, observed: np.ndarray, result: CaseResult) -> None:
    """Scores of a label's volumes and components; nan where the reference has ignored voxels, as these cut structures.

    Args:
        samples: (n, z, y, x) bool.
        observed: (m, z, y, x) bool, of the raters or the reference.
    """
    if not data.valid.all():
        result.labels[name] |= dict.fromkeys(VOLUME_SCORES, NAN)
        return
    s, o = result.measurements[name] = measure(samples, observed, data.reference.spacing, data.voxel_ml)
    result.labels[name] |= dict(zip(VOLUME_SCORES, (
        fair_crps(s.volume, o.volume), fair_crps(s.components, o.components),
        fair_energy_score(s.octants, o.octants), fair_energy_score(s.parts, o.parts)), strict=True))


def _add_shares_inside(metrics: dict[str, float], whose: str, volumes: Any) -> None:
    """Add the share of volumes in ml that lie within a label's calibrated interval, and within the samples' range."""
    for ends, name in (('volume', 'interval'), ('samples', 'range')):
        if f'{ends}_low_ml' in metrics:
            low, high = metrics[f'{ends}_low_ml'], metrics[f'{ends}_high_ml']
            metrics[f'{whose}_in_{name}'] = _share_inside(volumes, low, high)


def _share_inside(volumes: Any, low: float, high: float) -> float:
    """Share of volumes in ml within the ends, rounding of the summary allowed; nan without ends."""
    if np.isnan(low) or np.isnan(high):
        return NAN
    slack = 1e-6 * max(abs(high), 1e-6)
    return float(np.mean([low - slack <= volume <= high + slack for volume in volumes]))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else NAN


def _nanmean(values: Any) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else NAN
