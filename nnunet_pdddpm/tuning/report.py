"""sampling_sweep.json, .csv and .png: what was measured, what was chosen, and what was left out."""
from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from nnunet_pdddpm.files import without_nan, write_atomically
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.choice import (
    CONFIDENCE,
    MaskRow,
    SampleRow,
    difference_interval,
    mean,
    stock_row,
)
from nnunet_pdddpm.tuning.sweep import Sweep

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402

SWEEP = 'sampling_sweep'


def summary_lines(sweep: Sweep, settings: SamplingSettings, plain: float) -> list[str]:
    """What was chosen, and its scores on the cases it was chosen on, for the log.

    `plain`: Dice of the mask in plain `nnUNetv2_predict`.
    """
    mask = next(row for row in sweep.masks if row.settings == settings)
    stock = stock_row(sweep.masks)
    chosen = next(row for row in sweep.samples if row.settings == sweep.chosen_samples)
    other = min((row for row in sweep.samples if (row.calls == 0) != (chosen.calls == 0)), default=None,
                key=lambda row: mean(row.energy))
    beside = '' if other is None else f'; {describe_samples(other.settings)}: energy {mean(other.energy):.3f}'
    text = [f'Mask: {describe_mask(mask.settings)}: Dice {mean(mask.dice):.4f}, stock {mean(stock.dice):.4f}; NLL '
            f'{mean(mask.nll):.3g}, stock {mean(stock.nll):.3g}; in plain nnUNetv2_predict Dice {plain:.4f}',
            f'Samples: {describe_samples(chosen.settings)}: energy {mean(chosen.energy):.3f}, GED² '
            f'{mean(chosen.ged):.3f}{beside}',
            f'Temperature {sweep.temperature:g} (of the blind mask {sweep.blind_temperature:g}); measured on '
            f'{len(sweep.cases)} validation cases, {sweep.passes:.0f} passes of the denoiser a case, '
            f'{sweep.seconds:.0f} s']
    number = len(sweep.cases_left_out)
    left_out = [f'{number} of {number + len(sweep.cases)} cases'] if number else []
    left_out += [f'{steps} steps' for steps in sweep.steps_left_out]
    if left_out:
        text.append(f'Skipped for lack of time: {", ".join(left_out)} (nnUNetv2_pdddpm_tune measures them)')
    return text


def describe_mask(settings: SamplingSettings) -> str:
    """What a mask is made of, in words."""
    parts = {'stock': 1.0 if settings.is_stock else settings.mask_stock,
             'blind mask': 0.0 if settings.is_stock else settings.mask_blind,
             'mean of the samples': 0.0 if settings.is_stock else settings.mask_chain}
    return ' + '.join(f'{weight:g} {name}' if weight < 1 else name for name, weight in parts.items() if weight > 0)


def describe_samples(settings: SamplingSettings) -> str:
    """How samples are drawn, in words."""
    drawn = f'dependence {settings.dependence:g}'
    if settings.samples_from == 'chain':
        return f'start {settings.start:g}, {settings.steps} step{"s" if settings.steps > 1 else ""}, {drawn}'
    source, temperature = ('stock', settings.temperature) if settings.samples_from == 'stock' else \
        ('the blind mask', settings.blind_temperature)
    return f'thresholds of {source}, temperature {temperature:g}, {drawn}'


def write_sweep(folder: Path, sweep: Sweep, settings: SamplingSettings, plain: float) -> list[Path]:
    """Write CSV, PNG and JSON into the fold's folder, all beside first and then renamed, the JSON last; the files.

    Raises:
        OSError: if the folder cannot be written to.
    """
    contents = {f'{SWEEP}.csv': _table(sweep, settings).encode(), f'{SWEEP}.png': _picture(sweep),
                f'{SWEEP}.json': json.dumps(without_nan(_summary(sweep, settings, plain)), indent=1).encode()}
    return write_atomically(folder, contents)


