"""What several samples of one volume say together: running sums, whose memory does not grow with their number."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import harden
from nnunet_pdddpm.diffusion.drawing import drawn_mask
from nnunet_pdddpm.inference.components import WHOLE, Parts

UNSURE = (0.1, 0.9)
"""A label is unsure at a voxel where its mean probability lies between these."""


class Spread:
    """Mean and spread of sampled probabilities of one volume, by fold where there are several.

    Memory on `device`, in bytes a voxel: 4 C for the mean, 1 C (2 C from 256 samples on) for the counts, 12 for entropy
    and squares; 4 C more for several folds. It does not depend on the number of samples.
    """

    def __init__(self, shape: Sequence[int], samples: int, folds: int, regions: bool, device: torch.device) -> None:
        """
        Args:
            shape: (C, Z, Y, X).
            samples: number n of samples that will be added.
            folds: number of models that they come from; between more than one the variance is split.
            regions: whether channels are regions (each a yes or no of its own) or classes (they sum to one).
            device: where the sums are kept.
        """
        self.samples, self.folds, self.regions = samples, folds, regions
        self.mean = torch.zeros(tuple(shape), device=device)
        self.counts = torch.zeros(tuple(shape), device=device, dtype=torch.uint8 if samples < 256 else torch.int16)
        self.entropy = torch.zeros(tuple(shape[1:]), device=device)
        self.squares = torch.zeros(tuple(shape[1:]), device=device)
        self.fold_mean = torch.zeros_like(self.mean) if folds > 1 else None
        self.fold_squares = torch.zeros_like(self.entropy)
        self.of_fold = 0

    def add(self, probabilities: Tensor, shifts: Tensor, parts: Parts = WHOLE) -> None:
        """Add the probabilities (C, Z, Y, X) of one sample; `shifts` (C, J) draw its mask, see
        `drawing.draw_shifts`."""
        for z in range(probabilities.shape[1]):
            p = probabilities[:, z]
            self.mean[:, z] += p / self.samples
            self.counts[:, z] += drawn_mask(p, self.regions, shifts, parts.at(z)).to(self.counts.dtype)
            self.entropy[z] += self._entropy(p) / self.samples
            self.squares[z] += self._over_channels(p ** 2) / self.samples
            if self.fold_mean is not None:
                self.fold_mean[:, z] += p
        self.of_fold += 1

    def end_of_fold(self) -> None:
        """All samples of one model have been added."""
        if self.fold_mean is not None and self.of_fold:
            for z in range(self.mean.shape[1]):
                square = self._over_channels((self.fold_mean[:, z] / self.of_fold) ** 2)
                self.fold_squares[z] += self.of_fold / self.samples * square
            self.fold_mean.zero_()
        self.of_fold = 0

    def crop(self, box: tuple[slice, ...]) -> None:
        """Leave out what lies outside the box (of Z, Y, X), as padding does. Nothing can be added afterwards."""
        z, y, x = box
        self.mean, self.counts = self.mean[:, z, y, x], self.counts[:, z, y, x]
        self.entropy, self.squares, self.fold_squares = (
            sums[z, y, x] for sums in (self.entropy, self.squares, self.fold_squares))

    def maps(self) -> dict[str, Tensor]:
        """Maps (Z, Y, X) of the uncertainty, float32.

        uncertainty: entropy of the mean probabilities, divided by its maximum (log C; for regions log 2, and the mean
            over regions): 0 where every sample is sure of the same, 1 where all labels are equally likely.
        mutual_information: uncertainty less the mean entropy of the single samples, in the same unit: how much of it is
            disagreement between the samples.
        variance: of the probabilities over the samples, summed over the classes (mean over regions).
        variance_between_folds, with several models: the part of it that lies between the means of the models.
        """
        uncertainty, variance, between = (torch.empty_like(self.entropy) for _ in range(3))
        for z in range(self.mean.shape[1]):
            m = self.mean[:, z]
            uncertainty[z] = self._entropy(m)
            square = self._over_channels(m ** 2)
            variance[z] = self.squares[z] - square
            between[z] = self.fold_squares[z] - square
        maps = {'uncertainty': uncertainty.clamp(0, 1), 'variance': variance.clamp(min=0),
                'mutual_information': (uncertainty - self.entropy).clamp(0, 1)}
        return {**maps, 'variance_between_folds': between.clamp(min=0)} if self.fold_mean is not None else maps

    def pairwise_dice(self, channel: int) -> float | None:
        """Dice between the samples' masks of a channel, intersections and sizes summed over all pairs.

        With c(v) samples that have the channel at voxel v: sum c (c - 1) / ((n - 1) sum c). It is the mean pairwise
        Dice when all masks have the same size. None with one sample, or if no sample has the channel anywhere.
        """
        histogram = torch.bincount(self.counts[channel].flatten().long(), minlength=2).tolist()
        total = sum(c * voxels for c, voxels in enumerate(histogram))
        if self.samples < 2 or total == 0:
            return None
        return sum(c * (c - 1) * voxels for c, voxels in enumerate(histogram)) / ((self.samples - 1) * total)

    def estimated_dice(self, logits: Tensor) -> list[float | None]:
        """Dice of a mask, given by its logits (C, Z, Y, X), with a truth of which the mean probabilities p are right.

        2 sum over the mask of p / (size of the mask + sum of p), expected overlap over expected sizes, of each channel.
        It is too high where p is too sure, and where voxels are right or wrong together. 0 if the mask is empty, None
        if neither the mask nor any sample has the channel.
        """
        overlaps, sizes, masks = torch.zeros((3, len(logits)), dtype=torch.float64, device=self.mean.device)
        for z in range(logits.shape[1]):
            p = self.mean[:, z]
            hard = harden(logits[None, :, z].to(p.device), self.regions)[0]
            overlaps += (hard * p).sum((1, 2))
            masks += hard.sum((1, 2))
            sizes += p.sum((1, 2))
        there = [bool(mask > 0) or bool(counts.any()) for mask, counts in zip(masks, self.counts, strict=True)]
        dice = 2 * overlaps / (masks + sizes)
        return [float(d) if known else None for d, known in zip(dice, there, strict=True)]

    def unsure_share(self, channels: Sequence[int]) -> float:
        """Share of unsure voxels among those that may belong to one of the channels (mean probability over 10 %)."""
        unsure = possible = 0
        for z in range(self.mean.shape[1]):
            p = self.mean[list(channels), z]
            possible += int((p > UNSURE[0]).any(0).sum())
            unsure += int(((p > UNSURE[0]) & (p < UNSURE[1])).any(0).sum())
        return unsure / possible if possible else 0.0

    def _over_channels(self, values: Tensor) -> Tensor:
        return values.mean(0) if self.regions else values.sum(0)

    def _entropy(self, p: Tensor) -> Tensor:
        """Entropy of probabilities (C, ...), divided by its maximum."""
        p = p.clamp(0, 1)  # a mean of ones may round to more
        if self.regions:
            return (torch.special.entr(p) + torch.special.entr(1 - p)).mean(0) / math.log(2)
        return torch.special.entr(p).sum(0) / math.log(p.shape[0])
