"""What the page shows of a case: the box around all that there is to see, and the places to look at first."""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter

from nnunet_pdddpm.labels import boxes_of
from nnunet_pdddpm.report.components import ComponentList, components_of
from nnunet_pdddpm.report.drawing import grey_values, levels, packed, picture
from nnunet_pdddpm.report.volumes import CaseVolumes

FOCUS_SIGMA = 1.5
"""Standard deviation, in the finest spacing, of the Gaussian that smooths the map before its maximum is sought."""
SHOWN_UNCERTAINTY = 0.25
"""From this uncertainty on, a voxel counts as a place to look at, whatever the masks say there; so does the most
uncertain one below it."""
BOX_MARGIN_MM, BOX_MARGIN_SHARE = 20.0, 0.25
"""The box shown goes so far beyond masks and uncertain places, or so large a part of their extent."""
MAX_SIDE = 512
MAX_VOXELS = 4_000_000
"""Of the volume in the page: beyond it several voxels become one."""
PLANES = ('axial', 'coronal', 'sagittal')
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Plane:
    """A plane's frame.

    Attributes:
        name: axial, coronal or sagittal; slice or section where the file has no anatomical axes.
        axis: that it is perpendicular to.
        edges: letters of the patient's side at left, right, top and bottom; empty without anatomical axes.
        size: width and height, mm.
        thickness: of its slices, mm.
        slices: how many there are in the page.
        slices_in_file: how many there are in the file.
    """
    name: str
    axis: int
    edges: tuple[str, ...]
    size: tuple[float, float]
    thickness: float
    slices: int
    slices_in_file: int

    @property
    def scale(self) -> float:
        """Length of the scale bar in mm: 1, 2 or 5 times a power of ten, at most a third of the width."""
        most = self.size[0] / 3
        power = 10.0 ** math.floor(math.log10(most))
        return next(step for step in (5 * power, 2 * power, power) if step <= most * (1 + 1e-9))


@dataclass(frozen=True)
class CaseView:
    """Planes (one for a 2D image, else three), what the script draws them of, and the components of each region.

    Attributes:
        planes: see there.
        volumes: what the script needs, see `make_view`.
        components: of each region, largest first.
        factors: voxels of the image along each axis that are one in the page.
        cut: whether the box shown is less than the image.
        unit: of lengths.
    """
    planes: list[Plane]
    volumes: dict[str, Any]
    components: list[ComponentList]
    factors: Place
    cut: bool
    unit: str


