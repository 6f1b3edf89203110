"""What several samples of one volume say together: running sums, and masks if they are few."""
from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import harden
from nnunet_pdddpm.file_names import UNCERTAINTY
from nnunet_pdddpm.inference.chunks import chunks

UNCERTAIN = (0.1, 0.9)
"""A label is uncertain at a voxel where its mean probability lies between these."""


class Spread:
    """Mean and spread of sampled probabilities of one volume, by fold where there are several.

    Memory on `device`, in bytes a voxel: 4 C for the mean, 12 for entropy and squares, and to compare the samples 1 C
    (2 C from 256 samples on), or of fewer samples than classes their masks, 1 a sample (2 from 256 classes on); 4 C
    more for several folds.
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
        self.shape = tuple(shape)
        self.mean = torch.zeros(self.shape, device=device)
        self.counts, self.masks = None, None
        if regions or samples >= shape[0]:
            self.counts = torch.zeros(self.shape, device=device, dtype=torch.uint8 if samples < 256 else torch.int16)
        else:
            self.masks = torch.zeros((samples, *self.shape[1:]), device=device,
                                     dtype=torch.uint8 if shape[0] < 256 else torch.int16)
        self.entropy = torch.zeros(self.shape[1:], device=device)
        self.squares = torch.zeros(self.shape[1:], device=device)
        self.fold_mean = torch.zeros_like(self.mean) if folds > 1 else None
        self.fold_squares = torch.zeros_like(self.entropy)

    def add(self, number: int, z: slice, probabilities: Tensor, mask: Tensor) -> None:
        """Add some slices of a sample.

        Args:
            number: of the sample.
            z: which slices.
            probabilities: theirs, (C, slices, Y, X).
            mask: that was drawn from them, see `drawing.hard_mask`.
        """
        p = probabilities
        self.mean[:, z] += p / self.samples
        self.entropy[z] += self._entropy(p) / self.samples
        self.squares[z] += self._over_channels(p ** 2) / self.samples
        if self.fold_mean is not None:
            self.fold_mean[:, z] += p
        if self.masks is not None:
            self.masks[number, z] = mask
        elif self.counts is not None:
            self.counts[:, z] += mask if self.regions else self._one_hot(mask)

    def current_fold_mean(self, z: slice, samples: int) -> Tensor:
        """Mean probabilities (C, slices, Y, X) of the current model, once all of its `samples` samples are added."""
        return self.mean[:, z] if self.fold_mean is None else self.fold_mean[:, z] / samples

    def finish_fold(self, samples: int) -> None:
        """End the current model, of which `samples` samples have been added."""
        if self.fold_mean is not None and samples:
            for z in chunks(self.shape):
                square = self._over_channels((self.fold_mean[:, z] / samples) ** 2)
                self.fold_squares[z] += samples / self.samples * square
            self.fold_mean.zero_()

    def crop(self, box: tuple[slice, ...]) -> None:
        """Leave out what lies outside the box (of Z, Y, X), as padding does. Nothing can be added afterwards."""
        z, y, x = box
        self.__dict__.pop('_count_sums', None)
        self.mean = self.mean[:, z, y, x]
        self.shape, self.fold_mean = tuple(self.mean.shape), None if self.fold_mean is None else torch.empty(0)
        self.counts = None if self.counts is None else self.counts[:, z, y, x]
        self.masks = None if self.masks is None else self.masks[:, z, y, x]
        self.entropy, self.squares, self.fold_squares = (
            sums[z, y, x] for sums in (self.entropy, self.squares, self.fold_squares))

    def count_at(self, z: slice) -> Tensor:
        """Number of samples that have each channel, (C, slices, Y, X)."""
        if self.counts is not None:
            return self.counts[:, z]
        masks = cast(Tensor, self.masks)[:, z]
        counts = torch.zeros((self.shape[0], *masks.shape[1:]), dtype=torch.int16, device=masks.device)
        for mask in masks:
            counts += self._one_hot(mask)
        return counts

    def _one_hot(self, classes: Tensor) -> Tensor:
        """(slices, Y, X) -> (C, slices, Y, X) bool."""
        return classes == torch.arange(self.shape[0], device=classes.device, dtype=classes.dtype)[:, None, None, None]

    def maps(self) -> dict[str, Tensor]:
        """Maps (Z, Y, X) of the uncertainty, float32.

        uncertainty: entropy of the mean probabilities, divided by its maximum (log C; for regions log 2, and the mean
            over regions): 0 where every sample is sure of the same, 1 where all labels are equally likely.
        mutual_information: uncertainty less the mean entropy of the single samples, in the same unit: how much of it is
            disagreement between the samples.
        variance: of the probabilities over the samples, summed over the classes (mean over regions).
        variance_between_folds, with several models: the part of it that lies between the models. What the means of
            so few samples differ by chance is taken off, unless each model has one sample.
        """
        folds = ['variance_between_folds'] if self.fold_mean is not None else []
        maps = {name: torch.empty_like(self.entropy)
                for name in (UNCERTAINTY, 'variance', 'mutual_information', *folds)}
        for z in chunks(self.shape):
            m = self.mean[:, z]
            uncertainty, square = self._entropy(m), self._over_channels(m ** 2)
            maps[UNCERTAINTY][z] = uncertainty.clamp(0, 1)
            maps['variance'][z] = (self.squares[z] - square).clamp(min=0)
            maps['mutual_information'][z] = (uncertainty - self.entropy[z]).clamp(0, 1)
            for name in folds:
                between = (self.fold_squares[z] - square).clamp(min=0)
                if self.samples > self.folds:  # K means of N samples: (K - 1) / N of an unbiased variance within
                    within = (maps['variance'][z] - between).clamp(min=0)
                    between = (between - (self.folds - 1) / (self.samples - self.folds) * within).clamp(min=0)
                maps[name][z] = between
        return maps

    def pairwise_dice(self, channel: int) -> float | None:
        """Dice between the samples' masks of a channel, intersections and sizes summed over all pairs.

        With c(v) samples that have the channel at voxel v: sum c (c - 1) / ((n - 1) sum c). It is the mean pairwise
        Dice when all masks have the same size. None with one sample, or if no sample has the channel anywhere.
        """
        total, pairs = self._count_sums[channel]
        return None if self.samples < 2 or total == 0 else pairs / ((self.samples - 1) * total)

    @cached_property
    def _count_sums(self) -> list[list[int]]:
        """sum c and sum c (c - 1) of each channel, once all samples have been added."""
        sums = torch.zeros((self.shape[0], 2), dtype=torch.int64, device=self.mean.device)
        for z in chunks(self.shape):
            c = self.count_at(z).to(torch.int32)
            sums[:, 0] += c.sum((1, 2, 3))
            sums[:, 1] += c.mul_(c - 1).sum((1, 2, 3))
        found: list[list[int]] = sums.tolist()
        return found

    def estimated_dice(self, logits: Tensor) -> list[float | None]:
        """Expected Dice of a mask, given by its logits (C, Z, Y, X), if the mean probabilities p are right.

        2 sum over the mask of p / (size of the mask + sum of p), expected overlap over expected sizes, of each channel.
        It is too high where p is too sure, and where voxels are right or wrong together. 0 if the mask is empty, None
        if neither the mask nor any sample has the channel.
        """
        sums = torch.zeros((3, *self.shape[:2]), dtype=torch.float64, device=self.mean.device)
        for z in chunks(self.shape):
            p = self.mean[:, z]
            hard = harden(logits[None, :, z].to(p.device), self.regions)[0]
            for total, values in zip(sums, (hard * p, hard, p), strict=True):
                total[:, z] = values.sum((2, 3), dtype=torch.float64)  # of slices: chunks of any size make the same sum
        overlaps, masks, sizes = sums.sum(2).cpu()
        there = [bool(mask > 0) or total > 0 for mask, (total, _) in zip(masks, self._count_sums, strict=True)]
        dice = 2 * overlaps / (masks + sizes)
        return [float(d) if known else None for d, known in zip(dice, there, strict=True)]

    def uncertain_share(self, channels: Sequence[int]) -> float:
        """Share of uncertain voxels among those that may belong to one of the channels (mean probability over 10 %)."""
        sums = torch.zeros(2, dtype=torch.int64, device=self.mean.device)
        for z in chunks((len(channels), *self.shape[1:])):
            p = self.mean[list(channels), z]
            possible = p > UNCERTAIN[0]
            sums += torch.stack([(possible & (p < UNCERTAIN[1])).any(0).sum(), possible.any(0).sum()])
        uncertain, possible_ = sums.tolist()
        return uncertain / possible_ if possible_ else 0.0

    def _over_channels(self, values: Tensor) -> Tensor:
        return values.mean(0) if self.regions else values.sum(0)

    def _entropy(self, p: Tensor) -> Tensor:
        """Entropy of probabilities (C, ...), divided by its maximum."""
        p = p.clamp(0, 1)  # a mean of ones may round to more
        if self.regions:
            return (torch.special.entr(p) + torch.special.entr(1 - p)).mean(0) / math.log(2)
        return torch.special.entr(p).sum(0) / math.log(p.shape[0])
