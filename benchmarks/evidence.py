"""The evidence in one place: runs hippocampus.py, cells.py and ambiguous.py where they are not complete, joins rows."""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scale import FULL, SECONDS, machine, results

HERE = Path(__file__).resolve().parent
PARTS = ('hippocampus', 'cells', 'ambiguous')
COLUMNS = ('dice', 'd_dice', 'nll', 'd_nll', 'ece', 'hd95', 'nsd', 'aurc', 'ged', 'd_ged', 'hm_iou', 'calls', 'seconds')
THRESHOLDS = ', 16 thresholds'
COMPARISONS: dict[str, dict[str, list[str]]] = {
    'hippocampus': {'PDDDPM': ['stock', 'stock, temperature', 'control: stock trained longer', 'control, temperature',
                               'no diffusion: second stage', 'no diffusion, cross-entropy alone'],
                    'PDDDPM, 3 folds': ['stock, 3 folds']},
    'cells': {**{f'PDDDPM {starts}: t_start=': [  # and so on: chosen on the validation images
        'stock, mirroring' + THRESHOLDS, 'stock, mirroring, temperature' + THRESHOLDS,
        'control, mirroring' + THRESHOLDS, 'control, mirroring, temperature' + THRESHOLDS,
        'PDDDPM no diffusion: direct (k=0), mirroring',
        'PDDDPM no diffusion, cross-entropy alone: direct (k=0), mirroring'] for starts in ('default', 'truth')},
        'PDDDPM default, 3 folds: t_start=': ['stock, 3 folds, 16 thresholds of their mean']},
    'ambiguous': {title: ['stock' + THRESHOLDS, 'stock, temperature' + THRESHOLDS,
                          'control: stock trained longer' + THRESHOLDS,
                          'control: stock trained longer, temperature' + THRESHOLDS, 'no diffusion: second network',
                          'no diffusion: second network, cross-entropy alone']
                  for title in ('PDDDPM, tuned', 'PDDDPM, t_start 960, 10 steps',
                                'PDDDPM, noise on the truth in every patch, tuned')}}
HEADER = ('| | Dice ± sd | Δ Dice | NLL | Δ NLL | ECE | HD95 mm | surface Dice | AURC | GED² | Δ GED² | HM-IoU '
          f'| network calls | {SECONDS} |\n|' + '---|' * 14)
SIZE = "**nnU-Net's own plans on a GPU**." if FULL else """**reduced plans, short trainings, a CPU**. With
BENCHMARK_DEVICE=cuda the same command takes nnU-Net's own plans and 25 times as many epochs, on a GPU, and writes its
tables into a folder named by it; that has not been run."""
TEXT = """# Evidence: what refinement is worth

    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/evidence.py -o WORK

This joins rows of {tables}, where data, plans, training, seeds, and
all other rows and columns are described. Machine: {machine}:
{size} Settings were tuned on validation cases, never on these.

Dice ± standard deviation over cases or images. Δ: mean paired difference to stock with mirroring, with its 95 %
bootstrap interval (over cases; in the phantom over images and seeds). NLL and ECE over all voxels; surface Dice at
1 mm; GED² with d = 1 - IoU. One training but in the phantom, which has three (rows of few images have one): differences
of about 0.002 in Dice are within the noise of training; hippocampus.md and cells.md have tables of three trainings.
Empty: not measured there, or not defined.
"""


def run(work: Path, part: str, data: str | None) -> None:
    """A benchmark; what it has done before is not done again."""
    command = [sys.executable, str(HERE / f'{part}.py'), '-o', str(work / part)]
    subprocess.run([*command, *(['-data', data] if data else [])], check=True)


@dataclass(frozen=True)
class Line:
    """A row of the table, and what its comparisons need."""
    title: str
    columns: dict[str, str]
    metrics: dict[str, np.ndarray]
    """`dice`, `nll` and, if it has one, `ged`: (seeds, cases)."""

    def __str__(self) -> str:
        return f'| {self.title} | ' + ' | '.join(self.columns.get(name, '') for name in COLUMNS) + ' |'


