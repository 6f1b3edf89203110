"""The files and the table of an evaluation."""
from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402

from nnunet_pdddpm.files import without_nan, write_atomically  # noqa: E402

JSON, CSV, DIAGRAM = 'evaluation.json', 'evaluation.csv', 'evaluation_reliability.svg'
"""Names of the files. The masks of a data set may be .png files, none of which the diagram may be taken for."""
SCORES = ('ged_squared_fair', 'crps_volume_ml', 'crps_components', 'energy_octants_ml', 'energy_components_ml')
COLUMNS = ('dice', 'iou', 'hd95_mm', 'surface_dice', 'lesion_f1', 'volume_ml', 'reference_volume_ml',
           'volume_difference_ml', 'estimated_dice', 'volume_low_ml', 'volume_high_ml', 'reference_in_interval',
           'samples_low_ml', 'samples_high_ml', 'reference_in_range',
           'sample_diversity', 'rater_diversity', 'ged_squared', 'hm_iou', 'best_dice', 'raters_in_interval',
           'raters_in_range', *SCORES)
"""Metrics of a case and label, in the order of the CSV's columns."""
TITLES = {'dice': 'Dice', 'hd95_mm': 'HD95 mm', 'surface_dice': 'surf.Dice', 'lesion_f1': 'lesion F1',
          'volume_difference_ml': '|dV| ml', 'estimated_dice': 'est. Dice', 'reference_in_interval': 'V in int.',
          'reference_in_range': 'V in range', 'raters_in_range': 'V in range',
          'ged_squared': 'GED^2', 'hm_iou': 'HM-IoU', 'best_dice': 'best Dice', 'sample_diversity': 'div. samp.',
          'rater_diversity': 'div. rat.', 'raters_in_interval': 'V in int.', 'nll': 'NLL', 'brier': 'Brier',
          'ged_squared_fair': 'fair GED^2', 'crps_volume_ml': 'CRPS V ml', 'crps_components': 'CRPS comp.',
          'energy_octants_ml': 'ES oct. ml', 'energy_components_ml': 'ES comp. ml', 'sd_ratio': 'sd V',
          'sd_ratio_components': 'sd comp.', 'sd_ratio_parts': 'sd octants', 'correlation_parts': 'corr. samp.',
          'correlation_parts_reference': 'corr. truth', 'ece': 'ECE', 'adaptive_ece': 'adapt.ECE', 'aurc': 'AURC',
          'auroc': 'AUROC'}


