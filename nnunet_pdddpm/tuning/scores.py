"""Dice, likelihood and distance to raters of one case, in the network's grid."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import regions_to_channels
from nnunet_pdddpm.evaluation.calibration import SMALLEST_PROBABILITY
from nnunet_pdddpm.evaluation.overlap import iou_matrix
from nnunet_pdddpm.evaluation.raters import ged_squared


class Truth:
    """The true labels of a case, without the voxels that are to be ignored, and what predictions are worth by them."""

    def __init__(self, labels: np.ndarray, label_manager: LabelManager, device: torch.device,
                 raters: Sequence[np.ndarray] = ()) -> None:
        """
        Args:
            labels: (Z, Y, X) integers; negative ones, which nnU-Net gives to what it masks, are background.
            label_manager: of the data set.
            device: where predictions lie.
            raters: further label maps of the same shape, of several people.
        """
        self.regions = [tuple(np.atleast_1d(region).tolist()) for region in label_manager.foreground_regions] \
            if label_manager.has_regions else None
        self.num_classes = label_manager.num_segmentation_heads
        self.device = device
        ignore = label_manager.ignore_label
        self.valid = None if ignore is None else torch.from_numpy(labels != ignore).to(device)
        self.truth = self._channels(labels)
        self.raters = [self._channels(rater).cpu().numpy() for rater in raters]

    def _channels(self, labels: np.ndarray) -> Tensor:
        """Label map to (N,) classes, or (R, N) bool of regions."""
        values = torch.from_numpy(labels.astype(np.int64)).clamp(min=0).to(self.device)[None]
        if self.regions is not None:
            return self._voxels(regions_to_channels(values[None], self.regions)[0] > 0)
        values = self._voxels(values)[0]
        return torch.where(values < self.num_classes, values, 0)  # a rater's label to ignore

    def _voxels(self, values: Tensor) -> Tensor:
        """(C, Z, Y, X) -> (C, N)"""
        return values.flatten(1) if self.valid is None else values[:, self.valid]

    def harden(self, probabilities: Tensor) -> Tensor:
        """Probabilities (C, Z, Y, X) to (N,) classes, or (R, N) bool of regions."""
        return self._harden(self._voxels(probabilities))

    def _harden(self, probabilities: Tensor) -> Tensor:
        return probabilities > 0.5 if self.regions is not None else probabilities.argmax(0)

    def score(self, probabilities: Tensor) -> tuple[float, float]:
        """Dice and negative log-likelihood of probabilities (C, Z, Y, X).

        Returns:
            Mean Dice over the foreground labels (or regions) that are in the truth or the prediction, nan if none is;
            NLL in nats a voxel, that of regions the mean over them.
        """
        p = self._voxels(probabilities)
        of_truth = torch.where(self.truth, p, 1 - p) if self.regions is not None else p.gather(0, self.truth[None])
        nll = -of_truth.clamp(SMALLEST_PROBABILITY, 1).log().mean()
        return self._dice(self._harden(p)), float(nll)

    def _dice(self, hard: Tensor) -> float:
        if self.regions is not None:
            both, sizes = (self.truth & hard).sum(1), self.truth.sum(1) + hard.sum(1)
        else:
            n = self.num_classes
            confusion = torch.bincount(self.truth * n + hard, minlength=n * n).reshape(n, n)
            both, sizes = confusion.diagonal()[1:], (confusion.sum(0) + confusion.sum(1))[1:]
        there = sizes > 0
        return float((2 * both[there] / sizes[there]).mean()) if there.any() else float('nan')

    def ged(self, samples: Sequence[np.ndarray]) -> float:
        """GED² of hard samples (as `harden` gives them) to the raters, mean over labels (or regions); nan without."""
        if not self.raters:
            return float('nan')
        channels = range(len(self.regions)) if self.regions is not None else range(1, self.num_classes)
        values = []
        for channel in channels:
            drawn, rated = (np.stack([m[channel] > 0 if self.regions is not None else m == channel for m in masks])
                            for masks in (samples, self.raters))
            values.append(ged_squared(iou_matrix(drawn, rated), iou_matrix(drawn, drawn), iou_matrix(rated, rated)))
        return float(np.mean(values))
