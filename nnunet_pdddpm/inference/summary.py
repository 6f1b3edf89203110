"""pdddpm_summary.json and .csv: what the samples of each case say in numbers."""
from __future__ import annotations

import csv
import io
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nnunet_pdddpm
from nnunet_pdddpm.file_names import SUMMARY, SUMMARY_TABLE
from nnunet_pdddpm.files import matches_identity, write_atomically
from nnunet_pdddpm.inference.intervals import Calibrated
from nnunet_pdddpm.versions import require_nnunet

logger = logging.getLogger(__name__)

CASES = 'pdddpm_cases'
"""Folder with one file per finished case, from which the summary is made: parts of a prediction share it."""
FAILED = f'{CASES}/failed'
"""Folder with one file per case that could not be predicted and has not been since."""


def sample_volumes(ml: np.ndarray, folds: Sequence[int]) -> dict[str, float | None]:
    """Volume over the samples.

    Args:
        ml: of each sample, (n,).
        folds: model that drew each sample.

    Returns:
        In ml: mean, standard deviation, the smallest and the largest volume. For several models, the standard deviation
        between them, from which is taken off what means of so few samples differ by chance, and the one within a model.
        None for what cannot be told of a single sample.
    """
    several = len(ml) > 1
    row = {'volume_ml_mean': float(ml.mean()), 'volume_ml_sd': float(ml.std(ddof=1)) if several else None,
           'samples_low_ml': float(ml.min()) if several else None,
           'samples_high_ml': float(ml.max()) if several else None}
    by_fold = [ml[np.asarray(folds) == fold] for fold in sorted(set(folds))]
    if len(by_fold) > 1:
        known = [values for values in by_fold if len(values) > 1]
        between = within = None
        if known:
            degrees = [len(values) - 1 for values in known]
            variance = np.average([values.var(ddof=1) for values in known], weights=degrees)
            chance = variance * np.mean([1 / len(values) for values in by_fold])
            between = max(float(np.var([values.mean() for values in by_fold], ddof=1) - chance), 0.0) ** 0.5
            within = float(variance ** 0.5)
        row['volume_ml_sd_between_folds'], row['volume_ml_sd_within_folds'] = between, within
    return row


def interval(calibrated: Calibrated | str, masks: np.ndarray) -> dict[str, Any]:
    """The calibrated interval of a volume, or why there is none.

    Args:
        calibrated: of the label; or the reason why it is not calibrated.
        masks: volumes of the label in the models' masks of this case, (models,) ml.

    Returns:
        Ends in ml, the level that they promise, the number of validation cases, and the unit of the error; or None for
        these, and `interval_missing`, the reason.
    """
    ends = None
    if isinstance(calibrated, str):
        missing = calibrated
    elif (ends := calibrated.interval(masks)) is None:
        missing = 'the mask holds nothing of this label'
    else:
        missing = 'errors in validation were too large to be bounded'
    if ends is None or isinstance(calibrated, str) or not np.isfinite(ends).all():
        return {'volume_ml_low': None, 'volume_ml_high': None, 'interval_level': None, 'interval_cases': None,
                'interval_unit': None, 'interval_missing': missing}
    return {'volume_ml_low': ends[0], 'volume_ml_high': ends[1], 'interval_level': round(calibrated.level, 4),
            'interval_cases': len(calibrated.errors), 'interval_unit': calibrated.rule.describe(),
            'interval_missing': None}


def mean_of_known(dices: Sequence[float | None]) -> float | None:
    """Mean over the labels whose Dice is known; None if there is none."""
    known = [dice for dice in dices if dice is not None]
    return float(np.mean(known)) if known else None


