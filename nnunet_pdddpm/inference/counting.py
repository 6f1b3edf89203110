"""Voxels of each label in masks and samples, counted in the network's grid."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_pdddpm.diffusion.drawing import drawn_logits
from nnunet_pdddpm.inference.components import Parts
from nnunet_pdddpm.inference.intervals import Features


class VoxelCounter:
    """Counts of one volume: of the masks of single models, and of every sample, whole and object by object."""

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
        self.samples: dict[int, np.ndarray] = {}
        """Number of a sample -> voxels of each label in each object, (labels, objects)."""
        self.consensus = np.zeros(len(labels), int)
        """Of the mask that all models make together."""

    def add_mask(self, logits: Tensor) -> None:
        """The mask of one model, by its logits (C, Z, Y, X), padded."""
        self.masks.append(self._in_mask(logits[:, self.box[0], self.box[1], self.box[2]]))

    def set_consensus(self, logits: Tensor) -> None:
        """The mask that all models make together, by its logits (C, Z, Y, X) without padding."""
        self.consensus = self._in_mask(logits)

    def _in_mask(self, logits: Tensor) -> np.ndarray:
        counts = np.zeros(len(self.labels), int)
        for z in range(logits.shape[1]):
            counts += self._count(logits[:, z], None, 1)[:, 0]
        return counts

    def add_sample(self, number: int, probabilities: Tensor, shifts: Tensor, parts: Parts, objects: Parts) -> None:
        """A sample, by its probabilities (C, Z, Y, X), padded, and what draws its mask: see `drawing.drawn_logits`.

        `objects`: those that are counted one by one.
        """
        regions, (_, y, x) = self.manager.has_regions, self.box
        counts = np.zeros((len(self.labels), objects.number), int)
        for z in range(*self.box[0].indices(probabilities.shape[1])):
            part, index = parts.at(z), objects.at(z)
            logits = drawn_logits(probabilities[:, z, y, x], regions, shifts,
                                  None if part is None else part[y, x])
            counts += self._count(logits, None if index is None else index[y, x], objects.number)
        self.samples[number] = counts

    def _count(self, logits: Tensor, index: Tensor | None, number: int) -> np.ndarray:
        """(labels, number) voxels of each label, by nnU-Net's own rule, in each of the parts that `index` names."""
        values = self._label_map(logits).flatten().long()
        index = torch.zeros_like(values) if index is None else index.flatten().long()
        highest = max(max(of) for of in self.labels.values())
        together = torch.bincount((values * number + index)[values <= highest], minlength=(highest + 1) * number)
        table = together.reshape(-1, number).cpu().numpy()
        return np.stack([table[list(of)].sum(0) for of in self.labels.values()])

    def _label_map(self, logits: Tensor) -> Tensor:
        """As nnU-Net's `convert_logits_to_segmentation`: argmax, or regions one over the other."""
        if not self.manager.has_regions:
            return torch.tensor(self.manager.all_labels, device=logits.device)[logits.argmax(0)]
        values = torch.zeros(logits.shape[1:], dtype=torch.int64, device=logits.device)
        for channel, label in enumerate(self.manager.regions_class_order):
            values[logits[channel] > 0] = label
        return values

    def voxel_ml(self, mask_ml: np.ndarray, grid_voxel_ml: float) -> np.ndarray:
        """Volume that a counted voxel stands for, of each label (labels,).

        It is such that the consensus has the volume that it has in the original image: resampling makes masks a little
        smaller or larger.

        Args:
            mask_ml: volume of the consensus in the original image, (labels,).
            grid_voxel_ml: that of a voxel of the network's grid, for a label that the consensus lacks.
        """
        there = (self.consensus > 0) & (mask_ml > 0)
        return np.where(there, mask_ml / np.maximum(self.consensus, 1), grid_voxel_ml)

    def sample_sizes(self) -> np.ndarray:
        """(samples, labels) voxels, in the order of the samples' numbers."""
        return np.stack([self.samples[number].sum(1) for number in sorted(self.samples)])

    def features(self, voxel_ml: np.ndarray) -> list[Features]:
        """What intervals are made of, for each label: arrays (models,). What is of the samples is known of one model.

        `voxel_ml`: (labels,), see above.
        """
        masks = np.stack(self.masks) * voxel_ml
        nothing = np.zeros(len(masks))
        if len(masks) > 1 or len(self.samples) < 2:
            return [Features(of, nothing, nothing, nothing, nothing) for of in masks.T]
        counts = np.stack([self.samples[number] for number in sorted(self.samples)]) * voxel_ml[:, None]
        total, sd = counts.sum(2), counts.std(0, ddof=1)
        return [Features(masks[:, i], total[:, i].mean(keepdims=True), total[:, i].std(ddof=1, keepdims=True),
                         (sd[i] ** 2).sum(keepdims=True), sd[i].sum(keepdims=True) ** 2)
                for i in range(len(self.labels))]


def grid_voxel_ml(properties: Mapping[str, Any], shape: Sequence[int], image_voxel_ml: float) -> float:
    """Volume of a voxel of the network's grid in ml.

    Args:
        properties: of the preprocessed image, as nnU-Net's preprocessor gives them.
        shape: (Z, Y, X) of the preprocessed image.
        image_voxel_ml: volume of a voxel of the original image.
    """
    cropped = properties['shape_after_cropping_and_before_resampling']
    return image_voxel_ml * float(np.prod(np.asarray(cropped, float)) / np.prod(np.asarray(shape, float)))
