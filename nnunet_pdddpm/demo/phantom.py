"""A phantom data set in nnU-Net's raw format: seeded, no download, hard enough that a network makes mistakes.

Each case is an irregular organ (label 1) with an irregular lesion in it (label 2, nested) and a thin curved vessel
that leaves it (label 1). The image is their intensities, close to each other and to the background's, blurred by a
point-spread function, shaded by a smooth bias field, and noisy. Spacing is anisotropic, the direction oblique.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

LABELS = {'background': 0, 'organ': 1, 'lesion': 2}
SPACING = (0.9, 1.1, 1.4)
"""Voxel spacing in mm, in SimpleITK's order x, y, z."""
ORIGIN = (-31.5, 12.25, 40.0)


def oblique_direction(degrees: float = 20.0) -> tuple[float, ...]:
    """Direction matrix, row by row, of a rotation about z."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0)


def _smooth_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    field = gaussian_filter(rng.standard_normal(shape), sigma, mode='wrap')
    return field / field.std()


def make_case(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One phantom.

    Args:
        shape: (z, y, x) voxels.
        seed: the same seed gives the same case.

    Returns:
        Image (z, y, x) float32 and label map (z, y, x) uint8 with labels 0, 1 and 2.
    """
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing='ij')
    centre = rng.uniform(-0.15, 0.15, 3)
    radii = rng.uniform(0.45, 0.62, 3)
    wobble = 0.13 * _smooth_noise(shape, min(shape) / 9, rng)
    distance = np.sqrt(sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True))) + wobble
    organ = distance < 1
    offset = rng.uniform(-0.2, 0.2, 3)
    lesion_distance = np.sqrt(sum(((g - c - o) / (0.42 * r)) ** 2
                                  for g, c, o, r in zip(grid, centre, offset, radii, strict=True)))
    lesion = organ & (distance < 0.85) & (lesion_distance + 1.3 * wobble < 1)

    z, y, x = grid
    bend, phase = rng.uniform(0.15, 0.3), rng.uniform(0, 2 * math.pi)
    vessel = np.hypot(y - centre[1] - bend * np.sin(4 * z + phase), x - centre[2] - bend * np.cos(3 * z + phase))
    organ |= (vessel < 0.09) & (z > centre[0])

    labels = organ.astype(np.uint8)
    labels[lesion] = 2
    intensity = np.array([0.0, 1.0, 1.7])[labels]
    image = gaussian_filter(intensity, 1.1) + 0.3 * _smooth_noise(shape, min(shape) / 4, rng)
    image += 0.4 * rng.standard_normal(shape)
    return (100 + 40 * image).astype(np.float32), labels


def write_image(array: np.ndarray, file: Path) -> None:
    """Write (z, y, x) voxels as NIfTI with the phantoms' spacing, origin and direction."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    image.SetDirection(oblique_direction())
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file), useCompression=True)


def write_dataset(folder: Path, num_training: int, num_test: int, shape: tuple[int, ...] = (28, 38, 32),
                  seed: int = 1) -> None:
    """Write a raw data set: imagesTr and labelsTr, held-out cases in imagesTs and labelsTs, dataset.json.

    Args:
        folder: `nnUNet_raw/DatasetXXX_Name`.
        num_training: cases for nnU-Net's folds.
        num_test: held-out cases.
        shape: mean (z, y, x) size; every case deviates from it by up to three voxels an axis.
        seed: the same seed gives the same files.
    """
    sizes = np.random.default_rng(seed)
    for i in range(num_training + num_test):
        part = 'Tr' if i < num_training else 'Ts'
        size = tuple(int(n) for n in np.array(shape) + sizes.integers(-3, 4, 3))
        image, labels = make_case(size, 1000 * seed + i)
        write_image(image, folder / f'images{part}' / f'phantom_{i:03d}_0000.nii.gz')
        write_image(labels, folder / f'labels{part}' / f'phantom_{i:03d}.nii.gz')
    description = {'channel_names': {'0': 'phantom'}, 'labels': LABELS, 'numTraining': num_training,
                   'file_ending': '.nii.gz'}
    (folder / 'dataset.json').write_text(json.dumps(description, indent=1))
