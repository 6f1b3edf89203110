"""What probabilities say voxel by voxel, made of one channel after the other: a hundred classes take no more memory."""
from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_pdddpm.evaluation.calibration import Cells, reliability

SMALLEST_PROBABILITY = 1e-6
"""Probabilities are clipped to this before the logarithm: float16 files hold exact zeros."""


@dataclass(frozen=True)
class Voxelwise:
    """Statistics of every voxel, arrays (z, y, x)."""
    confidence: np.ndarray
    """Probability of the most likely class."""
    correct: np.ndarray
    """Whether that class is true."""
    true_probability: np.ndarray
    """Probability of the true class."""
    squares: np.ndarray
    """Squared probabilities, summed over the classes."""
    entropy: np.ndarray
    """In [0, 1]: 0 certain, 1 all classes equally likely."""

    def inside(self, voxels: np.ndarray) -> Voxelwise:
        """The statistics of the voxels in a mask (z, y, x), each field as one axis."""
        return Voxelwise(*(values[voxels] for values in (
            self.confidence, self.correct, self.true_probability, self.squares, self.entropy)))

    @property
    def negative_log_likelihood(self) -> float:
        """Mean of -log p(true class) in nats."""
        return float(-np.log(np.clip(self.true_probability, SMALLEST_PROBABILITY, 1)).mean(dtype=np.float64))

    @property
    def brier(self) -> float:
        """Brier score, mean over voxels of the squared error summed over classes, in [0, 2]."""
        return float((self.squares - 2 * self.true_probability + 1).mean(dtype=np.float64))


def class_statistics(channels: Iterable[np.ndarray], truth: np.ndarray) -> Voxelwise:
    """Statistics of class probabilities against the true classes.

    Args:
        channels: (z, y, x) probabilities in [0, 1] of each class, at least two.
        truth: (z, y, x) integers; voxels with no class have the probability 0 of the true one.
    """
    confidence, true_probability, squares, entropy = (np.zeros(truth.shape, np.float32) for _ in range(4))
    likeliest = np.zeros(truth.shape, np.uint16)
    classes = 0
    for label, p in enumerate(channels):
        likeliest[p > confidence] = label
        np.maximum(confidence, p, out=confidence)
        np.copyto(true_probability, p, where=truth == label)
        squares += p * p
        entropy += _entropy_term(p)
        classes += 1
    return Voxelwise(confidence, likeliest == truth, true_probability, squares, entropy / np.float32(np.log(classes)))


def region_statistics(channels: Iterable[np.ndarray], truths: Iterable[np.ndarray]) -> Iterator[Voxelwise]:
    """Statistics of one region after the other, each as a two-class problem: in the region or not.

    Args:
        channels: (z, y, x) probabilities of each region.
        truths: (z, y, x) bool, the voxels in each region.
    """
    return (class_statistics((1 - p, p), inside.astype(np.uint8)) for p, inside in zip(channels, truths, strict=True))


class Calibration:
    """Calibration metrics, summed over the voxels of any number of classification problems."""

    def __init__(self) -> None:
        self.voxels, self.log_likelihood, self.squared_error = 0, 0.0, 0.0
        self.bins, self.cells = reliability(np.zeros(0), np.zeros(0, bool)), Cells()

    def add(self, problem: Voxelwise) -> None:
        """Some voxels, each field as one axis."""
        if number := len(problem.confidence):
            self.voxels += number
            self.log_likelihood -= number * problem.negative_log_likelihood
            self.squared_error += number * problem.brier
            self.bins += reliability(problem.confidence, problem.correct)
            self.cells.add(problem.confidence, problem.correct)

    @property
    def metrics(self) -> dict[str, float]:
        """NLL, Brier score, ECE and adaptive ECE; at least one voxel must have been added."""
        return {'nll': -self.log_likelihood / self.voxels, 'brier': self.squared_error / self.voxels,
                'ece': self.bins.expected_calibration_error, 'adaptive_ece': self.cells.adaptive_calibration_error()}


def _entropy_term(p: np.ndarray) -> np.ndarray:
    clipped = np.clip(p, SMALLEST_PROBABILITY, 1)
    return -clipped * np.log(clipped)


def stored_shape(file: Path) -> tuple[int, ...]:
    """Shape of the array `probabilities` in an npz; raises KeyError, ValueError or zipfile.BadZipFile without one."""
    with zipfile.ZipFile(file) as archive, archive.open('probabilities.npy') as stream:
        return _header(stream)[0]


def stored_channels(file: Path) -> Iterator[np.ndarray]:
    """The array `probabilities` (C, z, y, x) in an npz, float32, one channel after the other.

    Raises:
        ValueError: if the file ends early.
    """
    with zipfile.ZipFile(file) as archive, archive.open('probabilities.npy') as stream:
        shape, fortran, dtype = _header(stream)
        if fortran:  # nnU-Net never writes it
            with np.load(file) as content:
                yield from content['probabilities'].astype(np.float32)
            return
        for _ in range(shape[0]):
            content_of_one = stream.read(int(np.prod(shape[1:])) * dtype.itemsize)
            yield np.frombuffer(content_of_one, dtype).reshape(shape[1:]).astype(np.float32)


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in read:
        raise ValueError(f'a format of arrays {version} that is not known')
    return read[version](stream)
