"""`pdddpm_summary.json` as the page needs it: cases in the order of review, numbers as text, the histogram."""
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.files import matches_identity
from nnunet_pdddpm.report.volumes import required_file
from nnunet_pdddpm.texts import in_percent

BIN_WIDTHS = (0.01, 0.02, 0.05, 0.1)
MAX_BINS = 12


@dataclass(frozen=True)
class Run:
    """What cases were predicted with: what is known of the model and the software, and the sampling settings."""
    cases: list[str]
    facts: dict[str, str]
    settings: dict[str, str]


@dataclass(frozen=True)
class VolumeBar:
    """A volume on a scale from 0 to 100, which is the largest number there is: ends of the calibrated interval and of
    the samples' range, the mask's volume and stock's; None for what is not known. `end` is that largest number in ml,
    for reading."""
    interval: tuple[float, float] | None
    samples: tuple[float, float] | None
    mask: float
    stock: float | None
    end: str


@dataclass(frozen=True)
class Bin:
    """A bar of the histogram: low <= value < high (the last one includes 1), and how many cases are in it."""
    low: float
    high: float
    count: int


def read_json(file: Path) -> Any:
    """The file's content, or a ValueError that names it."""
    required_file(file)
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except ValueError:
        raise ValueError(f'{file} is no valid JSON: it is empty or damaged; predict again with --report') from None


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a prediction; raises ValueError if there is none, or none of this form."""
    file = folder / SUMMARY
    summary = read_json(file)
    entries = summary.get('cases') if isinstance(summary, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get('case'), str)
                                                for e in entries):
        raise ValueError(f'{file} has no list "cases" with an entry for each case; predict again with --report')
    return summary


def choose_entries(folder: Path, summary: Mapping[str, Any], cases: Iterable[str], ending: str
                   ) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The entries of cases in the order of review; and which have none, and why.

    What the summary lists as failed is in neither.
    """
    by_name = {entry['case']: entry for entry in summary['cases']}
    failed = {entry['case'] for entry in summary.get('failed', [])}
    chosen: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for case in cases:
        entry, mask = by_name.get(case), folder / f'{case}{ending}'
        if entry is not None and matches_identity(folder, entry.get('mask')):
            chosen.append(entry)
        elif mask.is_file() and case not in failed:
            missing[case] = f'{mask.name} is not the mask that {SUMMARY} was made of'
        elif case not in failed:
            missing[case] = f'{mask.name} is not there' if entry else 'it is not predicted yet'
    return sorted(chosen, key=review_order), missing


def review_order(entry: Mapping[str, Any]) -> tuple[bool, bool, str, float, float, str]:
    """Key that sorts the summary's entries so that the case to look at first is first: by what the summary says.

    A case without that comes before all others, for nothing vouches for it; of equal ones, the one with more uncertain
    voxels comes first. Where nothing ranks, cases are sorted by name. Cases that are ranked by different numbers are
    not compared: first come those that nothing ranks, and last those with a lower bound, which validation has tested.
    """
    by = ranked_by(entry)
    if by is None:
        return True, False, '', 0.0, 0.0, entry['case']
    quality, share = finite(entry.get(by)), finite(entry.get('uncertain_share')) or 0.0
    if quality is None:
        return False, False, '', 0.0, -share, entry['case']
    return True, by == 'estimated_dice_low', by, quality, -share, entry['case']


def ranked_by(entry: Mapping[str, Any]) -> str | None:
    """Key of the number that an entry is sorted by; None if nothing ranks."""
    by = entry['order']['by']
    return None if by is None else str(by)


def sorted_column(entries: Iterable[Mapping[str, Any]]) -> str | None:
    """What entries in the order of review are sorted by: `case`, or the key of a number; None if they differ in it."""
    keys = {ranked_by(entry) or 'case' for entry in entries}
    return keys.pop() if len(keys) == 1 else None


