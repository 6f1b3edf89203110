"""Dice, likelihood and energy score of one case, in the network's grid."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import class_map, regions_to_channels
from nnunet_pdddpm.diffusion.drawing import drawn_logits, hard_mask
from nnunet_pdddpm.evaluation.parts import octants
from nnunet_pdddpm.evaluation.raters import fair_ged_squared
from nnunet_pdddpm.evaluation.scores import kernel_score
from nnunet_pdddpm.evaluation.voxelwise import SMALLEST_PROBABILITY
from nnunet_pdddpm.inference.chunks import chunks
from nnunet_pdddpm.inference.components import POSSIBLE
from nnunet_pdddpm.inference.counting import tally

OCTANTS = 8


class Truth:
    """The true labels of a case, without the voxels that are to be ignored, and scores of predictions by them."""

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
        self.exact = torch.float32 if device.type == 'mps' else torch.float64  # which mps has not
        ignore = label_manager.ignore_label
        self.valid = None if ignore is None else torch.from_numpy(np.flatnonzero(labels != ignore)).to(device)
        self.truth = self._channels(labels)
        self.raters = [self._channels(rater) for rater in raters]

    def _channels(self, labels: np.ndarray) -> Tensor:
        """Label map to (N,) classes, or (R, N) bool of regions."""
        values = torch.from_numpy(labels.astype(np.int64)).clamp(min=0).to(self.device)[None]
        if self.regions is not None:
            return self._voxels(regions_to_channels(values[None], self.regions)[0] > 0)
        values = self._voxels(values)[0]
        return self._compact(torch.where(values < self.num_classes, values, 0))  # a rater's label to ignore

    def _voxels(self, values: Tensor) -> Tensor:
        """(C, Z, Y, X) -> (C, N)"""
        return values.flatten(1) if self.valid is None else values.flatten(1).index_select(1, self.valid)

    def drawn(self, probabilities: Tensor, shifts: Tensor, parts: Tensor | None = None) -> Tensor:
        """The mask of a sample, of its probabilities (C, Z, Y, X), what draws it (C, J), and the parts (Z, Y, X) of the
        volume, see `draw_shifts`: (N,) classes, (R, N) bool of regions."""
        regions, masks = self.regions is not None, []
        for z in chunks(probabilities.shape):  # a volume of logits would take as much memory again
            logits = drawn_logits(probabilities[:, z], regions, shifts, None if parts is None else parts[z])
            mask = hard_mask(logits, regions)
            masks.append(mask if regions else self._compact(mask)[None])
        mask = self._voxels(torch.cat(masks, 1))
        return mask if regions else mask[0]

    def _harden(self, probabilities: Tensor) -> Tensor:
        return probabilities > 0.5 if self.regions is not None else self._compact(class_map(probabilities[None])[0])

    def _compact(self, classes: Tensor) -> Tensor:
        return classes.to(torch.uint8 if self.num_classes <= 256 else torch.int16)

    def score(self, probabilities: Tensor) -> tuple[float, float]:
        """Dice and negative log-likelihood of probabilities (C, Z, Y, X).

        Returns:
            Mean Dice over the foreground labels (or regions) that are in the truth or the prediction, nan if none is;
            NLL in nats a voxel, that of regions the mean over them.
        """
        return self._dice(self._harden(self._voxels(probabilities))), self.nll(probabilities)

    def nll(self, probabilities: Tensor) -> float:
        """Negative log-likelihood of probabilities (C, Z, Y, X) in nats a voxel, that of regions the mean over them."""
        p = self._voxels(probabilities)
        true_probability = torch.where(self.truth, p, 1 - p) if self.regions is not None \
            else p.gather(0, self.truth[None].long())
        return float(-true_probability.clamp(SMALLEST_PROBABILITY, 1).log().mean())

    def _dice(self, hard: Tensor) -> float:
        both, sizes = self._overlap(self.truth, hard)
        return float((2 * both / sizes).nanmean())  # nan is a label that neither has

    def set_parts(self, probabilities: Tensor) -> None:
        """Say by the stock model's probabilities (C, Z, Y, X) where the parts are whose volumes are scored.

        They are the octants of the box around what may be foreground (quadrants of a slice): they must not depend on
        the truth, or the score would not be proper. The unit of a label's volumes is its expected volume and one voxel.
        """
        foreground = probabilities.amax(0) if self.regions is not None else 1 - probabilities[0]
        index, _ = octants((foreground > POSSIBLE).cpu().numpy())
        self.part = self._voxels(torch.from_numpy(index).to(self.device)[None])[0]
        p = self._voxels(probabilities)
        self.unit = 1 + (p if self.regions is not None else p[1:]).sum(1).to(self.exact)

    def part_volumes(self, mask: Tensor) -> Tensor:
        """(labels, OCTANTS) volumes of the parts of a mask, in units of the label: see `set_parts`."""
        if self.regions is not None:
            volumes = torch.stack([tally(self.part, OCTANTS, region.long()) for region in mask])
        else:
            label_and_octant = mask.long() * OCTANTS + self.part
            volumes = tally(label_and_octant, OCTANTS * self.num_classes).reshape(-1, OCTANTS)[1:]
        return volumes.to(self.exact) / self.unit[:, None]

    def energy(self, samples: Sequence[Tensor]) -> tuple[float, float]:
        """Energy score of samples that were drawn independently (as `drawn` gives them), to the truth or the raters.

        E d(S, Y) - E d(S, S') / 2, the latter over pairs of different samples, see `kernel_score`: a proper score whose
        expectation does not depend on the number of samples. d is 1 - IoU plus v / (1 + v) with the Euclidean distance
        v of the parts' volumes, both means over labels (or regions). Both are of negative type, the second as a
        Bernstein function of v. It is bounded: a label of which the stock model expects nothing cannot outweigh all
        other cases.

        Returns:
            It, in [-1, 2], and fair GED², see `fair_ged_squared`.
        """
        masks, n = [*samples, *(self.raters or [self.truth])], len(samples)
        volumes = torch.stack([self.part_volumes(mask) for mask in masks]).cpu().numpy()
        volume_distances = np.linalg.norm(volumes[:, None] - volumes[None], axis=-1)  # (masks, masks, labels)
        shapes = np.zeros((len(masks), len(masks)))
        pairs = list(combinations(range(len(masks)), 2))
        pair_distances = torch.stack([self._distance(masks[i], masks[j]) for i, j in pairs]).cpu().numpy()
        for (i, j), distance in zip(pairs, pair_distances, strict=True):
            shapes[i, j] = shapes[j, i] = distance
        distances = shapes + (volume_distances / (1 + volume_distances)).mean(-1)
        iou = 1 - shapes
        return (kernel_score(distances[:n, n:], distances[:n, :n]),
                fair_ged_squared(iou[:n, n:], iou[:n, :n], iou[n:, n:]))

    def _sizes(self, mask: Tensor) -> Tensor:
        """Voxels of each label (or region)."""
        return mask.sum(1) if self.regions is not None else tally(mask, self.num_classes)[1:]

    def _distance(self, one: Tensor, other: Tensor) -> Tensor:
        """1 - IoU, mean over labels (or regions); two masks without a label agree on it."""
        both, sizes = self._overlap(one, other)
        union = sizes - both
        return torch.where(union > 0, 1 - both / union.clamp(min=1), 0).mean()

    def _overlap(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """For each label (or region) the voxels that both masks give to it, and the sum of those that either does."""
        both = one & other if self.regions is not None else torch.where(one == other, one, 0)  # 0 is not counted
        return self._sizes(both), self._sizes(one) + self._sizes(other)
