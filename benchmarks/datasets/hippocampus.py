"""The Medical Segmentation Decathlon's hippocampus: one truth an image, 50 test cases split off first."""
from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunet import NUM_FOLDS, Dataset

HIPPOCAMPUS = Dataset(4, 'Hippocampus', '3d_fullres', 'Benchmark', (16, 32, 64, 128), (('batch_size', 2),), (10, 4),
                      (250, 250), one_thread=False)
SPLIT_SEED, NUM_TEST = 2210, 50
CHANNELS = {'Anterior': 1, 'Posterior': 2}
"""Of its labels."""
VOXEL_ML = 1e-3
"""Images and the network's grid have voxels of 1 mm."""


def prepare(work: Path, data: Path, num_test: int = NUM_TEST, dataset: Dataset = HIPPOCAMPUS) -> None:
    """Split off test cases, write the raw data set of a `dataset`, plan, preprocess."""
    if dataset.is_prepared(work):
        return
    cases = sorted(p.name[:-len('.nii.gz')] for p in (data / 'labelsTr').glob('*.nii.gz'))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(cases))
    test, rest = {cases[i] for i in order[:num_test]}, [cases[i] for i in order[num_test:]]
    for case in cases:
        for kind, suffix in (('images', '_0000'), ('labels', '')):
            folder = dataset.raw(work) / (kind + ('Ts' if case in test else 'Tr'))
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / f'{kind}Tr' / f'{case}{suffix}.nii.gz', folder / f'{case}{suffix}.nii.gz')
    folds = [sorted(rest[fold::NUM_FOLDS]) for fold in range(NUM_FOLDS)]
    description = {**json.loads((data / 'dataset.json').read_text()), 'numTraining': len(rest)}
    dataset.plan(work, description, [(sorted({*rest} - {*fold}), fold) for fold in folds])


def names(work: Path, fold: int | None = None) -> Sequence[str]:
    """Of the test cases, or the validation cases of a fold."""
    if fold is not None:
        return HIPPOCAMPUS.splits(work)[fold]['val']
    return sorted(file.name[:-len('.nii.gz')] for file in (HIPPOCAMPUS.raw(work) / 'labelsTs').iterdir())