def _mask_row(row: MaskRow, sweep: Sweep, settings: SamplingSettings) -> dict[str, Any]:
    stock = stock_row(sweep.masks)
    low, high = difference_interval(row.dice, stock.dice, sweep.images)
    return {'kind': 'mask', 'description': describe_mask(row.settings), 'chosen': row.settings == settings,
            'network_calls': row.calls,
            'dice': mean(row.dice), 'dice_difference_to_stock': mean(row.dice) - mean(stock.dice),
            'dice_difference_low': low, 'dice_difference_high': high, 'nll': mean(row.nll)}


def _sample_row(row: SampleRow, sweep: Sweep, last: bool) -> dict[str, Any]:
    return {'kind': 'samples' if last else 'samples, first rounds', 'description': describe_samples(row.settings),
            'chosen': last and row.settings == sweep.chosen_samples, 'network_calls': row.calls,
            'energy': mean(row.energy), 'ged_squared_fair': mean(row.ged)}


def _rows(sweep: Sweep, settings: SamplingSettings) -> list[dict[str, Any]]:
    return [*(_mask_row(row, sweep, settings) for row in sweep.masks),
            *(_sample_row(row, sweep, True) for row in sweep.samples),
            *(_sample_row(row, sweep, False) for row in sweep.first_rounds)]


def _summary(sweep: Sweep, settings: SamplingSettings, plain: float) -> dict[str, Any]:
    per_case = [*({'dice': row.dice.tolist(), 'nll': row.nll.tolist()} for row in sweep.masks),
                *({'energy': row.energy.tolist(), 'ged_squared_fair': row.ged.tolist()}
                  for row in (*sweep.samples, *sweep.first_rounds))]
    all_settings = [row.settings for row in sweep.masks]
    all_settings += [row.settings for row in (*sweep.samples, *sweep.first_rounds)]
    return {'chosen': asdict(settings), 'plain_dice': plain, 'log': summary_lines(sweep, settings, plain),
            'cases': sweep.cases, 'cases_left_out': sweep.cases_left_out, 'steps_left_out': sweep.steps_left_out,
            'temperature': sweep.temperature, 'blind_temperature': sweep.blind_temperature,
            'seconds': round(sweep.seconds, 1), 'passes': sweep.passes,
            'rows': [{**row, 'settings': asdict(row_settings), 'per_case': values}
                     for row, row_settings, values in zip(_rows(sweep, settings), all_settings, per_case, strict=True)],
            'interval': {'level': CONFIDENCE, 'by': "Student's t over cases"}}


def _table(sweep: Sweep, settings: SamplingSettings) -> str:
    """One line a row; undefined values are empty."""
    rows = _rows(sweep, settings)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
    writer.writeheader()
    for row in rows:
        writer.writerow({key: '' if isinstance(value, float) and math.isnan(value) else f'{value:.6g}'
                         if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


@plt.style.context('default')  # in training nnU-Net has set fonts for its own, much larger figure
def _picture(sweep: Sweep) -> bytes:
    """PNG: energy of the samples against steps, a line for each start; Dice and NLL of the masks."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    chains = [row for row in sweep.first_rounds if row.calls]
    starts = sorted({row.settings.start for row in chains}, reverse=True)
    for start, colour in zip(starts, plt.get_cmap('viridis')(np.linspace(0, 0.9, len(starts))), strict=True):
        line = sorted((row.calls, mean(row.energy)) for row in chains if row.settings.start == start)
        left.plot(*zip(*line, strict=True), marker='o', color=colour, label=f'start {start:g}')
    without = min((row for row in sweep.first_rounds if not row.calls), key=lambda row: mean(row.energy))
    left.axhline(mean(without.energy), color='black', linewidth=1, label=describe_samples(without.settings))
    left.set(xlabel='steps', ylabel='energy score of the samples')
    left.set_xticks(sorted({row.calls for row in chains}))
    left.legend(fontsize=8)
    for row in sweep.masks:
        right.plot(mean(row.nll), mean(row.dice), 'o', color='tab:blue')
        right.annotate(describe_mask(row.settings), (mean(row.nll), mean(row.dice)), fontsize=6)
    right.set(xlabel='NLL of the mask, nats a voxel', ylabel='Dice of the mask')
    figure.suptitle(f'{len(sweep.cases)} validation cases', fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    plt.close(figure)
    return buffer.getvalue()
