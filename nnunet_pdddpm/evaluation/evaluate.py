"""Evaluation of folders: every case, means over cases, and what needs many cases."""
from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from nnunet_pdddpm.evaluation.calibration import NUM_BINS, Reliability, correlation
from nnunet_pdddpm.evaluation.cases import MARGIN_MM, CaseResult, evaluate_case
from nnunet_pdddpm.evaluation.folders import EvaluationError, Folders
from nnunet_pdddpm.evaluation.parts import Measurements
from nnunet_pdddpm.evaluation.scores import spread_and_correlation
from nnunet_pdddpm.file_names import SAMPLES, SUMMARY, UNCERTAINTY

Means = dict[str, float]
COMPARED_WITH = {'estimated_dice': 'dice', 'sample_diversity': 'rater_diversity', 'rater_diversity': 'sample_diversity',
                 'ged_squared_fair': 'rater_diversity'}
"""Metric of a label -> another one: its mean is over the cases that have both, if there are any. From the fair GED the
raters' diversity is subtracted: without it, a case has another scale."""


def evaluate_cases(folders: Folders, tolerance: float = 1.0, num_processes: int = 1,
                   progress_bar: bool = False) -> tuple[list[CaseResult], dict[str, str]]:
    """All cases, in their order.

    Args:
        folders: from `open_folders`.
        tolerance: of the surface Dice, in mm.
        num_processes: cases that are worked on at once; 1 stays in this process.
        progress_bar: over the cases.

    Returns:
        What was measured; and case -> why not: a file is unreadable, does not fit the reference or is of an earlier
        prediction, or memory is not enough.

    Raises:
        EvaluationError: if no case can be evaluated, or a process was killed.
    """
    work = partial(_result_or_reason, folders, tolerance)
    show = partial(tqdm, total=len(folders.cases), disable=not progress_bar)
    if min(num_processes, len(folders.cases)) == 1:
        found = list(show(map(work, folders.cases)))
    else:
        with ProcessPoolExecutor(min(num_processes, len(folders.cases)), multiprocessing.get_context('spawn')) as pool:
            try:
                found = list(show(pool.map(work, folders.cases)))
            except BrokenProcessPool:
                raise EvaluationError('A process was killed, probably for lack of memory: use fewer than '
                                      f'-np {num_processes}.') from None
            finally:
                pool.shutdown(cancel_futures=True)
    failed = {case: result for case, result in zip(folders.cases, found, strict=True) if isinstance(result, str)}
    if len(failed) == len(found):
        others = f' The other {len(failed) - 1} cases cannot be evaluated either.' if len(failed) > 1 else ''
        raise EvaluationError(f'{failed[folders.cases[0]]}{others}')
    return [result for result in found if isinstance(result, CaseResult)], failed


def _result_or_reason(folders: Folders, tolerance: float, case: str) -> CaseResult | str:
    """What was measured of a case, or why nothing can be; an error that is none of its files ends the evaluation."""
    if case in folders.unpredicted:
        return (f'the last prediction of it failed, {folders.unpredicted[case]}, and its mask is an earlier one: '
                f'predict it again, or take it out of "failed" in {SUMMARY} if the mask is right')
    try:
        return evaluate_case(folders, case, tolerance)
    except EvaluationError as error:
        return str(error)
    except MemoryError:
        return 'there is not enough memory for it: use fewer processes (-np), or a machine with more'


def summarise(folders: Folders, results: Sequence[CaseResult], tolerance: float, failed: Mapping[str, str] | None = None
              ) -> dict[str, Any]:
    """What goes into evaluation.json: settings, means, the cases, and why others could not be evaluated.

    A mean over cases leaves out undefined values (nan), and follows `COMPARED_WITH`. As in nnU-Net, `foreground_mean`
    is the mean over labels of these means, and undefined if one of them is.
    """
    labels = {name: _means_of_label([result.labels[name] for result in results]) for name in folders.labels}
    both_empty = {name: sum(_is_empty(result.labels[name]) for result in results) for name in folders.labels}
    pooled = _pooled_bins(results)
    return {
        'settings': {'predictions': str(folders.predictions), 'references': str(folders.references),
                     'raters': None if folders.raters is None else str(folders.raters),
                     'surface_dice_tolerance_mm': tolerance, 'near_margin_mm': MARGIN_MM, 'calibration_bins': NUM_BINS},
        'num_cases': len(results),
        'foreground_mean': {name: float(np.mean([metrics[name] for metrics in labels.values()]))
                            for name in next(iter(labels.values()))
                            if all(name in metrics for metrics in labels.values())},
        'mean': labels,
        'both_empty': both_empty,
        'voxelwise': {where: _means(r.voxelwise[where] for r in results if where in r.voxelwise)
                      for where in ('all', 'near') if any(where in r.voxelwise for r in results)},
        'reliability': {where: {'ece': bins.expected_calibration_error, 'voxels': bins.count.tolist(),
                                'confidence': _ratio(bins.confidence, bins.count),
                                'accuracy': _ratio(bins.correct, bins.count)} for where, bins in pooled.items()},
        'estimated_dice': _estimates(folders, results),
        'best_dice_per_rater': _means(result.best_dice_per_rater for result in results),
        'sample_spread': {name: _spread([r.measurements[name] for r in results if name in r.measurements])
                          for name in folders.labels if any(name in r.measurements for r in results)},
        'samples': sorted({int(result.values['samples']) for result in results}),
        'raters': sorted({int(result.values['raters']) for result in results}),
        'left_out': folders.left_out,
        'doubtful': folders.doubtful,
        'not_computed': list(_not_computed(folders, results)),
        'cases': [{'case': r.case, **r.values, 'labels': r.labels, 'voxelwise': r.voxelwise,
                   'best_dice_per_rater': r.best_dice_per_rater} for r in results],
        'failed': [{'case': case, 'error': why} for case, why in (failed or {}).items()],
    }


