"""Pages of the benchmarks: tables of scores whose unit is the training, forest plots, and the texts in `pages/`."""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import AUTOCAST, PLANS_IN_WORDS, commit, date, machine
from matplotlib.figure import Figure
from statistics_of_trainings import Interval, difference, spread, t_interval

DOCS = Path(__file__).resolve().parent.parent / 'docs'
Scores = dict[str, np.ndarray]
"""Metric -> (trainings, cases)."""


@dataclass(frozen=True)
class Column:
    """Of a table."""
    title: str
    of: str | Callable[[Scores], np.ndarray]
    """A metric, or what makes it of the scores."""
    digits: int = 3
    delta: bool = True
    """Whether the paired difference to the base stands beside it."""
    base: str | None = None
    """Title of the row that rows are compared with in this column, if it is another than the table's."""
    over_images: bool = False
    """Whether the interval of the difference over images stands there, too."""
    also_to: str | None = None
    """Title of a further row that rows are compared with."""

    def values(self, scores: Scores) -> np.ndarray:
        """(trainings, cases)"""
        return scores[self.of] if isinstance(self.of, str) else self.of(scores)


@dataclass(frozen=True)
class Line:
    """Of a table."""
    title: str
    scores: Scores
    calls: str | None = None
    note: str | None = None
    """What is said of one model whatever the training; there is no difference then."""
    base: str | None = None
    """Title of the row that it is compared with, if it is another than that of table and column."""


def base_of(lines: Sequence[Line], title: str) -> Scores:
    """Of the row that the others are compared with."""
    found = next((line.scores for line in lines if line.title == title), None)
    if found is None:
        sys.exit(f'The row "{title}", with which all are compared, is not measured: run the stage measure first.')
    return found


def table(lines: Sequence[Line], columns: Sequence[Column], base: str) -> str:
    """Markdown: mean and standard deviation over trainings, and paired differences to a base, the title of a row, with
    95 % intervals. With fewer than three trainings there are no intervals, which the row says."""
    calls = any(line.calls is not None for line in lines)
    heads = [head for column in columns for head in (
        column.title, *(['Δ'] if column.delta else []), *(['over images'] if column.over_images else []),
        *([f'Δ to {column.also_to}'] if column.also_to else []))]
    rows = []
    for line in lines:
        trainings = len(columns[0].values(line.scores))
        few = line.note is None and trainings < 3
        cells = [line.title + (f' ({trainings} training{"s" * (trainings > 1)})' if few else ''),
                 *([line.calls or ''] if calls else [])]
        for column in columns:
            values, compared = column.values(line.scores), line.base or column.base or base
            if np.isnan(values).all():
                cells += ['–', *[''] * (column.delta + column.over_images + bool(column.also_to))]
                continue
            alike = few or line.note is not None and np.array_equal(
                values, np.broadcast_to(values[:1], values.shape), equal_nan=True)
            mean = f'{np.nanmean(values):.{column.digits}f}' if alike else spread(values, column.digits)
            cells.append(mean + (line.note or ''))
            pair = None if line.title == compared or line.note is not None else \
                paired(column, line.scores, base_of(lines, compared))
            if column.delta:
                cells.append('' if pair is None else _delta(*pair, column.digits))
            if column.over_images:
                cells.append('' if pair is None else over_images(*pair, column.digits))
            if column.also_to:
                alone = line.title == column.also_to or line.note is not None
                cells.append('' if alone else _delta(*paired(column, line.scores, base_of(lines, column.also_to)),
                                                     column.digits))
        rows.append(cells)
    return markdown(['', *['calls'] * calls, *heads], rows)


