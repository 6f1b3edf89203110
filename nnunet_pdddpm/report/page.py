"""Writes report.html."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnunet_pdddpm.report.summary as text
from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.files import write_atomically
from nnunet_pdddpm.image_files import UnusableImage
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.report.drawing import MAX_ALPHA, UNCERTAINTY_COLOUR
from nnunet_pdddpm.report.views import make_view
from nnunet_pdddpm.report.volumes import existing, read_case

REPORT = 'report.html'
SLICE_BYTES = 22_000_000
"""Bytes that the axial slices of all cases may take together."""
SLICE_BYTES_PER_CASE = 4_000_000


class NothingToShow(ValueError):
    """No case can be shown: the message says why of each."""


def write_report(output_folder: Path, images: Mapping[str, Sequence[Path]]) -> Path:
    """Write `report.html` into an output folder of `nnUNetv2_pdddpm_predict`.

    The page is complete in itself: images, style and script are inside, and nothing is loaded from elsewhere. Axial
    slices that would take it beyond some 30 MB are left out, evenly, and the page says so; only with several hundred
    cases does it grow larger. The volumes of one case at a time are in memory.

    Args:
        output_folder: holds the masks, presegmentation/, uncertainty/, pdddpm_summary.json, dataset.json, plans.json.
        images: for each case to show its image files, channel 0 first; only the first is read. Cases of which something
            is missing are named on the page and the console, with the reason.

    Returns:
        The report's file; an earlier one of that name is replaced when the new one is complete.

    Raises:
        NothingToShow: there is no case of which everything is there; an earlier report stays as it is.
        ValueError: the summary, dataset.json or plans.json is not what it should be; so does it then.
    """
    folder = Path(output_folder)
    shown: bytes | None = None
    while (now := existing(folder / SUMMARY).read_bytes()) != shown:  # another part has finished: once more
        shown = now
        page, missing = _page(folder, images, text.read_summary(folder))
        written = write_atomically(folder, {REPORT: page})[0]
    if missing:
        print(f'Not in the report: {_with_reasons(missing)}')
    return written


def _page(folder: Path, images: Mapping[str, Sequence[Path]], summary: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The page, and the cases that are not on it and why, but for those that failed; raises as `write_report`."""
    dataset, plans = (text.read_json(folder / name) for name in ('dataset.json', 'plans.json'))
    reader, ending = PlansManager(plans).image_reader_writer_class(), dataset['file_ending']
    entries, missing = text.choose_entries(folder, summary, images, ending)
    regions = foreground_labels(dataset)
    budget = min(SLICE_BYTES // max(len(entries), 1), SLICE_BYTES_PER_CASE)

    cases = []
    for entry in entries:
        try:
            case = read_case(folder, entry['case'], images[entry['case']], ending, reader)
        except UnusableImage as error:
            missing[entry['case']] = str(error)
            continue
        cases.append({'entry': entry, 'view': make_view(case, list(regions.values()), budget)})
    if not cases:
        raise NothingToShow(_with_reasons(missing) or f'no case of {folder} could be predicted')
    entries = [entry for entry in entries if entry['case'] not in missing]
    qualities = [text.finite(entry.get('estimated_dice')) for entry in entries]
    page = _template().render(
        cases=cases, outlines=list(regions), labels=text.label_names(entries), versions=entries[0].get('versions', {}),
        dataset=plans.get('dataset_name', folder.name), missing=_with_reasons(missing),
        not_shown=sum(entry['case'] not in images for entry in summary['cases']),
        bins=text.histogram(q for q in qualities if q is not None), num_unknown=qualities.count(None),
        failed=summary.get('failed', []), order=text.about_order(entries),
        ranked=any(text.ranked_by(entry) for entry in entries),
        uncertainty_colour=f'rgba{(*UNCERTAINTY_COLOUR, MAX_ALPHA)}')
    return page, missing


def _with_reasons(missing: Mapping[str, str]) -> str:
    return '; '.join(f'{case} ({why})' for case, why in missing.items())


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader('nnunet_pdddpm.report', ''), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(plain=text.plain, percent=text.percent, volume=text.volume, interval=text.interval,
                               finite=text.finite, sortable=text.sortable, bound=text.bound)
    return environment.get_template('report.html.jinja')
