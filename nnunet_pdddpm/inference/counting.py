"""Voxels of each label in masks and samples, counted in the network's grid."""
from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_pdddpm.diffusion.drawing import hard_mask
from nnunet_pdddpm.inference.chunks import in_chunks, inside


def tally(values: Tensor, number: int, weights: Tensor | None = None) -> Tensor:
    """How often each of the numbers 0 to `number` - 1 is there, (number,) int64 on the values' device.

    `torch.bincount` would wait for a GPU to learn the largest one.

    Args:
        values: (N,) integers.
        number: above all of them.
        weights: (N,) int64 that are summed in the place of ones.
    """
    if weights is None:
        weights = torch.ones(1, dtype=torch.int64, device=values.device).expand(len(values))
    return torch.zeros(number, dtype=torch.int64, device=values.device).scatter_add_(0, values.long(), weights)


class VoxelCounter:
    """Counts of one volume: of the masks of single models, and of every sample."""

    def __init__(self, label_manager: LabelManager, labels: Mapping[str, tuple[int, ...]], box: tuple[slice, ...]
                 ) -> None:
        """
        Args:
            label_manager: of the data set.
            labels: name of each label or region -> the values that it has in a mask.
            box: (Z, Y, X) of the volume without padding; nothing else is counted.
        """
        self.manager, self.labels, self.box = label_manager, labels, box
        self.masks: list[np.ndarray] = []
        """Of each model: voxels of each label, (labels,)."""
        written = label_manager.regions_class_order if label_manager.has_regions else label_manager.all_labels
        self.num_values = 1 + max([*written, *(max(values) for values in labels.values())])  # that a mask may have
        self.tables: dict[int, Tensor] = {}
        self._consensus: np.ndarray | None = None

    def add_mask(self, logits: Iterable[tuple[slice, Tensor]]) -> None:
        """The mask of one model, by slices and its logits (C, slices, Y, X) in them, padded."""
        table = torch.zeros(0)
        for z, values in logits:
            table = self._add(table, hard_mask(values, self.manager.has_regions), z)
        self.masks.append(self._per_label(table))

    def set_consensus(self, logits: Tensor) -> None:
        """The mask that several models make together, by its logits (C, Z, Y, X) without padding."""
        padded, self.box = self.box, tuple(slice(0, n) for n in logits.shape[1:])
        self.add_mask(in_chunks(logits))
        self.box, self._consensus = padded, self.masks.pop()

    @property
    def consensus(self) -> np.ndarray:
        """Voxels of each label in the mask that all models make together, (labels,)."""
        return self.masks[0] if self._consensus is None else self._consensus

    def add(self, number: int, z: slice, mask: Tensor) -> None:
        """Some slices of a sample.

        Args:
            number: of the sample.
            z: which slices of the padded volume.
            mask: their mask, see `drawing.hard_mask`.
        """
        self.tables[number] = self._add(self.tables.get(number, torch.zeros(0)), mask, z)

    def _add(self, table: Tensor, mask: Tensor, z: slice) -> Tensor:
        """Add to a table (values,) the voxels of slices in the box that have a value, by nnU-Net's own rule. It stays
        where the mask is."""
        here, (_, y, x) = inside(z, self.box[0])[0], self.box
        counted = tally(self.label_map(mask[..., here, y, x]).flatten(), self.num_values)
        return counted if not len(table) else table + counted

    def _per_label(self, table: Tensor) -> np.ndarray:
        """(values,) -> (labels,)"""
        counts = table.cpu().numpy()
        return np.array([counts[list(values)].sum() for values in self.labels.values()])

    def label_map(self, mask: Tensor) -> Tensor:
        """As nnU-Net's `convert_logits_to_segmentation`: the classes' labels, or regions one over the other; int64."""
        if not self.manager.has_regions:
            no_mask = [0]  # of NaN
            return torch.tensor([*self.manager.all_labels, *no_mask], device=mask.device)[mask.long()]
        values = torch.zeros(mask.shape[1:], dtype=torch.int64, device=mask.device)
        for channel, label in enumerate(self.manager.regions_class_order):
            values.masked_fill_(mask[channel], label)
        return values

    def sample_sizes(self) -> np.ndarray:
        """(samples, labels) voxels, in the order of the samples' numbers."""
        return np.stack([self._per_label(self.tables[number]) for number in sorted(self.tables)])

    def mask_volumes(self, mask_ml: np.ndarray, voxel_ml: float) -> np.ndarray:
        """Volumes that intervals are made of, (labels, models) ml.

        The mask of a model among several is not resampled. Its volume is that of the consensus in the original image,
        and the voxels that it has more in the network's grid.

        Args:
            mask_ml: volume of the consensus in the original image, (labels,).
            voxel_ml: that of a voxel of the network's grid.
        """
        voxels = np.stack(self.masks)
        there = (voxels > 0) | (voxels == self.consensus)
        return np.where(there, np.maximum(mask_ml + (voxels - self.consensus) * voxel_ml, 0), 0).T
