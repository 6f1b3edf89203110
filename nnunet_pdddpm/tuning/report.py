"""sampling_sweep.json, .csv and .png: what was measured, what was chosen, and what was left out."""
from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from nnunet_pdddpm.files import without_nan, write_atomically
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.choice import LEVEL, RESAMPLINGS, SEED, Row, difference_interval, mean, stock_row
from nnunet_pdddpm.tuning.sweep import WAYS, Sweep

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402

NAME = 'sampling_sweep'


@dataclass(frozen=True)
class Choice:
    """What is put into the model."""
    mask: SamplingSettings
    samples: SamplingSettings
    interval_sd: tuple[float, ...]
    """Of the volumes, for each channel of the network, 0 where not known: see `conformal_widths`."""

    def items(self) -> list[tuple[str, SamplingSettings]]:
        """What each is for, and it."""
        return [('mask', self.mask), ('samples', self.samples)]


def in_one_line(sweep: Sweep, choice: Choice) -> str:
    """What was chosen and what it is worth on the cases it was chosen on."""
    stock, mask = sweep.rows[sweep.for_mask[0]], sweep.rows[choice.mask]
    line = (f'{_named(choice.mask)}, blend={choice.mask.blend:g}: Dice {mean(mask.dice):.4f} against stock '
            f'{mean(stock.dice):.4f} on {len(sweep.cases)} cases, NLL {mean(mask.nll):.3g} against '
            f'{mean(stock.nll):.3g}')
    samples = sweep.rows[choice.samples]
    between = '' if samples.agreement is None else f', Dice between them {mean(samples.agreement):.3f}'
    known = [f'{sd:.2f}' for sd in choice.interval_sd if sd > 0]
    interval = f', intervals of volumes {", ".join(known)} sd to both sides' if known else ''
    return f'{line}; samples: {_named(choice.samples)}: GED² {mean(samples.ged):.3f}{between}{interval}'


def _named(settings: SamplingSettings) -> str:
    way = ', redraw' if settings.redraw else f', eta={settings.eta:g}' if settings.eta > 0 else ''
    return f't_start={settings.t_start}, k={settings.steps}{way}'


def left_out(sweep: Sweep) -> str:
    """What there was no time for; the empty string if nothing."""
    parts = []
    if sweep.settings_left_out:
        ways = sorted({(s.steps, s.redraw, s.eta) for s in sweep.settings_left_out})
        parts.append('settings with ' + ', '.join(
            f'k={k}' + (' redraw' if redraw else f' eta={eta:g}' if k > 1 else ' for the mask')
            for k, redraw, eta in ways))
    if sweep.cases_left_out:
        parts.append(f'{len(sweep.cases_left_out)} of {len(sweep.cases) + len(sweep.cases_left_out)} cases')
    return ' and '.join(parts)


def write(folder: Path, sweep: Sweep, choice: Choice) -> list[Path]:
    """Write CSV, PNG and JSON into the fold's folder, all beside first and then renamed, the JSON last; the files.

    Raises:
        OSError: if the folder cannot be written to.
    """
    contents = {f'{NAME}.csv': _table(sweep, choice).encode(), f'{NAME}.png': _picture(sweep, choice),
                f'{NAME}.json': json.dumps(without_nan(_summary(sweep, choice)), indent=1).encode()}
    return write_atomically(folder, contents)


def _means(row: Row, sweep: Sweep, choice: Choice) -> dict[str, Any]:
    settings, stock = row.settings, stock_row(list(sweep.rows.values()))
    low, high = difference_interval(row.dice, stock.dice)
    return {'for_mask': settings in sweep.for_mask, 'for_samples': settings in sweep.for_samples,
            'chosen': ' and '.join(of for of, s in choice.items() if s == settings),
            **asdict(settings), 'network_calls': row.calls, 'dice': mean(row.dice),
            'dice_difference_to_stock': mean(row.dice) - mean(stock.dice), 'dice_difference_low': low,
            'dice_difference_high': high, 'nll': mean(row.nll), 'agreement': mean(row.agreement),
            'ged_squared': mean(row.ged)}