def write_files(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Write JSON, CSV and, if there are probabilities, the reliability diagram; return the files.

    Everything is written beside first and then renamed: an earlier evaluation is replaced as a whole or not at all. A
    diagram of an earlier evaluation is removed if this one has none.

    Raises:
        OSError: if the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {JSON: json.dumps(without_nan(summary), indent=1).encode(), CSV: _csv(summary).encode()}
    if summary['reliability']:
        contents[DIAGRAM] = _reliability_diagram(summary['reliability'])
    written = write_atomically(folder, contents)
    if DIAGRAM not in contents:
        (folder / DIAGRAM).unlink(missing_ok=True)
    return written


def _csv(summary: dict[str, Any]) -> str:
    """One row per case and label, and one per case that could not be evaluated; undefined and missing values are empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['case', 'label', *COLUMNS, 'samples', 'raters', *(['error'] if summary['failed'] else [])])
    for case in summary['cases']:
        for name, metrics in case['labels'].items():
            values = (metrics.get(column, np.nan) for column in COLUMNS)
            writer.writerow([case['case'], name, *('' if np.isnan(value) else f'{value:.6g}' for value in values),
                             case['samples'], case['raters'], *([''] if summary['failed'] else [])])
    for row in summary['failed']:
        writer.writerow([row['case'], *[''] * (len(COLUMNS) + 3), row['error']])
    return text.getvalue()


# the process may have trained: nnU-Net then sets fonts for its own, much larger figure
@plt.style.context(['default', {'svg.hashsalt': DIAGRAM}])
def _reliability_diagram(pooled: dict[str, dict[str, Any]]) -> bytes:
    """SVG: accuracy over confidence with the share of voxels below, for all voxels and those near the foreground."""
    titles = {'all': 'all voxels', 'near': 'near the reference'}
    figure, axes = plt.subplots(2, len(pooled), figsize=(4.2 * len(pooled), 5.2), squeeze=False, sharex=True,
                                height_ratios=[3, 1])
    for (where, bins), (upper, lower) in zip(pooled.items(), axes.T, strict=True):
        accuracy, confidence, voxels = (np.array(bins[key], float) for key in ('accuracy', 'confidence', 'voxels'))
        edges = np.linspace(0, 1, len(voxels) + 1)
        upper.bar(edges[:-1], accuracy, edges[1], align='edge', color='tab:blue', alpha=0.5, edgecolor='white')
        upper.plot([0, 1], [0, 1], color='grey', linestyle='--', linewidth=1)
        upper.plot(confidence, accuracy, 'o', color='black', markersize=3)
        upper.set(title=f'{titles[where]}: ECE {bins["ece"]:.4f}', ylabel='share correct', ylim=(0, 1))
        lower.bar(edges[:-1], voxels / voxels.sum(), edges[1], align='edge', color='grey', edgecolor='white')
        lower.set(xlabel='confidence', ylabel='share of voxels', yscale='log', xlim=(0, 1))
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='svg', metadata={'Date': None})  # the same file for the same evaluation
    plt.close(figure)
    return buffer.getvalue()


def format_tables(summary: dict[str, Any]) -> str:
    """The means that the command prints, and what was not computed."""
    return '\n'.join(_lines(summary))


def _lines(summary: dict[str, Any]) -> Iterator[str]:
    labels = {**summary['mean'], 'mean': summary['foreground_mean']}
    tolerance = summary['settings']['surface_dice_tolerance_mm']
    yield (f'{summary["num_cases"]} cases, means over cases; surface Dice within {tolerance:g} mm')
    yield from _table(labels, ('dice', 'hd95_mm', 'surface_dice', 'lesion_f1', 'volume_difference_ml'))
    empty = {name: count for name, count in summary['both_empty'].items() if count}
    if empty:
        yield ('  left out where mask and reference are empty: '
               + ', '.join(f'{name} in {count} cases' for name, count in empty.items()))
    if summary['voxelwise']:
        yield f'Voxels: all, and those near the reference (its box and {summary["settings"]["near_margin_mm"]:g} mm)'
        yield from _table(summary['voxelwise'], ('nll', 'brier', 'ece', 'adaptive_ece', 'aurc', 'auroc'))
    if summary['estimated_dice']:
        yield ("Estimated Dice, and Dice of the same cases; the reference's volume in its calibrated interval, and "
               "between the samples' volumes")
        yield from _table(_with_dice_of_estimated(summary),
                          ('estimated_dice', 'dice', 'reference_in_interval', 'reference_in_range'))
        yield '  correlation of estimated with true Dice (Spearman, Pearson, cases): ' + '; '.join(
            f'{name} {_figure(row["spearman"])}, {_figure(row["pearson"])}, {row["n"]}'
            for name, row in summary['estimated_dice'].items())
    samples, raters = (_counts(summary[key]) for key in ('samples', 'raters'))
    if 'ged_squared' in summary['foreground_mean']:
        yield f'{samples} samples against {raters} raters; both diversities over the same cases'
        yield from _table(labels, ('ged_squared', 'hm_iou', 'best_dice', 'sample_diversity', 'rater_diversity',
                                   'raters_in_interval', 'raters_in_range'))
    elif 'sample_diversity' in summary['foreground_mean']:
        yield f'{samples} samples'
        yield from _table(labels, ('sample_diversity',))
    if 'ged_squared_fair' in summary['foreground_mean']:
        against = 'the reference' if raters == '0' else f'{raters} raters'
        yield f'Scores of {samples} samples against {against}, lower is better; fair for independent draws'
        yield from _table(labels, SCORES)
        several = [case['raters'] > 1 for case in summary['cases'] if case['samples'] > 1]
        if any(several) and not all(several):
            yield '  fair GED^2 over the cases with several raters'
    if summary['sample_spread']:
        yield "Spread of the samples over the truth's distance from their mean: 1 is right; correlation of the octants"
        yield from _table(summary['sample_spread'], ('sd_ratio', 'sd_ratio_components', 'sd_ratio_parts',
                                                     'correlation_parts', 'correlation_parts_reference'))
    for line in summary['left_out']:
        yield f'Not compared: {line}'
    for line in summary['doubtful']:
        yield f'Look at this: {line}'
    for line in summary['not_computed']:
        yield f'Not computed: {line}'


def _with_dice_of_estimated(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The means of labels and their mean, with the Dice of the cases that have an estimate."""
    rows = {name: {**row, 'dice': summary['estimated_dice'][name]['dice']} for name, row in summary['mean'].items()}
    mean = float(np.mean([row['dice'] for row in rows.values()]))
    return {**rows, 'mean': {**summary['foreground_mean'], 'dice': mean}}


def _counts(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f'{counts[0]} to {counts[-1]}'


def _table(rows: dict[str, dict[str, float]], columns: tuple[str, ...]) -> Iterator[str]:
    """Lines of a table with the columns that some row has."""
    shown = [column for column in columns if any(column in row for row in rows.values())]
    width = max(map(len, rows)) + 4
    yield ' ' * width + ''.join(TITLES[column].rjust(12) for column in shown)
    for name, row in rows.items():
        yield f'  {name}'.ljust(width) + ''.join(_figure(row.get(column, np.nan)).rjust(12) for column in shown)


def _figure(value: float) -> str:
    if np.isnan(value):
        return '-'
    return f'{value:.2e}' if 0 < abs(value) < 0.001 else f'{value:.4f}'
