"""Pages of the benchmarks: tables of scores whose unit is the training, forest plots, and the texts in `pages/`."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import AUTOCAST, PLANS_IN_WORDS, commit, machine
from statistics_of_trainings import difference, spread, t_interval

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
    """What stands in the place of the spread, if it is one model whatever the training; there is no difference then."""


def table(lines: Sequence[Line], columns: Sequence[Column], base: Scores) -> str:
    """Markdown: mean and standard deviation over trainings, and paired differences to a base with 95 % intervals. With
    fewer than three trainings there are no intervals, which the row says."""
    calls = any(line.calls is not None for line in lines)
    heads = [head for column in columns for head in (column.title, *(['Δ'] if column.delta else []))]
    text = [f'| | {"calls | " if calls else ""}{" | ".join(heads)} |', '|---' * (1 + calls + len(heads)) + '|']
    for line in lines:
        trainings = len(columns[0].values(line.scores))
        few = line.note is None and trainings < 3
        cells = [line.title + (f' ({trainings} training{"s" * (trainings > 1)})' if few else ''),
                 *([line.calls or ''] if calls else [])]
        for column in columns:
            values, same = column.values(line.scores), line.scores is base or line.note is not None
            mean = f'{np.nanmean(values):.{column.digits}f}'
            cells.append(mean if few else spread(values, column.digits) if line.note is None else mean + line.note)
            if column.delta:
                other = column.values(base)
                cells.append('' if same else f'{np.nanmean(values) - np.nanmean(other):+.{column.digits}f}' if few
                             else difference(values, other, column.digits))
        text.append(f'| {" | ".join(cells)} |')
    return '\n'.join(text)


def forest(lines: Sequence[Line], column: Column, base: Scores, file: Path) -> str:
    """Figure of the differences to the base with their intervals, and what shows it in Markdown; none with fewer than
    three trainings."""
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    shown = [line for line in lines if line.scores is not base and line.note is None]
    found = [t_interval(np.nanmean(column.values(line.scores), 1) - np.nanmean(column.values(base), 1))
             for line in shown if len(column.values(line.scores)) > 2]
    if not found:
        return ''
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.26 * len(shown)))
    for y, (mean, low, high) in enumerate(found):
        colour = 'C2' if high < 0 else 'C3' if low > 0 else '0.4'
        axis.plot([low, high], [-y, -y], color=colour, linewidth=1.5)
        axis.plot(mean, -y, {'C2': '<', 'C3': '>'}.get(colour, 'o'), color=colour, markersize=5)
    axis.axvline(0, color='k', linewidth=0.8)
    axis.set_yticks(range(0, -len(shown), -1), [line.title for line in shown], fontsize=7)
    axis.set_xlabel(f'{column.title}: difference to the base, 95 % over trainings', fontsize=8)
    axis.tick_params('x', labelsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return f'![Differences in {column.title}]({file.name})\n'


def write(file: Path, text_name: str, **values: object) -> None:
    """A page, of the text `pages/TEXT_NAME.md` with its places filled in."""
    text = (Path(__file__).parent / 'pages' / f'{text_name}.md').read_text()
    text = text.format(commit=commit(), machine=machine(), plans=PLANS_IN_WORDS, autocast=AUTOCAST, **values)
    file.write_text(re.sub('\n{3,}', '\n\n', text).rstrip() + '\n')