def about_order(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """How cases are sorted and how well that worked in validation, a sentence or two for each way."""
    return list(dict.fromkeys(said for entry in entries if (said := entry['order'].get('statement'))))


def finite(value: Any) -> float | None:
    """The number, or None for what is none: null, NaN, infinity, absent."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def sortable(value: Any) -> str:
    """A number for the page's script to sort by; '' for what is none."""
    number = finite(value)
    return '' if number is None else str(number)


def plain(value: Any, digits: int = 2) -> str:
    """A number for reading; a dash for what is none."""
    number = finite(value)
    return '–' if number is None else f'{number:.{digits}f}'


def bound(row: Mapping[str, Any]) -> str:
    """The lower bound of an estimated Dice, for reading behind it; '' where there is none."""
    low = finite(row.get('estimated_dice_low'))
    return '' if low is None else f' (at least {low:.2f})'


def percent(value: Any) -> str:
    """A share in [0, 1] for reading: '8.0 %'."""
    number = finite(value)
    return '–' if number is None else f'{100 * number:.1f} %'


def volume(label: Mapping[str, Any], name: str = 'volume_ml') -> str:
    """One of a label's volumes for reading, in ml without the unit; all of a label have equally many decimals."""
    number, size = finite(label.get(name)), abs(finite(label.get('volume_ml')) or 0.0)
    return '–' if number is None else f'{number:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 else 3}f}'


def small_volume(ml: float) -> str:
    """A component's volume for reading, without the unit: two digits that count."""
    return f'{ml:.0f}' if ml >= 100 else f'{ml:.2g}' if ml < 10 else f'{ml:.1f}'


def interval_ends(label: Mapping[str, Any], calibrated: bool) -> tuple[float, float] | None:
    """Ends in ml of a label's calibrated interval, or of the range of its samples; None if there is none."""
    low, high = (finite(label.get(name)) for name in (('volume_ml_low', 'volume_ml_high') if calibrated else
                                                      ('samples_low_ml', 'samples_high_ml')))
    return None if low is None or high is None or calibrated and finite(label.get('interval_level')) is None else (
        low, high)


def interval(label: Mapping[str, Any], samples: Any = None) -> str:
    """Where a label's volume lies: 'calibrated, 95 %: 11.1 to 13.9', or the range of its samples, 'range of 8 samples:
    11.1 to 13.9'; '' if it has neither."""
    kind, names = '', ('', '')
    if interval_ends(label, calibrated=True):
        kind, names = f'calibrated, {in_percent(label["interval_level"])}', ('volume_ml_low', 'volume_ml_high')
    elif interval_ends(label, calibrated=False) and finite(samples) is not None:
        kind, names = f'range of {samples} samples', ('samples_low_ml', 'samples_high_ml')
    return f'{kind}: {volume(label, names[0])} to {volume(label, names[1])}' if kind else ''


def volume_bar(label: Mapping[str, Any]) -> VolumeBar | None:
    """A label's volume for drawing; None without one."""
    mask, stock = finite(label.get('volume_ml')), finite(label.get('volume_ml_stock'))
    ends = [interval_ends(label, calibrated) for calibrated in (True, False)]
    most = max([mask or 0.0, stock or 0.0, *(pair[1] for pair in ends if pair)])
    if mask is None or most <= 0:
        return None
    calibrated, samples = (None if pair is None else (100 * max(pair[0], 0.0) / most, 100 * pair[1] / most)
                           for pair in ends)
    return VolumeBar(calibrated, samples, 100 * mask / most, None if stock is None else 100 * stock / most,
                     small_volume(most))


def runs_of(entries: Iterable[Mapping[str, Any]]) -> list[Run]:
    """What cases were predicted with, one for each different model, settings or software: usually one."""
    runs: dict[str, Run] = {}
    for entry in entries:
        models, versions = entry.get('settings', []), entry.get('versions', {})
        known = json.dumps([models, versions])
        if known not in runs:
            settings = {name: _joined(model.get(name) for model in models) for name in (models[0] if models else ())}
            software = ', '.join(f'{name} {version}' for name, version in versions.items())
            runs[known] = Run([], {**_model(settings), **({'Versions': software} if software else {})}, settings)
        runs[known].cases.append(entry['case'])
    return list(runs.values())


def _model(settings: dict[str, str]) -> dict[str, str]:
    """What is to be said of a model, taken out of its settings."""
    folder = settings.pop('model', '').split('/')
    trainer, plans, configuration = ([*folder[-2].split('__'), '', ''] if len(folder) > 1 else ['', '', ''])[:3]
    facts = {'Model': ' / '.join(folder[:1]), 'Trainer': trainer, 'Plans': plans, 'Configuration': configuration,
             'Folds': settings.pop('fold', ''), 'Checkpoint': folder[-1], 'Checksum': settings.pop('weights', ''),
             'Samples': settings.pop('samples', ''), 'Seed': settings.pop('seed', '')}
    return {name: fact for name, fact in facts.items() if fact}


def _joined(values: Iterable[Any]) -> str:
    """The values that models have of a setting, each once."""
    return ', '.join(dict.fromkeys(f'{value:g}' if isinstance(value, float) else str(value) for value in values))


def label_names(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of all cases, in the order in which they first appear."""
    return list(dict.fromkeys(name for entry in entries for name in entry.get('labels', {})))


def histogram(qualities: Iterable[float]) -> list[Bin]:
    """Bars from the worst estimated quality up to 1, of the finest width in BIN_WIDTHS that needs at most MAX_BINS."""
    values = [min(max(value, 0.0), 1.0) for value in qualities]
    if not values:
        return []
    for width in BIN_WIDTHS:
        per_unit = round(1 / width)
        first = min(math.floor(min(values) * per_unit + 1e-9), per_unit - 1)
        if per_unit - first <= MAX_BINS:
            break
    counts = dict.fromkeys(range(first, per_unit), 0)
    for value in values:
        counts[min(math.floor(value * per_unit + 1e-9), per_unit - 1)] += 1
    return [Bin(i / per_unit, (i + 1) / per_unit, count) for i, count in counts.items()]