def most_uncertain_place(uncertainty: np.ndarray, masks: np.ndarray, spacing: tuple[float, ...]) -> Place:
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
        return _place(np.unravel_index(np.argmax(smooth), smooth.shape))
    if not masks.any():
        return _place(n // 2 for n in masks.shape)
    voxels = np.argwhere(masks)
    distance = (((voxels - voxels.mean(0)) * spacing) ** 2).sum(1)
    return _place(voxels[np.argmin(distance)])


def largest_sections(mask: np.ndarray) -> Place:
    """Along each axis, the slice in which a mask (z, y, x) has the most voxels."""
    return _place(int(np.argmax(mask.sum(tuple(a for a in range(3) if a != axis)))) for axis in range(3))


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


def box_around(shown: np.ndarray, spacing: tuple[float, ...]) -> tuple[slice, ...]:
    """The box of what is True, with a margin; the whole where nothing is."""
    box = []
    for axis, (size, mm) in enumerate(zip(shown.shape, spacing, strict=True)):
        there = np.flatnonzero(shown.any(tuple(a for a in range(3) if a != axis)))
        if not len(there):
            return tuple(slice(0, n) for n in shown.shape)
        margin = math.ceil(max(BOX_MARGIN_MM / mm, BOX_MARGIN_SHARE * (there[-1] - there[0] + 1)))
        box.append(slice(max(0, int(there[0]) - margin), min(size, int(there[-1]) + 1 + margin)))
    return tuple(box)


def reduction(shape: tuple[int, ...], spacing: tuple[float, ...], voxels: int) -> Place:
    """How many voxels become one along each axis: the finest axes first, until no more than `voxels` are left."""
    factors = [1, 1, 1]
    while True:
        sizes = [math.ceil(n / factor) for n, factor in zip(shape, factors, strict=True)]
        if math.prod(sizes) <= voxels and max(sizes) <= MAX_SIDE:
            return _place(factors)
        too_long = [axis for axis in range(3) if sizes[axis] > MAX_SIDE]
        axes = too_long or [axis for axis in range(3) if sizes[axis] > 1]
        factors[min(axes, key=lambda axis: spacing[axis] * factors[axis])] += 1


def _blocks(array: np.ndarray, factors: Place) -> np.ndarray:
    """An array (z, y, x) as (Z, fz, Y, fy, X, fx); the last block repeats the last slice where it is not full."""
    padded = np.pad(array, [(0, -n % factor) for n, factor in zip(array.shape, factors, strict=True)], 'edge')
    return padded.reshape([part for n, factor in zip(padded.shape, factors, strict=True)
                           for part in (n // factor, factor)])


def reduced(image: np.ndarray, factors: Place) -> np.ndarray:
    """The means of blocks of voxels."""
    return image if factors == (1, 1, 1) else _blocks(image, factors).mean((1, 3, 5), dtype=np.float32)


def reduced_labels(labels: np.ndarray, factors: Place) -> np.ndarray:
    """The labels at the centres of blocks; a higher one that lies between all centres: no lesion is to vanish."""
    if factors == (1, 1, 1):
        return labels
    blocks = _blocks(labels, factors)
    z, y, x = (factor // 2 for factor in factors)
    centres, any_of = blocks[:, z, :, y, :, x], blocks.max((1, 3, 5))
    return np.where(any_of > maximum_filter(centres, 3), any_of, centres)


def make_view(case: CaseVolumes, regions: list[tuple[int, ...]], budget: int) -> CaseView:
    """What the page has of a case.

    `volumes` of it are, for the script: `shape`, `spacing` of a voxel in the page, `flipped` (whether coronal and
    sagittal planes are shown upside down), `image` with its `columns`, `uncertainty`, `consensus`, `stock` and
    `samples` as in `drawing`, where samples are the exclusive or with the consensus; `first` and `step` of the slices'
    numbers in the file, and `last`, beyond which none goes; and `places` (z, y, x) to go to by their names.

    Args:
        case: its volumes.
        regions: for each outline the label values it surrounds.
        budget: bytes that it may take in the page; beyond, it becomes coarser.
    """
    masks = (case.consensus > 0) | (case.stock > 0)
    seen = masks | (case.uncertainty >= SHOWN_UNCERTAINTY)
    window = intensity_window(case.image, seen)
    uncertain = most_uncertain_place(case.uncertainty, masks, case.spacing)
    seen[uncertain] |= seen.any()
    box = box_around(seen, case.spacing)
    grey = grey_values(case.image[box], window)
    around = boxes_of(case.consensus, regions)
    components = [components_of(case.consensus, case.samples, values, inside, case.spacing)
                  for values, inside in zip(regions, around, strict=True)]
    places = {'uncertain': uncertain,
              'largest': largest_sections(case.consensus > 0 if any(around) else masks)}
    for i, (values, inside, found) in enumerate(zip(regions, around, components, strict=True)):
        if inside is not None:
            sections = largest_sections(np.isin(case.consensus[inside], values))
            places[f'label-{i}'] = _place(n + part.start for n, part in zip(sections, inside, strict=True))
        places.update({f'component-{i}-{j}': one.place for j, one in enumerate(found.largest)})

    voxels = MAX_VOXELS
    while True:
        factors = reduction(grey.shape, case.spacing, voxels)
        volumes, size = _volumes(case, box, grey, factors)
        shape = volumes['shape']
        if size <= budget or voxels < 1000:
            break
        voxels = int(min(math.prod(shape), voxels) * min(0.9 * budget / size, 0.8))
    spacing = [float(f'{mm * factor:.6g}') for mm, factor in zip(case.spacing, factors, strict=True)]
    first, step, last = zip(*(_numbers(case, axis, box[axis], factors[axis]) for axis in range(3)), strict=True)
    volumes |= {'spacing': spacing, 'flipped': case.axes.anatomical, 'first': list(first), 'step': list(step),
                'last': list(last), 'places': {
                    name: [min(max((i - part.start) // factor, 0), n - 1)
                           for i, part, factor, n in zip(place, box, factors, shape, strict=True)]
                    for name, place in places.items()}}
    planes = [_plane(case, axis, shape, spacing) for axis in range(3 if len(seen) > 1 else 1)]
    return CaseView(planes, volumes, components, factors, grey.shape != seen.shape, case.unit)


def _volumes(case: CaseVolumes, box: tuple[slice, ...], grey: np.ndarray, factors: Place) -> tuple[dict[str, Any], int]:
    """The volumes of a box with every so many voxels as one, as text, and how long that is."""
    small = reduced_labels(case.consensus[box], factors)
    image, columns = picture(reduced(grey, factors).astype(np.uint8))
    texts = {'image': image, 'consensus': packed(small), 'stock': packed(reduced_labels(case.stock[box], factors)),
             'uncertainty': packed(levels(reduced(case.uncertainty[box], factors)))}
    samples = [packed(reduced_labels(sample[box], factors) ^ small) for sample in case.samples]
    return ({**texts, 'samples': samples, 'columns': columns, 'shape': list(small.shape)},
            sum(map(len, [*texts.values(), *samples])))


def _plane(case: CaseVolumes, axis: int, shape: list[int], spacing: list[float]) -> Plane:
    down, right = [a for a in range(3) if a != axis]
    edges: tuple[str, ...] = ()
    name = 'image' if len(case.image) == 1 else ('slice', 'section along x', 'section along y')[axis]
    if case.axes.anatomical:
        name = PLANES[axis]
        edges = (('R', 'L', 'A', 'P'), ('R', 'L', 'S', 'I'), ('A', 'P', 'S', 'I'))[axis]
    return Plane(name, axis, edges, (shape[right] * spacing[right], shape[down] * spacing[down]), spacing[axis],
                 shape[axis], case.image.shape[axis])


def _numbers(case: CaseVolumes, axis: int, side: slice, factor: int) -> tuple[int, int, int]:
    """Number in the file, from 1, of the first slice of the page along an axis, the step to the next, and the number
    of the last slice of the box."""
    size, last = case.image.shape[axis], side.stop - 1
    first = min(side.start + factor // 2, last)
    return (size - first, -factor, size - last) if case.axes.counted_back[axis] else (first + 1, factor, last + 1)


def _place(numbers: Iterable[Any]) -> Place:
    z, y, x = (int(number) for number in numbers)
    return z, y, x
