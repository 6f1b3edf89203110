"""What makes test images of `triage.py` bad, 2D and 3D: raw ones, and in other forms than the artefacts fitted on."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage


def _kspace(x: np.ndarray) -> np.ndarray:
    return np.fft.fftshift(np.fft.fftn(x))


def _image(k: np.ndarray) -> np.ndarray:
    return np.abs(np.fft.ifftn(np.fft.ifftshift(k)))


def _axes(x: np.ndarray) -> list[np.ndarray]:
    return np.meshgrid(*(np.linspace(-1, 1, n) for n in x.shape), indexing='ij', sparse=True)


def rician(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the image with complex noise of 0.4, 0.9 and 1.8 standard deviations."""
    real, imaginary = (0.4, 0.9, 1.8)[strength] * x.std() * rng.standard_normal((2, *x.shape))
    return np.hypot(x + real, imaginary)


def low_pass(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Only the middle half, third and fifth of the frequencies of each axis, with the ringing that makes."""
    keep = np.ones(x.shape, bool)
    for axis in _axes(x):
        keep &= np.abs(axis) <= (0.5, 0.33, 0.2)[strength]
    return _image(_kspace(x) * keep)


def coil(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Brightness that falls off from a corner, as of one coil: a Gaussian of 1.5, 1 and 0.7 half sides."""
    corner = rng.choice([-1, 1], x.ndim)
    distance = sum((axis - end) ** 2 for axis, end in zip(_axes(x), corner, strict=True))
    return x * np.exp(-distance / (2 * (1.5, 1.0, 0.7)[strength] ** 2))


def s_curve(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Contrast by a logistic curve of steepness 6, 12 and 25 around a random grey."""
    top = max(float(np.quantile(x, 0.99)), 1e-6)
    return 1000 / (1 + np.exp(-(6, 12, 25)[strength] * (x / top - rng.uniform(0.3, 0.7))))


def motion(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """A fifth, 40 and 60 % of the lines of k-space are measured after a move by up to four voxels."""
    axis, k = int(rng.integers(x.ndim)), _kspace(x)
    moved = rng.random(x.shape[axis]) < (0.2, 0.4, 0.6)[strength]
    for along, n in enumerate(x.shape):
        frequency = (np.arange(n) - n // 2) / n
        phase = np.exp(-2j * np.pi * frequency * rng.uniform(-4, 4)).reshape([-1 if i == along else 1
                                                                              for i in range(x.ndim)])
        lines = moved.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        k = np.where(lines, k * phase, k)
    return _image(k)


def bursts(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes of two standard deviations, other ones in each of 30, 60 and 100 % of the slices."""
    found = x.copy()
    slices = found if x.ndim == 3 else found[:, None]  # rows of a 2D image
    y, z = np.meshgrid(*(np.arange(n) / n for n in slices.shape[1:]), indexing='ij')
    for plane in slices:
        if rng.random() < (0.3, 0.6, 1.0)[strength]:
            a, b = rng.integers(3, 12, 2)
            plane += 2 * x.std() * np.cos(2 * np.pi * (a * y + b * z + rng.random()))
    return np.maximum(found, 0)


def gaps(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Every second, fourth and seventh slice of an axis, and straight lines between them."""
    axis, step = int(rng.integers(x.ndim)), (2, 4, 7)[strength]
    kept = np.arange(int(rng.integers(step)), x.shape[axis], step)
    at = np.interp(np.arange(x.shape[axis]), kept, np.arange(len(kept)))
    coordinates = np.meshgrid(*(at if i == axis else np.arange(n) for i, n in enumerate(x.shape)), indexing='ij')
    return ndimage.map_coordinates(np.take(x, kept, axis), coordinates, order=1, mode='nearest')


def oblique(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """A quarter, 40 and 55 % of the image beyond an oblique plane are 0."""
    direction = rng.normal(size=x.ndim)
    along = sum(a * axis for a, axis in zip(direction, _axes(x), strict=True))
    return np.where(along > np.quantile(along, (0.75, 0.6, 0.45)[strength]), 0, x)


def bright_object(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """A ball at a random place, 4, 8 and 16 times as bright as the image, with a shadow around it."""
    middle = rng.uniform(-0.8, 0.8, x.ndim)
    distance = np.sqrt(sum((axis - m) ** 2 for axis, m in zip(_axes(x), middle, strict=True)))
    shadowed = x * np.clip(distance / 0.7, 0, 1)
    return np.where(distance < 0.3, (4, 8, 16)[strength] * np.quantile(x, 0.99), shadowed)


FAMILIES: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    'Rician noise': rician, 'low-pass': low_pass, 'one coil': coil, 'S-shaped contrast': s_curve, 'motion': motion,
    'bursts': bursts, 'gaps between slices': gaps, 'oblique field of view': oblique, 'bright object': bright_object}
STRENGTHS = 3
