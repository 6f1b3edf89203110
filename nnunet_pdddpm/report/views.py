"""What the page shows of a case: three planes through its most uncertain place, and axial slices to leaf through."""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter

from nnunet_pdddpm.report.drawing import grey_layer, outline, uncertainty_layer
from nnunet_pdddpm.report.volumes import CaseVolumes

FOCUS_SIGMA = 1.5
"""Standard deviation, in the finest spacing, of the Gaussian that smooths the map before its maximum is sought."""
UNCERTAIN = 0.25
"""From this uncertainty on, a voxel counts as a place to look at, whatever the masks say there."""
MARGIN_MM = 10.0
"""Axial slices are shown this far beyond the masks and uncertain places, at least two of them."""
PLANES = ('axial', 'coronal', 'sagittal')


@dataclass(frozen=True)
class Layers:
    """One slice: `data:` URIs of image and uncertainty, path data of the outlines, one a label."""
    image: str
    uncertainty: str
    consensus: list[str]
    stock: list[str]

    def size(self) -> int:
        """Bytes in the page."""
        return len(self.image) + len(self.uncertainty) + sum(map(len, self.consensus + self.stock))


@dataclass(frozen=True)
class Plane:
    """A slice with what its frame says.

    Attributes:
        name: axial, coronal or sagittal; slice or section where the file has no anatomical axes.
        columns: pixels along x.
        rows: pixels along y.
        spacing: mm of a pixel, (y, x).
        edges: letters of the patient's side at left, right, top and bottom; empty without anatomical axes.
        cross: (x, y) mm at which the two other planes cut this one.
        layers: the slice.
    """
    name: str
    columns: int
    rows: int
    spacing: tuple[float, float]
    edges: tuple[str, ...]
    cross: tuple[float, float]
    layers: Layers


@dataclass(frozen=True)
class CaseView:
    """Planes (one for a 2D image, else three) and axial slices, from inferior to superior.

    Attributes:
        planes: through the most uncertain place.
        slices: of each embedded axial slice the layers, its number in the file (from 1) and its height in mm as the
            other planes have it.
        first: index in `slices` of the one that `planes` shows.
        num_axial: slices of the volume.
        in_range: slices that there are from the lowest to the highest embedded one.
        step: every how many-th of those is embedded.
    """
    planes: list[Plane]
    slices: list[dict[str, Any]]
    first: int
    num_axial: int
    in_range: int
    step: int