def _means(rows: Iterable[dict[str, float]]) -> Means:
    """Mean of each metric over the rows that have it, nan left out."""
    rows = list(rows)
    means = {}
    for metric in dict.fromkeys(metric for row in rows for metric in row):
        values = np.array([row[metric] for row in rows if metric in row], float)
        defined = values[~np.isnan(values)]
        means[metric] = float(defined.mean()) if defined.size else float('nan')
    return means


def _means_of_label(rows: Sequence[dict[str, float]]) -> Means:
    """`_means`, where a metric is compared with another one those over the cases that have both."""
    means = _means(rows)
    for metric, other in COMPARED_WITH.items():
        if both := _with_both(rows, metric, other):
            means[metric] = _means(both)[metric]
    return means


def _with_both(rows: Sequence[dict[str, float]], *metrics: str) -> list[dict[str, float]]:
    """The rows that have these metrics, none of them nan."""
    return [row for row in rows if not any(np.isnan(row.get(metric, np.nan)) for metric in metrics)]


def _is_empty(metrics: dict[str, float]) -> bool:
    return metrics['volume_ml'] == 0 and metrics['reference_volume_ml'] == 0


def _ratio(numerator: np.ndarray, count: np.ndarray) -> list[float]:
    return [float(n / c) if c else float('nan') for n, c in zip(numerator, count, strict=True)]


def _pooled_bins(results: Sequence[CaseResult]) -> dict[str, Reliability]:
    """Reliability over the voxels of all cases, for `all` and `near`."""
    pooled: dict[str, Reliability] = {}
    for result in results:
        for where, bins in result.bins.items():
            pooled[where] = pooled[where] + bins if where in pooled else bins
    return pooled


def _estimates(folders: Folders, results: Sequence[CaseResult]) -> dict[str, dict[str, float]]:
    """Correlation and means of estimated and true Dice over the cases that have both, per label and of the cases' mean;
    empty without estimates."""
    if not any('estimated_dice' in result.values for result in results):
        return {}
    rows: dict[str, list[dict[str, float]]] = {name: [result.labels[name] for result in results]
                                               for name in folders.labels}
    rows['case'] = [result.values for result in results]
    return {name: _estimates_and_truth(_with_both(values, 'estimated_dice', 'dice')) for name, values in rows.items()}


def _estimates_and_truth(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    estimated, true = (np.array([row[which] for row in rows]) for which in ('estimated_dice', 'dice'))
    return {**correlation(estimated, true), 'estimated_dice': float(estimated.mean()) if rows else float('nan'),
            'dice': float(true.mean()) if rows else float('nan')}


def _spread(measurements: Sequence[tuple[Measurements, Measurements]]) -> dict[str, float]:
    """Spread of a label's samples against the truth's residuals: of volume, number of components, octants' volumes."""
    volumes, counts, octants = (
        spread_and_correlation([(values_of(samples), values_of(observed)) for samples, observed in measurements])
        for values_of in (lambda f: f.volume[:, None], lambda f: f.components[:, None], lambda f: f.octants))
    return {'cases': len(measurements), 'sd_ratio': volumes['sd_ratio'], 'sd_ratio_components': counts['sd_ratio'],
            'sd_ratio_parts': octants['sd_ratio'], 'correlation_parts': octants['correlation'],
            'correlation_parts_reference': octants['correlation_reference']}


def _not_computed(folders: Folders, results: Sequence[CaseResult]) -> Iterator[str]:
    """One line for each group of metrics whose input is lacking, in all or in some cases."""
    voxelwise = [result.voxelwise.get('all', {}) for result in results]
    first_labels = [next(iter(result.labels.values())) for result in results]
    evaluated = {result.case for result in results}
    others_of = {case: why for case, why in folders.foreign_masks.items() if case in evaluated}
    for why in sorted(set(others_of.values())):
        others = ', '.join(sorted(case for case, reason in others_of.items() if reason == why))
        yield f'estimates, intervals and error against uncertainty of {others}: the mask that is there {why}'
    for metrics, needs, there in (
            ('calibration (NLL, Brier, ECE)', 'CASE.npz from --save_probabilities', ['nll' in v for v in voxelwise]),
            ('error against uncertainty (AURC, AUROC)', f'{UNCERTAINTY}/CASE_{UNCERTAINTY}{folders.ending} or CASE.npz',
             ['aurc' in v for v in voxelwise]),
            ('estimated Dice and range of the samples', f'{SUMMARY} or {SAMPLES}/CASE_sNN{folders.ending}',
             ['estimated_dice' in result.values for result in results]),
            ('sample diversity and scores (CRPS, energy score, fair GED)',
             f'at least two {SAMPLES}/CASE_sNN{folders.ending}',
             ['sample_diversity' in metrics for metrics in first_labels]),
            ('distances to several raters (GED, HM-IoU)', f'-raters with CASE__RATER{folders.ending}',
             [result.values['raters'] > 0 for result in results])):
        if not all(there):
            lacking = '' if not any(there) else f' ({there.count(False)} of {len(there)} cases lack it)'
            yield f'{metrics}: needs {needs}{lacking}'
