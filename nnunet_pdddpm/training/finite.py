"""Training ends at the first loss that is no number: what came after it would be lost, and could be saved."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsFloat


class NonFiniteLoss(ArithmeticError):
    """The loss is NaN or infinite: the message names the iteration, its cases, and what is kept."""


def require_finite_loss(loss: SupportsFloat, iteration: int, epoch: int, cases: Sequence[str], folder: Path) -> None:
    """Raise `NonFiniteLoss` unless the loss of an iteration is a number.

    Args:
        loss: of the batch.
        iteration: in the epoch, from 0.
        epoch: from 0, as nnU-Net's log counts.
        cases: that the batch was drawn from.
        folder: of the fold, where checkpoints are.
    """
    if math.isfinite(loss):
        return
    kept = [name for name in ('checkpoint_latest.pth', 'checkpoint_best.pth') if (folder / name).is_file()]
    remedy = f'{" and ".join(kept)} in {folder} are from before it: go on with --c' if kept else \
        'no checkpoint has been written yet: start again'
    raise NonFiniteLoss(f'The loss is {float(loss)} at iteration {iteration} of epoch {epoch}, on patches of '
                        f'{", ".join(dict.fromkeys(map(str, cases)))}, and training stops. Look for NaN in the images '
                        f'of these cases, or lower initial_lr of the trainer; {remedy}.')
