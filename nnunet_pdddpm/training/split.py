"""Whether a split validates on cases that a model or its stock model was trained on."""
from __future__ import annotations

from collections.abc import Collection

from nnunet_pdddpm.network.checkpoint import CheckpointError
from nnunet_pdddpm.network.seen import Seen, split_overlap
from nnunet_pdddpm.tuning.budget import enough_cases


def check_split(seen: Seen, training: Collection[str], validation: Collection[str]) -> list[str]:
    """What is wrong with the validation cases of a fold, a line each for the log.

    Args:
        seen: of the model, before these cases are added.
        training, validation: names of cases, by the split in force.

    Raises:
        CheckpointError: if the model was trained on cases that are to validate it now, but for those that the split
            trains on as well; or if the stock model has held out too few of them.
    """
    leak, foreign = seen.leaks(validation, training), seen.leaked_into_stock(validation)
    if seen.leaked_into_denoiser(validation, training) \
            or not enough_cases(len(validation) - len(foreign), len(validation)):
        raise CheckpointError(f'By the present splits_final.json {leak}. Put back the one that was trained with, or '
                              f'train the stock model again with this one, and then this model from its beginning '
                              f'(without --c).')
    lines = []
    if leak:
        lines.append(f'WARNING: by the present splits_final.json {leak}. The Dice of a validation is not of held-out '
                     f'cases alone. The sampling settings and intervals of volumes are fitted to the others.')
    if both := split_overlap(validation, training):
        lines.append(f'WARNING: {both}. The Dice of a validation is not of held-out cases alone, and the sampling '
                     f'settings and intervals of volumes are not fitted to them.')
    if unknown := seen.unknown():
        lines.append(f'{unknown} If splits_final.json was changed since, what is measured on the validation cases is '
                     f'wrong.')
    return lines