def missing_intervals(labels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which labels of a case have no calibrated interval of their volume, and why: a clause for each reason."""
    names: dict[str, list[str]] = {}
    for name, values in labels.items():
        if (reason := values.get('interval_missing')) is not None:
            names.setdefault(reason, []).append(name)
    return [f'{", ".join(without)}: volume without a calibrated interval, {reason}'
            for reason, without in names.items()]


def write_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Row of a finished case as `CASE.json` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder, {f'{row["case"]}.json': json.dumps(row, indent=2)})


def read_row(output: Path, case: str) -> dict[str, Any] | None:
    """Row of a finished case in an output folder, if there is one."""
    file = output / CASES / f'{case}.json'
    return _load_row(file) if file.is_file() else None


def _load_row(file: Path) -> dict[str, Any] | None:
    """Content of a case's file; None, with a warning, if it is empty or damaged, as after a loss of power."""
    try:
        row = json.loads(file.read_text())
    except ValueError:
        row = None
    if not isinstance(row, dict):
        logger.warning('%s is empty or damaged: %s does not count as predicted, predict it again.', file, file.stem)
        return None
    return row


def describes_mask(output: Path, row: Mapping[str, Any]) -> bool:
    """Whether a case's mask in an output folder is the file that its row was made of."""
    return matches_identity(output, row.get('mask'))


def write_failure(output: Path, case: str, reason: str, files: Sequence[str] | None = None) -> None:
    """Note that a case could not be predicted, and why.

    `files`: of its image, None if not known. The failure no longer counts once none of them is there.
    """
    (output / FAILED).mkdir(parents=True, exist_ok=True)
    row = {'case': case, 'error': reason, 'files': None if files is None else [os.path.abspath(f) for f in files]}
    write_atomically(output / FAILED, {f'{case}.json': json.dumps(row)})


def has_failed(output: Path, case: str) -> bool:
    """Whether a case could not be predicted when that was last tried."""
    return (output / FAILED / f'{case}.json').is_file()


def write_summary(output: Path) -> list[str]:
    """Collect the rows of an output folder: of the masks that are there, and of images that could not be predicted.

    Several processes may do so at the same time.

    Returns:
        Cases whose mask is not the file that their row was made of. These rows are left out.
    """
    written: tuple[dict[Path, int], list[str]] | None = None
    changed: list[str] = []
    while (there := _files_of(output)) != written:
        found = []
        for file in there[0]:
            with suppress(FileNotFoundError):  # a failure that another process has just taken back
                if (row := _load_row(file)) is not None:
                    found.append(row)
        failed = [{'case': row['case'], 'error': row['error']} for row in found
                  if 'error' in row and _image_may_exist(row)]
        without = {row['case'] for row in failed}  # what an earlier prediction left of them is of another image
        done = [row for row in found if 'error' not in row and row['case'] not in without]
        rows = [row for row in done if describes_mask(output, row)]
        changed = [row['case'] for row in done if row not in rows and (row.get('mask') or {}).get('file') in there[1]]
        content = {'cases': rows, **({'failed': failed} if failed else {})}
        write_atomically(output, {SUMMARY: json.dumps(content, indent=2), SUMMARY_TABLE: _table(rows, failed)})
        written = there  # a case that another process has finished meanwhile: once more
    return changed


def _files_of(output: Path) -> tuple[dict[Path, int], list[str]]:
    """Files of the rows and their times, and names of the folder's other finished files."""
    rows: dict[Path, int] = {}
    for file in (file for folder in (CASES, FAILED) for file in sorted((output / folder).glob('*.json'))):
        with suppress(FileNotFoundError):  # a failure that another process has just taken back
            rows[file] = file.stat().st_mtime_ns
    names = sorted(file.name for file in output.iterdir() if not file.name.startswith('.'))
    return rows, [name for name in names if name not in (SUMMARY, SUMMARY_TABLE)]


def _image_may_exist(failure: Mapping[str, Any]) -> bool:
    """Whether a file of the image may still be there.

    A broken link counts, and so does a file in a folder that is not here: the prediction may be from another machine.
    """
    files = failure.get('files')
    return files is None or any(os.path.lexists(file) or not os.path.isdir(os.path.dirname(file)) for file in files)


def versions() -> dict[str, str]:
    """Versions of this package and of what it runs on."""
    return {'nnunet_pdddpm': nnunet_pdddpm.__version__, 'nnunetv2': require_nnunet(), 'torch': torch.__version__,
            'numpy': np.__version__, 'python': platform.python_version()}


def _table(rows: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, str]] = ()) -> str:
    """One line for every case and label, and one for every case that could not be predicted."""
    lines = [{'case': row['case'], 'label': name, **values, 'case_remarks': '; '.join(row.get('remarks', ())),
              'case_flags': '; '.join(row.get('flags', ())),
              **{f'case_{key}': row.get(key) for key in ('estimated_dice', 'estimated_dice_low', 'uncertain_share',
                                                         'seconds')},
              **{f'calls_{key}': calls for key, calls in row['network_calls'].items()},
              **_flat_settings(row['settings']), **row['versions']}
             for row in rows for name, values in row['labels'].items()] + [dict(row) for row in failed]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One column a setting; where the models differ, their values with a slash between them."""
    return {key: '/'.join(dict.fromkeys(str(model[key]) for model in settings)) for key in settings[0]}
