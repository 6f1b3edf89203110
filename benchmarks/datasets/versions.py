"""Test cases of hippocampus and nuclei, each as it is and with artefacts."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from artefacts import FAMILIES, STRENGTHS
from nnunet import Dataset

from datasets.hippocampus import CHANNELS, HIPPOCAMPUS, names
from datasets.raters import RATER_SETS

CLEAN = 'clean'
Case = tuple[str, np.ndarray, np.ndarray, dict[str, Any]]
"""Name, image (C, Z, Y, X), truth (1, Z, Y, X), nnU-Net's properties."""


@dataclass(frozen=True)
class Subject:
    """Test cases, and the models that predict them."""
    name: str
    dataset: Dataset
    labels: dict[str, int]

    def tests(self, work: Path, data: str | None, predictor: Any) -> Iterator[Case]:
        """As nnU-Net reads them. Of nuclei the truth is what most experts say."""
        if self.dataset is HIPPOCAMPUS:
            reader, raw = predictor.plans_manager.image_reader_writer_class(), HIPPOCAMPUS.raw(work)
            for name in names(work):
                image, properties = reader.read_images([str(raw / 'imagesTs' / f'{name}_0000.nii.gz')])
                yield name, image, reader.read_seg(str(raw / 'labelsTs' / f'{name}.nii.gz'))[0], properties
        else:
            for image in RATER_SETS[self.name].tests(data)[RATER_SETS[self.name].label]:
                yield (image.name, np.round(image.pixels)[None, None].astype(np.float32),
                       (image.masks.mean(0) > 0.5)[None, None].astype(np.int8), {'spacing': (999, 1, 1)})


SUBJECTS = {'hippocampus': Subject('hippocampus', HIPPOCAMPUS, CHANNELS),
            'nuclei': Subject('nuclei', RATER_SETS['nuclei'].dataset, {'nucleus': 1})}


def versions() -> Iterator[tuple[str, int]]:
    """Family and strength of the versions of a test case: the clean one, and each family in each strength."""
    yield CLEAN, 0
    yield from product(FAMILIES, range(STRENGTHS))
