"""Simulated artefacts of preprocessed images, to measure how good masks are on worse images.

They are made in the network's grid, where the images are at hand wherever there is a training, and afterwards the image
is normalised again as nnU-Net would have, where it normalises by the image's own statistics.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

OWN_STATISTICS = ('ZScoreNormalization', 'RescaleTo01Normalization')
"""nnU-Net's schemes that normalise an image by itself."""
STRENGTHS = 3
Artefact = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def noise(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """White noise of 0.3, 0.7 and 1.5 standard deviations of the image."""
    return x + (0.3, 0.7, 1.5)[strength] * x.std() * rng.standard_normal(x.shape)


def blur(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Smoothing by a Gaussian of 1, 2 and 3 voxels."""
    return ndimage.gaussian_filter(x, [min(strength + 1, (n - 1) / 4) for n in x.shape])


def bias_field(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Brighter by a smooth factor: exp of a quadratic polynomial within +-0.5, +-1 and +-1.8."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in x.shape), indexing='ij', sparse=True)
    one, two = rng.normal(size=(2, x.ndim))
    field = sum(a * axis + b * axis ** 2 for a, b, axis in zip(one, two, axes, strict=True)) + np.zeros(x.shape)
    field -= (field.max() + field.min()) / 2
    return (x - x.min()) * np.exp((0.5, 1.0, 1.8)[strength] * field / max(field.max(), 1e-6)) + x.min()


def gamma(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Other contrast: a power of the intensities, of exp(+-0.5), exp(+-0.9) and exp(+-1.5)."""
    low, width = x.min(), max(float(np.ptp(x)), 1e-6)
    return low + width * ((x - low) / width) ** np.exp(rng.choice([-1, 1]) * (0.5, 0.9, 1.5)[strength])


def ghosting(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Faint copies beside the image, as of periodic motion."""
    axis, copies = int(rng.integers(x.ndim)), int(rng.integers(2, 5))
    shifts = [i * x.shape[axis] // copies for i in range(1, copies)]
    ghosts = np.mean([np.roll(x, shift, axis) for shift in shifts], 0)
    return x + (0.4, 0.8, 1.4)[strength] * ghosts


def spike(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """Stripes through the image: one wave of 0.5, 1 and 2 standard deviations."""
    axes = np.meshgrid(*(np.arange(n) / n for n in x.shape), indexing='ij', sparse=True)
    phase = sum(int(rng.integers(2, max(3, n // 4))) * axis for n, axis in zip(x.shape, axes, strict=True))
    return x + (0.5, 1.0, 2.0)[strength] * x.std() * np.cos(2 * np.pi * (phase + rng.random()))


def thick_slices(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """2, 4 and 6 neighbouring slices of one axis become their mean."""
    axis, thick = int(rng.choice([i for i, n in enumerate(x.shape) if n > 1] or [0])), (2, 4, 6)[strength]
    first = np.arange(0, x.shape[axis], thick)
    sums = np.add.reduceat(x, first, axis)
    number = np.diff([*first, x.shape[axis]])
    means = sums / number.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return np.repeat(means, number, axis)


def cropped(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """A quarter, 40 % and 55 % at one side of an axis hold nothing."""
    x = x.copy()
    axis = int(rng.choice([i for i, n in enumerate(x.shape) if n > 1] or [0]))
    size = round((0.25, 0.4, 0.55)[strength] * x.shape[axis])
    side = slice(0, size) if rng.random() < 0.5 else slice(x.shape[axis] - size, None)
    x[tuple(side if i == axis else slice(None) for i in range(x.ndim))] = x.min()
    return x


def shifted(x: np.ndarray, strength: int, rng: np.random.Generator) -> np.ndarray:
    """As if normalised by other statistics: stretched and shifted."""
    sign = rng.choice([-1, 1], 2)
    return x * np.exp(sign[0] * (0.3, 0.6, 1.0)[strength]) + sign[1] * (0.5, 1.0, 2.0)[strength] * x.std()


ARTEFACTS: dict[str, Artefact] = {
    'noise': noise, 'blur': blur, 'bias field': bias_field, 'gamma': gamma, 'ghosting': ghosting, 'spike': spike,
    'thick slices': thick_slices, 'cropped': cropped, 'shifted intensities': shifted}


def with_artefact(image: np.ndarray, name: str, strength: int, schemes: Sequence[str], seed: Sequence[int]
                  ) -> np.ndarray:
    """A preprocessed image (channels, Z, Y, X) with an artefact, float32; further channels are copied.

    Args:
        image: normalised; behind its channels there may be those of a cascade's previous stage.
        name: one of `ARTEFACTS`.
        strength: 0 to STRENGTHS - 1.
        schemes: the plans' normalisation of each channel of the image proper.
        seed: of what is random, the same in all channels.
    """
    found = np.array(image, np.float32)
    for channel, scheme in zip(found, schemes, strict=False):
        made = ARTEFACTS[name](channel.astype(np.float64), strength, np.random.default_rng(seed))
        if scheme in OWN_STATISTICS and name != 'shifted intensities' and made.std() > 0:
            made = (made - made.mean()) / made.std() * channel.std() + channel.mean()
        channel[...] = made
    return found
