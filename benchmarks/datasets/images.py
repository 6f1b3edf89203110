"""Sets of 2D images with several masks each: what the benchmarks of samples need of one."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from nnunet import Dataset
from skimage import io  # reads and writes as nnU-Net does


@dataclass(frozen=True)
class Image:
    """One image and the masks that are known of it."""
    name: str
    pixels: np.ndarray
    """(Y, X)"""
    masks: np.ndarray
    """(m, Y, X) bool: the raters', or one draw of the truth."""
    known: Any = None
    """Distribution of the masks, of a phantom."""


class ImageSet(Protocol):
    """Images to validate and test on."""
    title: str
    dataset: Dataset
    kind: str
    """Of rows in `rows.toml`: phantom or raters."""
    samples: int
    """Masks that are drawn of an image."""
    whole: bool
    """Whether images are predicted in one tile, whatever the patches of training."""
    networks: tuple[str, ...]
    """That are trained."""

    def prepare(self, work: Path, data: str | None) -> None:
        """A raw data set, planned and preprocessed."""

    def validation(self, work: Path, fold: int) -> Sequence[Image]:
        """On which temperatures and the like are fitted."""

    def tests(self, data: str | None) -> Mapping[str, Sequence[Image]]:
        """Name in the names of files -> images."""

    def tune(self, work: Path, fold: int) -> None:
        """Choose the settings, if the benchmark has a row of them."""


def write_cases(raw: Path, cases: Iterable[tuple[str, np.ndarray, np.ndarray]]) -> list[str]:
    """Images and masks as nnU-Net's raw data; returns the names."""
    names = []
    for folder in ('imagesTr', 'labelsTr'):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for name, pixels, mask in cases:
        names.append(name)
        io.imsave(raw / 'imagesTr' / f'{name}_0000.png', pixels.astype(np.uint8), check_contrast=False)
        io.imsave(raw / 'labelsTr' / f'{name}.png', mask.astype(np.uint8), check_contrast=False)
    return names


def description(label: str, number: int) -> dict[str, Any]:
    """dataset.json of so many grey images with one label."""
    return {'channel_names': {'0': 'grey'}, 'labels': {'background': 0, label: 1}, 'numTraining': number,
            'file_ending': '.png'}
