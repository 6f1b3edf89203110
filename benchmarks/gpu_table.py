"""The page of what `gpu.py` has measured so far. Needs no GPU."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from page import markdown

METHODS = {'stock': 'stock `nnUNetv2_predict`', 'plain': '`nnUNetv2_predict` with PDDDPM, blind mask',
           'samples': '8 samples, maps, blind mask', 'of_samples': '8 samples, maps, mask of the samples'}
ROWS = {'stock': 'stock', 'longer': 'control: stock trained longer', 'second': 'second network, cross-entropy alone',
        'blind': 'PDDDPM, blind mask', 'samples': 'PDDDPM, mean of 8 samples'}
NOTHING = 'Not measured yet.'
Cells = dict[str, dict[str, Any]]


def rows_of_stage(cells: Cells, stage: str) -> Cells:
    """Those with numbers, by the rest of their names."""
    return {name[len(stage) + 1:]: cell for name, cell in cells.items()
            if name.startswith(f'{stage}_') and ('seconds' in cell or 'dice' in cell)}


def ratio(cell: dict[str, Any], stock: dict[str, Any] | None, what: str = 'seconds') -> str:
    """To stock's median of the same classes."""
    if stock is None or stock.get(what) is None or cell.get(what) is None:
        return ''
    return f'{np.median(cell[what]) / np.median(stock[what]):.2f}'


def timing(cells: Cells, names: dict[str, str], first: str, last: str) -> str:
    """Table of times, each beside stock's."""
    rows = []
    for name, cell in cells.items():
        classes, mode, method = name.split('_', 2)
        stock, median = cells.get(f'{classes}_{mode}_stock'), np.median(cell['seconds'])
        memory = '' if cell['GiB'] is None else f'{cell["GiB"]:.2f}'
        rows.append([str(int(classes)), mode, names[method],
                     f'{median:.4f} ({min(cell["seconds"]):.4f} to {max(cell["seconds"]):.4f})', ratio(cell, stock), memory,
                     ratio(cell, stock, 'GiB'), f'{cell["first"]:.1f}', str(cell.get('launches', ''))])
    head = ['classes', '', '', 'seconds', 'to stock', 'GiB', 'to stock', first, last]
    return markdown(head, rows) if rows else NOTHING


def tops(cells: Cells) -> list[str]:
    """What takes longest in each cell."""
    return [f'- {name.replace("_", " ")}: ' + ', '.join(f'`{operator}` {share:.1%}' for operator, share in cell['top'])
            for name, cell in cells.items() if cell.get('top')]


def trainings(cells: Cells) -> str:
    """Table with a row for each training that is scored."""
    control, rows = cells.get('longer'), []
    for row, title in ROWS.items():
        if (cell := cells.get(row)) is not None:
            dice, nll = ([f'{np.nanmean(cell[metric]):.4f}', '' if control is None or row in ('stock', 'longer') else
                          f'{np.nanmean(np.subtract(cell[metric], control[metric])):+.4f}'] for metric in ('dice', 'nll'))
            rows.append([title, f'{"" if row == "stock" else "stock + "}{cell["iterations"]}', *dice, *nll,
                         f'{np.median(cell["seconds"]):.3f}', str(cell['checkpoint_MB'])])
    head = ['', 'iterations', 'Dice', 'Δ', 'NLL', 'Δ', 's a case', 'checkpoint']
    return markdown(head, rows) if rows else NOTHING


def tests(cell: dict[str, Any] | None) -> str:
    """What became of the suite's CUDA tests."""
    if cell is None or 'passed' not in cell:
        return 'Not run.'
    failed = ''.join(f'\n- failed: {name}' for name in cell['failed'])
    return f'{len(cell["passed"])} passed, {len(cell["failed"])} failed, {len(cell["skipped"])} skipped.{failed}'


def write_table(results: Path) -> None:
    """The page, beside the results."""
    if not results.is_file():
        raise SystemExit(f'{results} is not there: run gpu.py -o {results} on a GPU first.')
    cells: Cells = dict(sorted(json.loads(results.read_text()).items()))
    errors = [f'- {name}: {cell["error"]}' for name, cell in cells.items() if 'error' in cell]
    dry = any(cell['tiny'] for cell in cells.values())
    speed, iterations = rows_of_stage(cells, 'speed'), rows_of_stage(cells, 'iterations')
    results.with_suffix('.md').write_text('\n'.join([
        '# On a GPU', '', '    .venv/bin/python benchmarks/gpu.py -o gpu.json -data FOLDER', '',
        *(f'Measured on: {on}.' for on in sorted({cell['on'] for cell in cells.values()})),
        *(['', '**A dry run: tiny networks, made-up data. No number here means anything.**'] if dry else []), '',
        "## The suite's CUDA tests", '', tests(cells.get('tests')), '',
        '## Prediction', '',
        "A volume of noise, 192 x 192 x 192, by networks with random weights of nnU-Net's own plans for patches of "
        '128 x 128 x 128, mirrored; network part, the result in main memory. Both networks in the autocast that nnU-Net '
        'has. Compiled: both networks by torch.compile. Seconds are the median (range); the first call, which '
        'compiles and tries algorithms, is beside them. Kernels are those of a volume of one patch.', '',
        timing(speed, METHODS, 'first call, s', 'kernels'), '',
        'What takes longest, on a volume of one patch:', '', *(tops(speed) or [NOTHING]), '',
        '## An iteration of training', '',
        'The same networks, batch of two, without data loading. GiB include the optimizer. The first column of '
        'calls is what several iterations take together that come before.', '',
        timing(iterations, {'stock': 'nnUNetTrainer', 'PDDDPM': 'PDDDPMTrainer'}, 'first calls, s', ''), '',
        '## Hippocampus', '',
        "nnU-Net's own plan, one fold, one training each, the 50 test cases of `run.py hippocampus`, with mirroring. Settings "
        'are not tuned. Δ is the mean difference to the control: of one training, so without an interval. Seconds are of '
        "a case's network part, median; checkpoints are in the work folder, in MB.", '',
        trainings(rows_of_stage(cells, 'hippocampus')), '',
        *(['## What failed', '', *errors, ''] if errors else [])]))
