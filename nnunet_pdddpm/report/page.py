"""Writes report.html."""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnunet_pdddpm.report.summary as text
from nnunet_pdddpm.file_names import PRESEGMENTATION, SUMMARY, UNCERTAINTY
from nnunet_pdddpm.files import write_atomically
from nnunet_pdddpm.image_files import UnusableImage, sample_files
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.report.drawing import MAX_ALPHA, UNCERTAINTY_COLOUR, UNCERTAINTY_LEVELS, label_colours
from nnunet_pdddpm.report.views import make_view
from nnunet_pdddpm.report.volumes import read_case, required_file

logger = logging.getLogger(__name__)

REPORT = 'report.html'
VOLUME_BYTES = 40_000_000
"""Bytes that the volumes of all cases may take together."""
VOLUME_BYTES_PER_CASE = 4_000_000


class NothingToShow(ValueError):
    """No case can be shown: the message says why of each."""


def write_report(output_folder: Path, images: Mapping[str, Sequence[Path]], command: str = '', date: str = '') -> Path:
    """Write `report.html` into an output folder of `nnUNetv2_pdddpm_predict`.

    The page is complete in itself: images, style and script are inside, and nothing is loaded from elsewhere. Where
    they would take it beyond some 40 MB, cases are shown coarser, and the page says so; only with several hundred cases
    does it grow larger. The volumes of one case at a time are in memory.

    Args:
        output_folder: holds the masks, presegmentation/, uncertainty/, pdddpm_summary.json, dataset.json, plans.json;
            samples/ is shown if it is there.
        images: for each case to show its image files, channel 0 first; only the first is read. Cases of which something
            is missing are named on the page and the console, with the reason.
        command: that made the prediction, for the page to name.
        date: of the report, likewise.

    Returns:
        The report's file; an earlier one of that name is replaced when the new one is complete.

    Raises:
        NothingToShow: there is no case of which everything is there; an earlier report stays as it is.
        ValueError: the summary, dataset.json or plans.json is not what it should be; so does it then.
    """
    folder = Path(output_folder)
    shown: bytes | None = None
    while (now := required_file(folder / SUMMARY).read_bytes()) != shown:  # another part has finished: once more
        shown = now
        page, missing = _page(folder, images, text.read_summary(folder), command, date)
        written = write_atomically(folder, {REPORT: page})[0]
    if missing:
        logger.warning('Not in the report: %s', _with_reasons(missing))
    return written


def _page(folder: Path, images: Mapping[str, Sequence[Path]], summary: dict[str, Any], command: str, date: str
          ) -> tuple[str, dict[str, str]]:
    """The page, and the cases that are not on it and why, but for those that failed; raises as `write_report`."""
    dataset, plans = (text.read_json(folder / name) for name in ('dataset.json', 'plans.json'))
    reader, ending = PlansManager(plans).image_reader_writer_class(), dataset['file_ending']
    entries, missing = text.choose_entries(folder, summary, images, ending)
    regions = foreground_labels(dataset)
    budget = min(VOLUME_BYTES // max(len(entries), 1), VOLUME_BYTES_PER_CASE)

    cases: list[dict[str, Any]] = []
    for entry in entries:
        name = entry['case']
        try:
            case = read_case(folder, name, images[name], ending, reader)
        except UnusableImage as error:
            missing[name] = str(error)
            continue
        cases.append({'entry': entry, 'view': make_view(case, list(regions.values()), budget),
                      'samples': len(case.samples), 'links': _links(folder, name, images[name], ending)})
    if not cases:
        raise NothingToShow(_with_reasons(missing) or f'no case of {folder} could be predicted')
    entries = [entry for entry in entries if entry['case'] not in missing]
    qualities = [text.finite(entry.get('estimated_dice')) for entry in entries]
    page = _template().render(
        cases=cases, outlines=list(regions), regions=list(regions.values()), colours=label_colours(len(regions)),
        labels=text.label_names(entries), runs=text.runs_of(entries), command=command, date=date, ending=ending,
        dataset=plans.get('dataset_name', folder.name), missing=_with_reasons(missing),
        not_shown=sum(entry['case'] not in images for entry in summary['cases']),
        bins=text.histogram(q for q in qualities if q is not None), num_unknown=qualities.count(None),
        failed=summary.get('failed', []), order=text.about_order(entries),
        ranked=any(text.ranked_by(entry) for entry in entries), sorted_column=text.sorted_column(entries),
        any_samples=any(case['samples'] for case in cases), planes=max(len(case['view'].planes) for case in cases),
        uncertainty_colour=UNCERTAINTY_COLOUR, levels=UNCERTAINTY_LEVELS, max_alpha=MAX_ALPHA)
    return page, missing


def _links(folder: Path, case: str, images: Sequence[Path], ending: str) -> list[tuple[str, str]]:
    """Names of a case's files and where they are, as seen from the page."""
    named = re.compile(re.escape(case) + r'_(uncertainty|mutual_information|variance(_between_folds)?|probability_.+)'
                       + re.escape(ending))
    maps = sorted(file for file in (folder / UNCERTAINTY).iterdir() if named.fullmatch(file.name))
    files = [('mask', folder / f'{case}{ending}'), ('stock mask', folder / PRESEGMENTATION / f'{case}{ending}'),
             *((file.name[len(case) + 1:-len(ending)].replace('_', ' '), file) for file in maps),
             *((f'sample {i}', file) for i, file in enumerate(sample_files(folder, case, ending))),
             *((f'image {i}' if len(images) > 1 else 'image', Path(file)) for i, file in enumerate(images))]
    return [(name, _seen_from(folder, file)) for name, file in files]


def _seen_from(folder: Path, file: Path) -> str:
    """The address of a file in a page of the folder."""
    try:
        return './' + quote(Path(os.path.relpath(file, folder)).as_posix())
    except ValueError:  # on another drive
        return file.absolute().as_uri()


def _with_reasons(missing: Mapping[str, str]) -> str:
    return '; '.join(f'{case} ({why})' for case, why in missing.items())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader('nnunet_pdddpm.report', ''), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(plain=text.plain, percent=text.percent, volume=text.volume, interval=text.interval,
                               finite=text.finite, sortable=text.sortable, bound=text.bound, volume_bar=text.volume_bar,
                               small=text.small_volume)
    return environment.get_template('report.html.jinja')
