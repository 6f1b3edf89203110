"""The loss of the denoiser: the cross-entropy part of nnU-Net's, whether a noisy mask is shown or none."""
from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn


class DenoisingLoss(nn.Module):
    """nnU-Net's cross-entropy alone, with the weight of its Dice loss added.

    The chain needs the distribution of the clean mask: its expectation for the next step, and probabilities to draw
    from; so do thresholds of the blind mask. The cross-entropy is smallest for just that, since it is a proper scoring
    rule (Gneiting and Raftery 2007); the Dice loss is not and drives probabilities to 0 and 1, which takes the
    differences out of the samples.
    """

    noisy: Tensor | None = None
    """(B,) bool on the CPU: which items of the batch have a noise level. None: none of them."""
    measured: Tensor | None = None
    """Of the last batch, at full resolution: the cross-entropy of each noisy item, in their order, times the sum of the
    weights; nan where all voxels are to be ignored."""

    def __init__(self, loss: nn.Module) -> None:
        """`loss`: of nnU-Net, with `weight_dice` and `weight_ce` (the weight of the one is given to the other)."""
        super().__init__()
        self.loss, parts = loss, cast(Any, loss)
        if {'weight_dice', 'weight_ce', 'dc'} <= {*vars(loss), *dict(loss.named_children())}:
            self.loss = copy.copy(loss)
            self.loss.__dict__.update(weight_dice=0, weight_ce=parts.weight_ce + parts.weight_dice,
                                      _modules=dict(loss._modules))
            cast(Any, self.loss).dc = _NoDice()  # DC_and_BCE_loss would calculate it

    def set_noisy(self, noisy: Tensor) -> None:
        """Say which items (B,) of the next batch have a noise level."""
        self.noisy, self.measured = noisy, None

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Logits (B, C, ...), target as nnU-Net's losses take it -> scalar, mean over the batch."""
        noisy = torch.zeros(len(output), dtype=torch.bool) if self.noisy is None else self.noisy
        shown, blind = ([i for i, is_noisy in enumerate(noisy.tolist()) if is_noisy == wanted]
                        for wanted in (True, False))
        share = len(shown) / len(output)
        loss = output[..., :0].sum()  # of a batch that is all to be ignored, too, a tensor
        if shown:
            # nnU-Net's loss of an item whose voxels are all to be ignored is 0, with classes a number
            item_losses = [self.loss(output[i:i + 1], target[i:i + 1]) for i in shown]
            if self.measured is None:  # deep supervision asks for the finest first
                measured = torch.stack([item.detach() if isinstance(item, Tensor) else output.new_tensor(torch.nan)
                                        for item in item_losses])
                if target.shape[1] > output.shape[1]:  # regions, and behind them what is to be ignored
                    measured = measured.masked_fill(target[shown, -1].flatten(1).bool().all(1), torch.nan)
                self.measured = measured
            loss = loss + share * sum(item_losses) / len(item_losses)
        if blind:
            loss = loss + (1 - share) * self.loss(output[blind], target[blind])
        return loss


class _NoDice(nn.Module):
    """Stands in for a Dice loss."""

    def forward(self, *_: Any, **__: Any) -> float:
        """0."""
        return 0.0