def interval(values: tuple[float, float, float], digits: int = 4) -> str:
    """A difference with its interval; nothing for that of a row to itself."""
    return '{:+.{d}f} ({:+.{d}f} to {:+.{d}f})'.format(*values, d=digits) if any(values) else ''


def spread(values: np.ndarray) -> str:
    """Mean of (seeds, cases), and the standard deviation over cases."""
    return f'{values.mean():.4f} ± {values.mean(0).std(ddof=1):.3f}'


def hippocampus(work: Path) -> Iterator[Line]:
    """Every row."""
    from hippocampus_evaluation import ROWS, STOCK, dice, difference, evaluation, folder, nll
    results = {row: evaluation(work, row) for row in ROWS if (folder(work, row) / 'evaluation.json').is_file()}
    stock = results[STOCK]
    for row, result in results.items():
        mean, voxels = result['foreground_mean'], result['voxelwise']['all']
        file = folder(work, row) / 'cost.json'
        cost = json.loads(file.read_text()) if file.is_file() else {}
        metrics = {name: np.array([[values(case) for case in result['cases']]])
                   for name, values in (('dice', dice), ('nll', nll))}
        yield Line(row.title + (f' ({row.cases} cases)' if row.cases else ''), dict(
            dice=spread(metrics['dice']), d_dice=interval(difference(result, stock, dice)),
            nll=f'{voxels["nll"]:.4f}', d_nll=interval(difference(result, stock, nll)),
            ece=f'{voxels["ece"]:.4f}', hd95=f'{mean["hd95_mm"]:.2f}', nsd=f'{mean["surface_dice"]:.3f}',
            aurc=f'{voxels["aurc"]:.5f}', calls=f'{cost["network_calls"]:.0f}' if cost else '',
            seconds=f'{cost["cpu_seconds"]:.1f}' if cost else ''), metrics)


def cells(work: Path) -> Iterator[Line]:
    """Rows with mirroring and those of folds; 16 masks where they are compared with the raters."""
    from cells_evaluation import difference, mean, measure, stock_rows, test_rows, trained_pdddpm
    rows = [*stock_rows(work), *(row for trainer in trained_pdddpm(work) for row in test_rows(work, trainer))]
    stock = measure(work, 'test', next(row for row in rows if row.title == 'stock, mirroring'))
    for row in rows:
        if not row.mirroring and len(row.folds) == 1 and row.title != 'stock':
            continue
        of = measure(work, 'test', row)
        metrics = {name: np.array([of[source]])
                   for name, source in (('dice', 'dice'), ('nll', 'nll'), ('ged', 'ged_squared'))}
        title = row.title if row.mirroring or len(row.folds) > 1 else f'{row.title} without mirroring'
        yield Line(title, dict(
            dice=spread(metrics['dice']), d_dice=interval(difference(of, stock, 'dice')), nll=f'{mean(of, "nll"):.4f}',
            d_nll=interval(difference(of, stock, 'nll')), ece=f'{mean(of, "ece"):.4f}',
            ged=f'{mean(of, "ged_squared"):.3f}', d_ged=interval(difference(of, stock, 'ged_squared'), 3),
            hm_iou=f'{mean(of, "hm_iou"):.3f}', calls=str(row.calls)), metrics)


def ambiguous(work: Path) -> Iterator[Line]:
    """Every row, and the ideal sampler; nothing if nothing was predicted."""
    from ambiguous_evaluation import NUM_TEST, ROWS, SAMPLES, STOCK, difference, ideal, measure
    from ambiguous_table import cost
    rows = [row for row in ROWS if row.predicted_folds(work)]
    if not rows:
        return
    for row in rows:
        of, stock, costs = measure(work, row), measure(work, STOCK, row.predicted_folds(work)), cost(work, row)
        few = '' if row.images == NUM_TEST else f' ({row.images} images)'
        yield Line(row.title + few, dict(
            dice=spread(of['dice']), d_dice=interval(difference(of, stock, 'dice')), nll=f'{of["nll"].mean():.4f}',
            d_nll=interval(difference(of, stock, 'nll')), ece=f'{of["ece"].mean():.4f}', ged=f'{of["ged"].mean():.3f}',
            d_ged=interval(difference(of, stock, 'ged'), 3), calls=f'{costs["network_calls"]:.0f}',
            seconds=f'{costs["cpu_seconds"]:.1f}'), of)
    of = ideal(SAMPLES)
    yield Line('ideal sampler', dict(dice=spread(of['dice']), nll=f'{of["nll"].mean():.4f}',
                                     ece=f'{of["ece"].mean():.4f}', ged=f'{of["ged"].mean():.3f}'), of)


