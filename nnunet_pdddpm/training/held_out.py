"""Which cases a trained fold of the stock model has not seen: nnU-Net notes no split, but what it validated on."""
from __future__ import annotations

import json
import re
from pathlib import Path

EPOCH = re.compile(r': Epoch \d+ $', re.MULTILINE)
SPLIT = re.compile(r': This split has \d+ training and (\d+) validation cases')
PREDICTING = re.compile(r': predicting (.+) $', re.MULTILINE)
DONE = ': Training done.'


def held_out_cases(fold: Path, ending: str) -> frozenset[str] | None:
    """The cases that a fold was validated on at the end of its training.

    That is in the training's own log. A later validation (`--val`) may be by another split: its log is not asked. Where
    the log is gone or incomplete, as with several GPUs or in an exported model, validation/summary.json is.

    Args:
        fold: folder of the fold.
        ending: of the data set's files.

    Returns:
        Their names; None if no complete validation is there.
    """
    logs = (log.read_text(errors='replace') for log in sorted(fold.glob('training_log_*.txt'), key=_time))
    trainings = [log for log in logs if DONE in log and EPOCH.search(log)]
    validation = trainings[-1].rpartition(DONE)[2] if trainings else ''
    sizes = {int(number) for number in SPLIT.findall(validation)[-1:]}
    for cases in (frozenset(PREDICTING.findall(validation)), _of_summary(fold / 'validation' / 'summary.json', ending)):
        if cases and sizes <= {len(cases)}:  # the folder may hold masks of an earlier split
            return cases
    return None


def _time(log: Path) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', log.name)]  # months and days have one digit or two


def _of_summary(file: Path, ending: str) -> frozenset[str]:
    try:
        rows = json.loads(file.read_text())['metric_per_case']
        return frozenset(Path(row['prediction_file']).name.removesuffix(ending) for row in rows)
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
