"""The loss of the denoiser, made of the planned one: what is asked of it depends on what the noise is on."""
from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class DenoisingLoss(nn.Module):
    """nnU-Net's loss at level 0, its cross-entropy part alone at the noise levels.

    At level 0 the best mask is asked for, and Dice + cross-entropy is what nnU-Net trains masks with. At a noise level
    the chain needs the distribution of the clean mask: its expectation for the next step, and probabilities to draw the
    sample from. The cross-entropy is smallest for just that, since it is a proper scoring rule (Gneiting and Raftery
    2007); the Dice loss is not and drives probabilities to 0 and 1, which takes the differences out of the samples.
    """

    noisy: Tensor | None = None
    """(B,) bool on the CPU: which items of the batch have a noise level. None: none of them."""

    def __init__(self, loss: nn.Module) -> None:
        """`loss`: of nnU-Net, with `weight_dice` and `weight_ce` (the weight of the one is given to the other)."""
        super().__init__()
        self.mask_loss = loss
        self.proper_loss: nn.Module = copy.copy(loss)
        weighted = self.proper_loss.__dict__
        if {'weight_dice', 'weight_ce'} <= weighted.keys():
            weighted.update(weight_ce=weighted['weight_ce'] + weighted['weight_dice'], weight_dice=0)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Logits (B, C, ...), target as nnU-Net's losses take it -> scalar, mean over the batch."""
        if self.noisy is None or not self.noisy.any():
            return self.mask_loss(output, target)
        if self.noisy.all():
            return self.proper_loss(output, target)
        share = float(self.noisy.float().mean())
        index = self.noisy.nonzero()[:, 0], (~self.noisy).nonzero()[:, 0]
        noisy, clean = (torch.as_tensor(i, device=output.device) for i in index)
        return (share * self.proper_loss(output[noisy], target[noisy])
                + (1 - share) * self.mask_loss(output[clean], target[clean]))
