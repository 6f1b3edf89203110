"""Connected components of a mask with their volumes, and how many samples have each."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from nnunet_pdddpm.geometry import voxel_volume_ml
from nnunet_pdddpm.labels import Box

MAX_COMPONENTS = 10
"""Components of a label that are listed one by one."""


@dataclass(frozen=True)
class Component:
    """A connected component.

    Attributes:
        ml: its volume.
        place: index of its voxel that is nearest to its centre.
        samples: in how many of the samples the label has a voxel of it.
    """
    ml: float
    place: tuple[int, int, int]
    samples: int


@dataclass(frozen=True)
class ComponentList:
    """The `MAX_COMPONENTS` largest components, largest first; the number of others, and their volume in all."""
    largest: list[Component]
    others: int
    others_ml: float


def components_of(labels: np.ndarray, samples: Sequence[np.ndarray], values: tuple[int, ...], around: Box | None,
                  spacing: tuple[float, ...]) -> ComponentList:
    """The components of a region. Neighbours share a face, an edge or a corner.

    Args:
        labels: label map (z, y, x).
        samples: those of the samples.
        values: of the region.
        around: its box, see `labels.boxes_of`.
        spacing: mm.
    """
    if around is None:
        return ComponentList([], 0, 0.0)
    ml = voxel_volume_ml(labels.shape, spacing)
    index, number = ndimage.label(np.isin(labels[around], values), np.ones((3, 3, 3)))
    sample_masks = [np.isin(sample[around], values) for sample in samples]
    sizes = np.bincount(index.ravel(), minlength=number + 1)[1:]
    order = np.argsort(-sizes, kind='stable')
    boxes = ndimage.find_objects(index)
    found = []
    for i in order[:MAX_COMPONENTS]:
        there = index[boxes[i]] == i + 1
        voxels = np.argwhere(there)
        nearest = voxels[np.argmin((((voxels - voxels.mean(0)) * spacing) ** 2).sum(1))]
        z, y, x = (int(n + part.start + all_.start) for n, part, all_ in zip(nearest, boxes[i], around, strict=True))
        found.append(Component(float(sizes[i] * ml), (z, y, x),
                               sum(bool(sample[boxes[i]][there].any()) for sample in sample_masks)))
    return ComponentList(found, len(order) - len(found), float(sizes[order[MAX_COMPONENTS:]].sum() * ml))