def paired(column: Column, scores: Scores, base: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Values of the trainings that both have: the first ones."""
    one, other = column.values(scores), column.values(base)
    common = min(len(one), len(other))
    return one[:common], other[:common]


def over_images(one: np.ndarray, other: np.ndarray, digits: int) -> str:
    """95 % interval of the mean difference of these trainings, (trainings, images), by Student's t over the images."""
    _, low, high = t_interval((one - other).mean(0))
    return f'{low:+.{digits}f} to {high:+.{digits}f}'


def _delta(one: np.ndarray, other: np.ndarray, digits: int) -> str:
    return difference(one, other, digits) if len(one) > 2 else f'{np.nanmean(one) - np.nanmean(other):+.{digits}f}'


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    heading = f'| {" | ".join(head)} |'.replace('|  |', '| |')
    return '\n'.join([heading, '|---' * len(head) + '|', *(f'| {" | ".join(cells)} |' for cells in rows)])


def read_column(text: str, column: str, delta: str = 'Δ') -> dict[str, tuple[str, str]]:
    """Row -> cells of a column and of a difference beside it, of the first table in Markdown that has them;
    none without such a table."""
    lines = [[cell.strip() for cell in line[1:-1].split('|')] for line in text.splitlines() if line.startswith('|')]
    head = next((cells for cells in lines if column in cells and 'Δ' in cells[cells.index(column) + 1:][:1]), None)
    if head is None:
        return {}
    value, found = head.index(column), dict[str, tuple[str, str]]()
    for cells in lines[lines.index(head) + 2:]:
        if len(cells) == len(head):
            found.setdefault(cells[0], (cells[value], cells[head.index(delta, value)]))
    return found


def interval(cell: str) -> Interval | None:
    """Mean and ends, of a cell that has them."""
    numbers = [float(number) for number in re.findall(r'[+-][\d.]+', cell)]
    return (numbers[0], numbers[1], numbers[2]) if len(numbers) == 3 else None


def forest(text: str, plotted: Mapping[str, str | None], column: str, base: str, better: str, page: Path) -> str:
    """Figure, beside a page, of the differences in the first table of a text, and what shows it in Markdown; none where
    no row has an interval. `plotted`: title of a row -> that of its base, if it is another. `better`: lower or higher.
    """
    known = {title: interval(delta) for title, (_, delta) in read_column(text, column).items()}
    found = {title + (f'\n(minus that of: {own})' if own else ''): known[title] for title, own in plotted.items()
             if known.get(title)}
    if not found:
        return ''
    file = page.with_suffix('.png')
    draw_intervals(found, f'{better} is better; 95 % intervals over trainings', file, better == 'lower',
                   f'{column} minus that of: {base}')
    return f'![Differences in {column}]({file.name})\n'


def draw_intervals(found: Mapping[str, Interval], label: str, file: Path, lower_is_better: bool, title: str = ''
                   ) -> None:
    """Figure of differences with their intervals, by title."""
    figure = Figure(figsize=(8, 0.9 + 0.26 * len(found)))
    axis = figure.subplots()
    for y, (mean, low, high) in enumerate(found.values()):
        undecided, better = low <= 0 <= high, (high < 0) == lower_is_better
        colour, marker, inside = ('0.5', '|', '0.5') if undecided else ('C2', 'o', 'C2') if better else ('C3', 'o', 'w')
        axis.plot([low, high], [-y, -y], color=colour, linewidth=1.5)
        axis.plot(mean, -y, marker, color=colour, markersize=6, markerfacecolor=inside)
    axis.axvline(0, color='k', linewidth=0.8)
    axis.set_yticks(range(0, -len(found), -1), list(found), fontsize=7)
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(f'{label}\n(green, filled: better; red, open: worse; grey, no circle: the interval contains 0)',
                    fontsize=8)
    axis.tick_params('x', labelsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110, bbox_inches='tight')


def write(file: Path, text_name: str, **values: object) -> None:
    """A page, of the text `pages/TEXT_NAME.md` with its places filled in."""
    text = (Path(__file__).parent / 'pages' / f'{text_name}.md').read_text()
    text = text.format(commit=commit(), machine=machine(), plans=PLANS_IN_WORDS, autocast=AUTOCAST,
                       docs=os.path.relpath(DOCS, file.resolve().parent), **values)
    file.write_text(re.sub('\n{3,}', '\n\n', text).rstrip() + '\n')
    if (index := file.with_name('README.md')).is_file():
        table = r'\n\| page \| commit .*\n(\|.*\n)*'
        index.write_text(re.sub(table, '\n' + list_of_pages(file.parent), index.read_text()))


def list_of_pages(folder: Path) -> str:
    """Markdown: commit, its date, and machine of every page of a folder."""
    rows = []
    for page in sorted(folder.glob('*.md')):
        found = re.search(r'^Commit (\w+)(.*?)[.] Machine: ([^;\n]*?)[.;](?: |$)', page.read_text(), re.MULTILINE)
        if found:
            rows.append([f'[{page.stem}]({page.name})', found[1] + found[2], date(found[1]), found[3]])
    return markdown(['page', 'commit', 'date', 'machine'], rows) + '\n'
