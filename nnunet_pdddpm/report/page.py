"""Writes report.html."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.files import write_atomically
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.report import summary as text
from nnunet_pdddpm.report.drawing import MAX_ALPHA, UNCERTAINTY_COLOUR
from nnunet_pdddpm.report.views import make_view
from nnunet_pdddpm.report.volumes import read_case

REPORT = 'report.html'
SLICE_BYTES = 22_000_000
"""Bytes that the axial slices of all cases may take together."""
SLICE_BYTES_PER_CASE = 4_000_000


def write_report(output_folder: Path, images: Mapping[str, Sequence[Path]]) -> Path:
    """Write `report.html` into an output folder of `nnUNetv2_pdddpm_predict`.

    The page is complete in itself: images, style and script are inside, and nothing is loaded from elsewhere. Axial
    slices that would take it beyond some 30 MB are left out, evenly, and the page says so; only with several hundred
    cases does it grow larger. The volumes of one case at a time are in memory.

    Args:
        output_folder: holds the masks, presegmentation/, uncertainty/, pdddpm_summary.json, dataset.json, plans.json.
        images: for each case to show its image files, channel 0 first; only the first is read.

    Returns:
        The report's file; an earlier one of that name is replaced when the new one is complete.

    Raises:
        ValueError: a file is missing or is not what it should be; an earlier report stays as it is.
    """
    folder = Path(output_folder)
    if not images:
        raise ValueError(f'No cases to report on in {folder}')
    summary, entries = text.read_summary(folder, images)
    dataset, plans = (text.read_json(folder / name) for name in ('dataset.json', 'plans.json'))
    reader, ending = PlansManager(plans).image_reader_writer_class(), dataset['file_ending']
    regions = foreground_labels(dataset)
    budget = min(SLICE_BYTES // len(entries), SLICE_BYTES_PER_CASE)

    cases = []
    for entry in entries:
        case = read_case(folder, entry['case'], images[entry['case']], ending, reader)
        cases.append({'entry': entry, 'view': make_view(case, list(regions.values()), budget)})
    qualities = [text.finite(entry.get('estimated_dice')) for entry in entries]
    page = _template().render(
        cases=cases, outlines=list(regions), labels=text.label_names(entries), versions=entries[0].get('versions', {}),
        dataset=plans.get('dataset_name', folder.name), not_shown=len(summary['cases']) - len(entries),
        bins=text.histogram(q for q in qualities if q is not None), num_unknown=qualities.count(None),
        failed=summary.get('failed', []), uncertainty_colour=f'rgba{(*UNCERTAINTY_COLOUR, MAX_ALPHA)}')
    return write_atomically(folder, {REPORT: page})[0]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader('nnunet_pdddpm.report', ''), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(plain=text.plain, percent=text.percent, volume=text.volume, interval=text.interval,
                               finite=text.finite, sortable=text.sortable)
    return environment.get_template('report.html.jinja')
