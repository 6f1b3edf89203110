"""nnU-Net's polynomial learning rate with a gentle first epoch."""
from __future__ import annotations

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler


class WarmUpPolyLRScheduler(PolyLRScheduler):
    """As nnU-Net's `PolyLRScheduler`, at a fifth of its learning rate in the first epoch: AdamW's moments are not
    settled yet, and the denoiser starts from weights that are good already."""

    def step(self, current_step: int | None = None) -> None:
        """Set the learning rate of epoch `current_step`."""
        super().step(current_step)
        if current_step == 0:
            for group in self.optimizer.param_groups:
                group['lr'] /= 5
