"""Training stops at a loss that is NaN or infinite, before a checkpoint of broken weights is saved."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import SupportsFloat

import torch
from torch import Tensor

from nnunet_pdddpm.file_names import BEST_CHECKPOINT

MAX_CONSECUTIVE = 10
"""Losses that GradScaler may leave out one after the other."""


class NonFiniteLoss(ArithmeticError):
    """The loss is NaN or infinite: the message names the iteration, its cases, and what is kept."""


class LossWatch:
    """Ends training at a loss that is NaN or infinite.

    With a GradScaler, which leaves such steps out and lowers its scale, they are counted and told instead. Training
    then ends at MAX_CONSECUTIVE of them, or where a weight is no number.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        """`folder`: of the fold, where checkpoints are; `log`: told which steps were left out."""
        self.folder, self.log = folder, log
        self.in_a_row = 0

    def check(self, loss: SupportsFloat, iteration: int, epoch: int, cases: Sequence[str],
              scaled_weights: Iterable[Tensor] | None) -> None:
        """Look at the loss of an iteration.

        Args:
            loss: of the batch.
            iteration: in the epoch, from 0.
            epoch: from 0, as nnU-Net's log counts.
            cases: that the batch was drawn from.
            scaled_weights: the network's after the step, if a GradScaler guards them; else None.

        Raises:
            NonFiniteLoss: if training has to end.
        """
        if math.isfinite(loss):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        if scaled_weights is None:
            raise self._error(loss, iteration, epoch, cases, '')
        if not all(bool(torch.isfinite(weight).all()) for weight in scaled_weights):
            raise self._error(loss, iteration, epoch, cases, ' and weights of the network are no numbers')
        if self.in_a_row >= MAX_CONSECUTIVE:
            raise self._error(loss, iteration, epoch, cases, f', the {self.in_a_row}th time in a row')
        self.log(f'The loss is {float(loss)} at iteration {iteration} of epoch {epoch}: GradScaler leaves this step '
                 f'out ({self.in_a_row} in a row, training stops at {MAX_CONSECUTIVE}).')

    def _error(self, loss: SupportsFloat, iteration: int, epoch: int, cases: Sequence[str], what: str) -> NonFiniteLoss:
        kept = [name for name in ('checkpoint_latest.pth', BEST_CHECKPOINT) if (self.folder / name).is_file()]
        remedy = f'{" and ".join(kept)} in {self.folder} are from before it: continue with --c' if kept else \
            'no checkpoint has been written yet: start again'
        return NonFiniteLoss(f'The loss is {float(loss)} at iteration {iteration} of epoch {epoch}{what}, on patches '
                             f'of {", ".join(dict.fromkeys(map(str, cases)))}, and training stops. Look for NaN in the '
                             f'images of these cases, or lower initial_lr of the trainer; {remedy}.')