def lacking(parts: Mapping[str, Sequence[Line]]) -> list[str]:
    """Says what was not run."""
    from ambiguous_evaluation import ROWS as of_ambiguous
    from hippocampus_evaluation import ROWS as of_hippocampus
    absent = []
    for part, rows in (('hippocampus', of_hippocampus), ('ambiguous', of_ambiguous)):
        there = [line.title for line in parts[part]]
        titles = [row.title for row in rows if not any(title.startswith(row.title) for title in there)]
        absent += [f'{part}: {"; ".join(titles) if there else "all of it"}'] if titles else []
    return [f'**Not run, and so not here: {". ".join(absent)}.**', ''] if absent else []


def comparisons(part: str, lines: Sequence[Line]) -> Iterator[str]:
    """Rows of PDDDPM against what could be had without it, in words and intervals."""
    from ambiguous_evaluation import difference
    by_title = {line.title: line for line in lines}
    for start, others in COMPARISONS[part].items():
        title = next((t for t in by_title if t == start or start.endswith('=') and t.startswith(start)), None)
        for other in others:
            if title is None or other not in by_title:
                continue
            one, baseline = by_title[title].metrics, by_title[other].metrics
            cells = []
            for name, digits, better in (('dice', 4, 1), ('nll', 4, -1), ('ged', 3, -1)):
                if name not in one or name not in baseline:
                    cells.append('')
                    continue
                middle, low, high = difference(one, baseline, name)
                word = 'not told apart' if low <= 0 <= high else 'better' if better * middle > 0 else 'worse'
                cells.append(f'{word}: {interval((middle, low, high), digits)}')
            yield f'| {part} | {title} | {other} | ' + ' | '.join(cells) + ' |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-data', help='folder with the data sets (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, help='work folder: a folder in it for each of the three benchmarks')
    parser.add_argument('-table', default=str(results() / 'evidence.md'), help='the table to write')
    parser.add_argument('--join', action='store_true', help='only join what is there')
    args = parser.parse_args()
    work = Path(args.o).resolve()
    if not args.join:
        for part in PARTS:
            run(work, part, args.data)
    sys.path.append(str(HERE / 'trainers'))
    parts: dict[str, list[Line]] = {part: list(rows(work / part)) for part, rows in (
        ('hippocampus', hippocampus), ('cells', cells), ('ambiguous', ambiguous))}
    tables = ', '.join(f'[{part}.md]({part}.md)' for part in PARTS if parts[part])
    lines = [TEXT.format(tables=tables, machine=machine(), size=SIZE),
             *lacking(parts), '## PDDDPM against what can be had without it', '',
             'Better or worse where the 95 % interval of the paired difference misses 0.', '',
             '| | | against | Dice | NLL | GED² |\n|' + '---|' * 6,
             *(text for part, rows in parts.items() for text in comparisons(part, rows)), '']
    for title, part in (('Hippocampus: 50 test cases, 3d', 'hippocampus'),
                        ('Cells with ten raters: 19 test images, 2d', 'cells'),
                        ('A known ambiguity: 30 test images, 3 seeds, 2d', 'ambiguous')):
        if parts[part]:
            lines += [f'## {title}', '', HEADER, *map(str, parts[part]), '']
    Path(args.table).write_text('\n'.join(lines))


if __name__ == '__main__':
    main()
