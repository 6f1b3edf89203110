"""Phantom whose truth is a random draw: the distribution of masks is known exactly for every image.

An image shows objects, two unless more are asked for, each in a cell of 64 x 32 pixels. Each has a core, a rim around
it, a lobe at one side, and a dot in the middle of the core; all of it can be seen. The truth is, for each object for
itself, the core alone, the core with the rim, or the core with the lobe: neither the rim nor the lobe holds the other,
so no threshold of a probability map gives all three. The size of the dot in the core says how probable they are: for u
from 0 (smallest dot) to 1 (largest)

    P(core) = 0.7 - 0.6 u,    P(with rim) = 0.1 + 0.6 u,    P(with lobe) = 0.2.

Sizes relative to each other survive nnU-Net's augmentation, which rotates, scales, and changes brightness and contrast.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

SIZE = 64
CELL = (64, 32)
CORE, RIM = 5.5, 8.0  # radii, pixels
LOBE, LOBE_DISTANCE = 5.0, 9.5  # radius, and from the centre of the core
DOT = (1.0, 3.8)  # radius of the dot at u = 0 and u = 1
INTENSITIES = {'rim': 0.45, 'lobe': 0.6, 'core': 0.8, 'dot': 1.2}
NOISE = 0.06
SHAPES = ('core', 'rim', 'lobe')


@dataclass(frozen=True)
class Object:
    """One of an image's objects."""
    masks: np.ndarray
    """(3, Y, X) bool: core alone, with rim, with lobe."""
    probabilities: np.ndarray
    """(3,) of the masks."""
    u: float
    """What the size of the dot says, in [0, 1]."""
    cell: tuple[slice, slice]
    """Where it lies."""


@dataclass(frozen=True)
class Phantom:
    """An image, one draw of the truth, and the distribution it is drawn from."""
    image: np.ndarray
    """(Y, X) uint8."""
    truth: np.ndarray
    """(Y, X) bool."""
    objects: tuple[Object, ...]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Another draw of the truth, (Y, X) bool."""
        return np.any([one.masks[rng.choice(len(SHAPES), p=one.probabilities)] for one in self.objects], 0)

    def distribution(self) -> tuple[np.ndarray, np.ndarray]:
        """All masks the truth can be, (3^objects, Y, X) bool, and their probabilities; for two objects."""
        chosen = list(itertools.product(range(len(SHAPES)), repeat=len(self.objects)))
        masks = [np.any([o.masks[i] for o, i in zip(self.objects, choice, strict=True)], 0) for choice in chosen]
        weights = [np.prod([o.probabilities[i] for o, i in zip(self.objects, choice, strict=True)])
                   for choice in chosen]
        return np.stack(masks), np.array(weights)


def phantom(seed: int, rows: int = 1, columns: int = 2) -> Phantom:
    """The same seed gives the same phantom. One object in each of rows x columns cells."""
    rng = np.random.default_rng(seed)
    shape = (CELL[0] * rows, CELL[1] * columns)
    y, x = np.mgrid[:shape[0], :shape[1]]
    image = np.zeros(shape)
    objects, truth = [], np.zeros(shape, bool)
    for top, left in itertools.product(range(0, shape[0], CELL[0]), range(0, shape[1], CELL[1])):
        cx, cy = left + 16 + rng.uniform(-1.5, 1.5), top + rng.uniform(16, 48)
        angle, u = rng.uniform(0, 2 * np.pi), rng.random()
        distance = np.hypot(y - cy, x - cx)
        lobe = np.hypot(y - cy - LOBE_DISTANCE * np.sin(angle), x - cx - LOBE_DISTANCE * np.cos(angle)) < LOBE
        core, rim, dot = distance < CORE, distance < RIM, distance < DOT[0] + (DOT[1] - DOT[0]) * u
        for name, where in (('rim', rim), ('lobe', lobe), ('core', core), ('dot', dot)):
            image[where] = INTENSITIES[name]
        p = np.array([0.7 - 0.6 * u, 0.1 + 0.6 * u, 0.2])
        masks = np.stack([core, rim, core | lobe])
        objects.append(Object(masks, p, u, (slice(top, top + CELL[0]), slice(left, left + CELL[1]))))
        truth |= masks[rng.choice(len(SHAPES), p=p)]
    image = gaussian_filter(image, 0.6) + NOISE * rng.standard_normal(image.shape)
    return Phantom((np.clip((image + 0.25) / 1.75, 0, 1) * 255).astype(np.uint8), truth, tuple(objects))
