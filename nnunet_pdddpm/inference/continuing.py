"""What lies in an output folder already: is it of this model, of these images, and is the mask the one put there?"""
from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.inference.errors import PredictionError
from nnunet_pdddpm.inference.summary import CASES, describes_mask, read_row, write_summary

logger = logging.getLogger(__name__)

Settings = Sequence[Mapping[str, Any]]
NOT_COMPARED = 'model'
"""Path of a model in the settings of a row. The model itself is its weights, wherever they lie."""


def difference(then: Settings, now: Settings) -> str:
    """How the settings of a finished case differ from those of now, for a sentence; empty if they do not."""
    if [model.get('weights') for model in then] != [model['weights'] for model in now]:
        return f'with another model: its weights are not those of {now[0]["model"]}'
    names = dict.fromkeys(name for a, b in zip(then, now, strict=True) for name in {**a, **b}
                          if name != NOT_COMPARED and a.get(name) != b.get(name))
    return f'with other sampling settings ({", ".join(names)})' if names else ''


def check_same_settings(output: Path, case: str, settings: Settings) -> None:
    """Raise PredictionError if a case in the folder was predicted with another model or other settings."""
    row = read_row(output, case)
    if row is not None and (how := difference(row['settings'], settings)):
        raise PredictionError(f'{output} holds {case} predicted {how}. Name another output folder, or predict all of '
                              f'it again without --continue_prediction.')


def foreign_mask_reason(mask: Path, case: str) -> str:
    """Why the mask of a case is not the one that a prediction wrote; empty if it is, or if there is none."""
    if not mask.is_file():
        return ''
    row = read_row(mask.parent, case)
    if row is None and (mask.parent / CASES / f'{case}.json').is_file():
        return ''  # its row was torn by a loss of power: the case is predicted again
    if row is None:
        return 'was not written by nnUNetv2_pdddpm_predict: there is no row of it in pdddpm_cases'
    return '' if describes_mask(mask.parent, row) else 'was changed or replaced after nnUNetv2_pdddpm_predict wrote it'


def cases_with_other_settings(output: Path, cases: Collection[str], settings: Settings) -> list[str]:
    """Finished cases of a folder that are not among `cases` and were predicted with another model or settings."""
    rows = {file.stem: read_row(output, file.stem) for file in sorted((output / CASES).glob('*.json'))
            if file.stem not in cases}
    return [case for case, row in rows.items() if row is not None and difference(row['settings'], settings)]


def refresh_summary(output: Path) -> None:
    """`write_summary`, and a line about the masks that it leaves out."""
    if changed := write_summary(output):
        logger.warning('%s leaves out %s: the mask that is there is not the one that was predicted.', output / SUMMARY,
                       ', '.join(changed))
