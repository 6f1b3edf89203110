"""The loss of the denoiser: nnU-Net's own where no mask is shown, its cross-entropy where a noisy one is."""
from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn


class DenoisingLoss(nn.Module):
    """nnU-Net's loss at the blind level, its cross-entropy part alone at the noise levels.

    Where no mask is shown the best mask is asked for, and Dice + cross-entropy is what nnU-Net trains masks with. At a
    noise level the chain needs the distribution of the clean mask: its expectation for the next step, and probabilities
    to draw from. The cross-entropy is smallest for just that, since it is a proper scoring rule (Gneiting and Raftery
    2007); the Dice loss is not and drives probabilities to 0 and 1, which takes the differences out of the samples.
    """

    noisy: Tensor | None = None
    """(B,) bool on the CPU: which items of the batch have a noise level. None: none of them."""
    measured: Tensor | None = None
    """Of the last batch, at full resolution: the cross-entropy of each noisy item, in their order, times the sum of the
    weights; nan where all voxels are to be ignored."""

    def __init__(self, loss: nn.Module) -> None:
        """`loss`: of nnU-Net, with `weight_dice` and `weight_ce` (the weight of the one is given to the other)."""
        super().__init__()
        self.mask_loss = self.proper_loss = loss
        self.dice_over_processes = False
        parts: Any = loss
        if {'weight_dice', 'weight_ce', 'dc'} <= {*vars(loss), *dict(loss.named_children())}:
            dice, ce = parts.weight_dice, parts.weight_ce
            self.proper_loss = _weighted(loss, 0, ce + dice)
            self.only_dice, self.only_ce = _weighted(loss, dice, 0), _weighted(loss, 0, ce)
            # the Dice is then one over the items of all processes, all of which take part in its sums with equal shapes
            self.dice_over_processes = bool(parts.dc.batch_dice and parts.dc.ddp)

    def set_noisy(self, noisy: Tensor) -> None:
        """Say which items (B,) of the next batch have a noise level."""
        self.noisy, self.measured = noisy, None

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Logits (B, C, ...), target as nnU-Net's losses take it -> scalar, mean over the batch."""
        noisy = torch.zeros(len(output), dtype=torch.bool) if self.noisy is None else self.noisy
        shown, blind = ([i for i, of in enumerate(noisy.tolist()) if of == which] for which in (True, False))
        share = len(shown) / len(output)
        loss: Any = 0
        if shown:
            # nnU-Net's loss of an item whose voxels are all to be ignored is 0, with classes a number
            item_losses = [self.proper_loss(output[i:i + 1], target[i:i + 1]) for i in shown]
            if self.measured is None:  # deep supervision asks for the finest first
                measured = torch.stack([item.detach() if isinstance(item, Tensor) else output.new_tensor(torch.nan)
                                        for item in item_losses])
                if target.shape[1] > output.shape[1]:  # regions, and behind them what is to be ignored
                    measured = measured.masked_fill(target[shown, -1].flatten(1).bool().all(1), torch.nan)
                self.measured = measured
            loss = loss + share * sum(item_losses, start=output[..., :0].sum()) / len(item_losses)
        if self.dice_over_processes:
            loss = loss + (1 - share) * self.only_dice(*_as_background(noisy.to(output.device), output, target))
        if blind:
            blind_loss = self.only_ce if self.dice_over_processes else self.mask_loss
            loss = loss + (1 - share) * blind_loss(output[blind], target[blind])
        return cast(Tensor, loss)


def _as_background(items: Tensor, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Output and target with some items (B,) as recognised background, which adds nothing to a Dice of batches."""
    as_mask = items.reshape(-1, *[1] * (output.ndim - 1))
    background = torch.full_like(output, torch.finfo(output.dtype).min / 4)
    if target.shape[1] == 1 < output.shape[1]:  # classes, the first of which is background; else regions
        background[:, 0] = 0
    return torch.where(as_mask, background, output), torch.where(as_mask, torch.zeros_like(target), target)


def _weighted(loss: nn.Module, weight_dice: float, weight_ce: float) -> nn.Module:
    """The same loss, whose parts are shared, with other weights; without the Dice part if it has none."""
    changed = copy.copy(loss)
    changed.__dict__.update(weight_dice=weight_dice, weight_ce=weight_ce, _modules=dict(loss._modules))
    if weight_dice == 0:  # DC_and_BCE_loss would calculate it
        changed.dc = _NoDice()
    return changed


class _NoDice(nn.Module):
    """Stands in for a Dice loss."""

    def forward(self, *_: Any, **__: Any) -> float:
        """0."""
        return 0.0