def _summary(sweep: Sweep, choice: Choice) -> dict[str, Any]:
    rows = []
    for row in sweep.rows.values():
        per_case = {name: None if values is None else values.tolist() for name, values in (
            ('dice', row.dice), ('nll', row.nll), ('agreement', row.agreement), ('ged_squared', row.ged),
            ('volume_errors', row.volume_errors))}
        rows.append({**_means(row, sweep, choice), 'per_case': per_case})
    return {'chosen': asdict(choice), 'in_one_line': in_one_line(sweep, choice), 'cases': sweep.cases,
            'left_out': {'settings': [asdict(s) for s in sweep.settings_left_out], 'cases': sweep.cases_left_out},
            'seconds': round(sweep.seconds, 1), 'rows': rows,
            'interval': {'level': LEVEL, 'resamplings': RESAMPLINGS, 'seed': SEED}}


def _table(sweep: Sweep, choice: Choice) -> str:
    """One line a row; undefined values are empty."""
    lines = [_means(row, sweep, choice) for row in sweep.rows.values()]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator='\n')
    writer.writeheader()
    for line in lines:
        writer.writerow({key: '' if isinstance(value, float) and math.isnan(value) else f'{value:.6g}'
                         if isinstance(value, float) else value for key, value in line.items()})
    return text.getvalue()


@plt.style.context('default')  # in training nnU-Net has set fonts for its own, much larger figure
def _picture(sweep: Sweep, choice: Choice) -> bytes:
    """PNG: Dice, NLL, GED² and network calls against k, a line for each t_start, no blending; stock is horizontal."""
    drawn = [row for row in sweep.rows.values() if not row.settings.is_stock and row.settings.blend == 0]
    number = max(row.settings.samples for row in drawn)
    drawn = [row for row in drawn if row.settings.samples == number]
    panels: list[tuple[str, Callable[[Row], float]]] = [
        ('Dice', lambda row: mean(row.dice)), ('NLL, nats a voxel', lambda row: mean(row.nll)),
        ('GED² of the samples', lambda row: mean(row.ged)), ('denoiser calls a tile', lambda row: row.calls)]
    levels = sorted({row.settings.t_start for row in drawn})
    colours = plt.get_cmap('viridis')(np.linspace(0, 0.9, len(levels)))
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4))
    for axis, (title, value) in zip(axes, panels, strict=True):
        for level, colour in zip(levels, colours, strict=True):
            for way, style in zip(WAYS, ('-', '--', ':'), strict=True):
                line = _line(drawn, level, way, value)
                if len(line) > (way != WAYS[0]):
                    axis.plot(*zip(*line, strict=True), style, marker='o', markersize=3, color=colour,
                              label=f't_start={level}' if way == WAYS[0] else None)
        axis.axhline(value(sweep.rows[sweep.for_mask[0]]), color='black', linewidth=1, label='stock')
        for (of, settings), marker in zip(choice.items(), '*s', strict=True):
            if not settings.is_stock and (of == 'samples' or not title.startswith('GED')):
                axis.plot(settings.steps, value(sweep.rows[settings]), marker, color='tab:red', markersize=11,
                          fillstyle='none', label=f'chosen for the {of}')
        axis.set(xlabel='steps k', ylabel=title, xscale='log')
        axis.set_xticks(ticks := sorted({row.settings.steps for row in drawn}), [str(k) for k in ticks], minor=False)
        axis.minorticks_off()
    axes[-1].legend(fontsize=8, loc='center left', bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(f'{len(sweep.cases)} validation cases, mean of {number} samples, not blended; dashed: eta 1; '
                    'dotted: redraw', fontsize=10)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _line(rows: Sequence[Row], level: int, way: tuple[float, bool], value: Callable[[Row], float]
          ) -> list[tuple[int, float]]:
    """(k, value) along k; a single step, in which eta and redraw have no part, begins every line."""
    return sorted((row.settings.steps, value(row)) for row in rows if row.settings.t_start == level
                  and (row.settings.way == way or row.settings.steps == 1))
