"""Which cases a trained fold of the stock model has not seen, from its log: nnU-Net stores no split in a model."""
from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path, PureWindowsPath

from nnunet_pdddpm.file_names import FINAL_CHECKPOINT

EPOCH = re.compile(r': Epoch \d+ $', re.MULTILINE)
SPLIT = re.compile(r': This (?:random 80:20 )?split has \d+ training and (\d+) validation cases')
PREDICTING = re.compile(r': predicting (.+) $', re.MULTILINE)
DONE = ': Training done.'
ENDED = re.compile(r'^(\d+-\d+-\d+ \d+:\d+:\d+)[.\d]*: Training done\.', re.MULTILINE)


def held_out_cases(fold: Path, ending: str) -> frozenset[str] | None:
    """The cases that a fold was validated on at the end of its training.

    That is in the training's own log. A later validation (`--val`) may be by another split: its log is not asked. Where
    the log is gone or incomplete, as with several GPUs or in an exported model, validation/summary.json is, unless it
    is older than the end of that training or lacks what its log says was validated.

    Args:
        fold: folder of the fold.
        ending: of the data set's files.

    Returns:
        Their names; None if no complete validation is there.
    """
    logs = (log.read_text(errors='replace') for log in sorted(fold.glob('training_log_*.txt'), key=_time))
    trainings = [log for log in logs if DONE in log and EPOCH.search(log)]
    last = trainings[-1] if trainings else ''
    validation = last.rpartition(DONE)[2]
    size = next((int(number) for number in reversed(SPLIT.findall(validation))), None)
    logged = frozenset(PREDICTING.findall(validation))
    if logged and len(logged) == size:
        return logged
    summary = fold / 'validation' / 'summary.json'
    cases = _cases_of_summary(summary, ending)
    # the folder may hold masks of an earlier split
    if cases and size in (None, len(cases)) and logged <= cases and _is_newer(summary, last):
        return cases
    return None


def _is_newer(file: Path, training: str) -> bool:
    """Whether a file was written after the training of a log ended; without a log it is not known to be old.

    The log has the local time of the machine that trained. If that clock is ahead of this machine's, the last
    checkpoint tells, which is written when training ends. A clock that is behind is not noticed.
    """
    times = [datetime.fromisoformat(ended).timestamp() for ended in ENDED.findall(training)[-1:]]
    checkpoint = file.parents[1] / FINAL_CHECKPOINT
    if times and checkpoint.is_file():
        times.append(checkpoint.stat().st_mtime)
    return not times or file.stat().st_mtime >= min(times)


def _time(log: Path) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', log.name)]  # months and days have one digit or two


def _cases_of_summary(file: Path, ending: str) -> frozenset[str]:
    try:
        rows = json.loads(file.read_text())['metric_per_case']
        names = (PureWindowsPath(row['prediction_file']).name for row in rows)  # it splits paths of Linux as well
        return frozenset(name.removesuffix(ending) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
