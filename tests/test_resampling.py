"""Samples in the grid of the image: nnU-Net's own masks, at a cost that does not grow with the number of classes."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter
from tiny_model import plans

from nnunet_pdddpm.inference import resampling
from nnunet_pdddpm.inference.export import CaseExport, Outputs

# network's grid, crop of the image in nnU-Net's order of axes, spacing of the image in the image's order
GRIDS = {'finer': ((14, 18, 16), (19, 26, 21), (0.7, 0.8, 0.7)),
         'coarser': ((20, 18, 16), (13, 11, 24), (1.6, 0.7, 1.5)),
         'thick slices': ((14, 18, 16), (7, 26, 21), (0.6, 5.0, 0.7)),
         'as it is': ((9, 8, 7), (9, 8, 7), (1.0, 1.0, 1.0)),
         'one slice': ((1, 18, 16), (1, 26, 21), (0.6, 999.0, 0.7))}


def export_of(classes, old, new, spacing, regions=False, order=1, slices=False):
    """With a crop, and axes in another order than the image's."""
    of_all = plans('SimpleITKIO', 2 if slices else 3, 1)
    of_all.update(transpose_forward=[1, 0, 2], transpose_backward=[1, 0, 2])
    (configuration, values), = of_all['configurations'].items()
    values['resampling_fn_probabilities_kwargs']['order'] = order
    labels = {'background': 0, **{f'label {i}': [*range(i, classes + 1)] if regions else i
                                  for i in range(1, classes + regions)}}
    description = {'labels': labels, 'channel_names': {'0': 'image'}, 'file_ending': '.nii.gz',
                   **({'regions_class_order': [*range(1, classes + 1)]} if regions else {})}
    manager = PlansManager(of_all)
    properties = {'spacing': list(spacing), 'shape_before_cropping': tuple(n + 5 for n in new),
                  'shape_after_cropping_and_before_resampling': new,
                  'bbox_used_for_cropping': [[2, 2 + n] for n in new]}
    return CaseExport(manager, manager.get_configuration(configuration), description, properties, Path(), 'case',
                      Outputs())


def logits_of(classes, shape, present=None, regions=False, smooth=2.0):
    """Smooth ones; from class `present` on such as win nowhere."""
    values = 30 * gaussian_filter(np.random.default_rng(0).normal(size=(classes, *shape)), (0, *[smooth] * 3))
    if present is not None:
        values[present:] -= 1000 if regions else np.maximum(values[present:] - values[:present].max(0), 0) + 0.25
    return (values if regions else values - values.max(0)).clip(-13.8, 13.8).astype(np.float16)


@pytest.mark.parametrize('present', [None, 3], ids=['all labels', 'three labels'])
@pytest.mark.parametrize('classes', [2, 25])
@pytest.mark.parametrize('grid', GRIDS)
def test_a_sample_is_written_as_nnunet_resamples_it(grid, classes, present):
    export, logits = export_of(classes, *GRIDS[grid]), logits_of(classes, GRIDS[grid][0], present)
    found, expected = export.sample_segmentation(logits), export.segmentation(logits)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize('grid', GRIDS)
def test_a_sample_of_regions_is_written_as_nnunet_resamples_it(grid):
    export, logits = export_of(5, *GRIDS[grid], regions=True), logits_of(5, GRIDS[grid][0], 4, regions=True)
    found, expected = export.sample_segmentation(logits), export.segmentation(logits)
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert len(np.unique(found)) == 5


def test_a_label_between_two_others_is_found_as_nnunet_finds_it():
    """It wins at no voxel of the network's grid, and between them."""
    logits = np.full((5, 2, 2, 2), -13.0, np.float16)
    logits[:2] = [[[[0, 0], [-12, -12]]] * 2, [[[-12, -12], [0, 0]]] * 2]
    logits[4] = -1
    export = export_of(5, (2, 2, 2), (3, 5, 4), (0.4, 0.6, 0.5))
    found = export.sample_segmentation(logits)
    assert np.array_equal(found, export.segmentation(logits))
    assert set(np.unique(found)) == {0, 1, 4}


def test_slices_and_other_resampling_are_nnunets_own():
    logits = logits_of(3, (6, 18, 16))
    for export in (export_of(3, (6, 18, 16), (6, 26, 21), (0.6, 5.0, 0.7), slices=True),
                   export_of(3, (6, 18, 16), (9, 26, 21), (0.7, 0.7, 0.7), order=3)):
        assert np.array_equal(export.sample_segmentation(logits), export.segmentation(logits))


def test_mask_and_maps_are_the_same_with_nnunets_file_of_probabilities_and_without(tmp_path):
    old, new, spacing = GRIDS['finer']
    written, logits = [], logits_of(3, old)
    export = export_of(3, old, new, spacing)
    sitk_stuff = {'spacing': spacing[::-1], 'origin': [0.0] * 3, 'direction': np.eye(3).ravel().tolist()}
    export.properties.update(sitk_stuff=sitk_stuff)
    for probabilities in (True, False):
        folder = tmp_path / str(probabilities)
        folder.mkdir()
        counted = replace(export, folder=folder, outputs=Outputs(probabilities, 'all')).write_prediction(
            logits, None, {'uncertainty': np.full(old, 0.5, np.float16)})
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob('*') if file.is_file()}
        assert [f'case.{ending}' in files for ending in ('npz', 'pkl')] == [probabilities] * 2
        written.append((counted, {name: of for name, of in files.items() if name.endswith('.nii.gz')}))
    assert written[0] == written[1] and len(written[0][1]) == 4  # mask, uncertainty, two labels


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
def test_what_is_interpolated_does_not_depend_on_the_number_of_classes(monkeypatch, regions):
    """Counted in values of one channel at one voxel, of samples in which three labels meet."""
    interpolated, counted, shape, new = resampling.interpolated, {}, (32, 32, 32), (40, 40, 40)
    of_three = logits_of(3, shape, regions=regions, smooth=6.0)
    for classes in (3, 25, 117):
        values = np.full((classes, *shape), -13, np.float16)
        values[:3] = of_three
        export, seen = export_of(classes, shape, new, (0.8,) * 3, regions), []
        monkeypatch.setattr(resampling, 'interpolated', lambda logits, channels, points, axes, seen=seen: (
            seen.append(len(channels) * len(points[0])), interpolated(logits, channels, points, axes))[1])
        assert len(np.unique(export.sample_segmentation(values))) > 2
        counted[classes] = sum(seen)
    assert counted[117] == counted[25] <= 4 / 3 * counted[3]  # one channel more, of those that win nowhere
    assert 0 < counted[117] < 0.01 * 117 * np.prod(new)