def most_uncertain_place(uncertainty: np.ndarray, masks: np.ndarray, spacing: tuple[float, ...]) -> tuple[int, ...]:
    """Index of the maximum of the smoothed map: an uncertain region wins over a single uncertain voxel.

    Without any uncertainty it is the voxel of `masks` nearest to their centre; without masks, the volume's centre.

    Args:
        uncertainty: (z, y, x) in [0, 1].
        masks: (z, y, x) bool, foreground of any mask.
        spacing: mm.
    """
    sigma = [0.0 if n == 1 else FOCUS_SIGMA * min(spacing) / s
             for n, s in zip(uncertainty.shape, spacing, strict=True)]
    smooth = gaussian_filter(uncertainty.astype(np.float32), sigma, mode='nearest')
    if smooth.max() > 0:
        return tuple(int(i) for i in np.unravel_index(np.argmax(smooth), smooth.shape))
    if not masks.any():
        return tuple(n // 2 for n in masks.shape)
    voxels = np.argwhere(masks)
    distance = (((voxels - voxels.mean(0)) * spacing) ** 2).sum(1)
    return tuple(int(i) for i in voxels[np.argmin(distance)])


def intensity_window(image: np.ndarray, region: np.ndarray) -> tuple[float, float]:
    """Black and white point: the 1st to 99th percentile of the intensities in and around `region`, a quarter wider.

    Around means within five voxels; air and bone far from what was segmented do not spoil the contrast. The points stay
    within the whole image's 0.5th to 99.9th percentile, which they are without a region.
    """
    darkest, brightest = np.percentile(image, (0.5, 99.9))
    near = maximum_filter(region, size=[min(11, n) for n in region.shape])
    low, high = np.percentile(image[near], (1, 99)) if near.any() else (darkest, brightest)
    spare = 0.25 * (high - low)
    low, high = max(low - spare, darkest), min(high + spare, brightest)
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def make_view(case: CaseVolumes, regions: list[tuple[int, ...]], budget: int) -> CaseView:
    """Draw a case.

    Args:
        case: its volumes.
        regions: for each outline the label values it surrounds.
        budget: bytes that the axial slices may take; beyond it, evenly spaced ones are left out.
    """
    masks = (case.consensus > 0) | (case.stock > 0)
    shown = masks | (case.uncertainty >= UNCERTAIN)
    focus = most_uncertain_place(case.uncertainty, masks, case.spacing)
    window = intensity_window(case.image, shown)

    def draw(axis: int, index: int) -> Layers:
        consensus, stock = (_section(case, array, axis, index) for array in (case.consensus, case.stock))
        return Layers(grey_layer(_section(case, case.image, axis, index), window),
                      uncertainty_layer(_section(case, case.uncertainty, axis, index)),
                      [outline(np.isin(consensus, values)) for values in regions],
                      [outline(np.isin(stock, values)) for values in regions])

    planes = [_plane(case, axis, focus, draw(axis, focus[axis])) for axis in range(3 if len(shown) > 1 else 1)]
    lowest, highest = _range(shown, focus[0], case.spacing[0])
    # the slice with the most uncertainty is among those that take most bytes
    step = math.ceil((highest - lowest + 1) * planes[0].layers.size() / max(budget, 1))
    indices = list(_every(step, lowest, highest, focus[0]))
    slices = [{**asdict(planes[0].layers if index == focus[0] else draw(0, index)),
               'number': _number_in_file(case, index), 'height': _height(case, index)} for index in indices]
    return CaseView(planes, slices, indices.index(focus[0]), len(shown), indices[-1] - indices[0] + 1, step)


def _section(case: CaseVolumes, array: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A slice as it is shown: superior or anterior at the top, the patient's right or anterior at the left."""
    section = np.moveaxis(array, axis, 0)[index]
    return section[::-1] if axis > 0 and case.axes.anatomical else section


def _plane(case: CaseVolumes, axis: int, focus: tuple[int, ...], layers: Layers) -> Plane:
    down, right = [a for a in range(3) if a != axis]
    shape, spacing = case.image.shape, (case.spacing[down], case.spacing[right])
    edges: tuple[str, ...] = ()
    name = 'image' if shape[0] == 1 else ('slice', 'section along x', 'section along y')[axis]
    if case.axes.anatomical:
        name = PLANES[axis]
        edges = (('R', 'L', 'A', 'P'), ('R', 'L', 'S', 'I'), ('A', 'P', 'S', 'I'))[axis]
    height = (focus[1] + 0.5) * case.spacing[1] if axis == 0 else _height(case, focus[0])
    return Plane(name, shape[right], shape[down], spacing, edges, ((focus[right] + 0.5) * spacing[1], height), layers)


def _height(case: CaseVolumes, index: int) -> float:
    """Where an axial slice cuts the other planes: mm from their top."""
    place = index + 0.5
    return (len(case.image) - place if case.axes.anatomical else place) * case.spacing[0]


def _number_in_file(case: CaseVolumes, index: int) -> int:
    return len(case.image) - index if case.axes.flipped[0] else index + 1


def _range(shown: np.ndarray, focus: int, spacing: float) -> tuple[int, int]:
    """Lowest and highest axial slice with something to look at, and a margin."""
    occupied = np.append(np.flatnonzero(shown.any((1, 2))), focus)
    margin = max(2, math.ceil(MARGIN_MM / spacing))
    return max(0, int(occupied.min()) - margin), min(len(shown) - 1, int(occupied.max()) + margin)


def _every(step: int, lowest: int, highest: int, through: int) -> Iterator[int]:
    """From lowest to highest in steps that meet `through`."""
    yield from range(through - (through - lowest) // step * step, highest + 1, step)
