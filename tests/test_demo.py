"""The demo's parts: phantoms, table and picture. The demo itself is `make demo`."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from nnunet_pdddpm.demo.phantom import ORIGIN, SPACING, make_case, oblique_direction, write_dataset
from nnunet_pdddpm.demo.report import draw_figure, entropy, format_table, mean_dice


def test_phantoms_are_seeded_nested_and_lie_obliquely(tmp_path):
    write_dataset(tmp_path / 'one', num_training=2, num_test=1, shape=(16, 20, 18), seed=3)
    write_dataset(tmp_path / 'other', num_training=2, num_test=1, shape=(16, 20, 18), seed=3)
    files = sorted(p.relative_to(tmp_path / 'one') for p in (tmp_path / 'one').rglob('*.nii.gz'))
    assert len(files) == 6
    for file in files:
        one, other = (sitk.ReadImage(str(tmp_path / name / file)) for name in ('one', 'other'))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))
        assert one.GetSpacing() == pytest.approx(SPACING, abs=1e-5)
        assert one.GetOrigin() == pytest.approx(ORIGIN, abs=1e-4)
        assert one.GetDirection() == pytest.approx(oblique_direction(), abs=1e-5)
    assert json.loads((tmp_path / 'one' / 'dataset.json').read_text())['numTraining'] == 2
    image, labels = make_case((24, 30, 28), seed=5)
    assert set(np.unique(labels)) == {0, 1, 2}
    neighbours = np.stack([np.roll(labels, shift, axis) for axis in range(3) for shift in (-1, 1)])
    assert (neighbours[:, labels == 2] > 0).mean() > 0.95  # the lesion lies within the organ
    assert image[labels == 2].mean() > image[labels == 1].mean() > image[labels == 0].mean()


def test_table_and_picture_are_made_from_predictions(tmp_path):
    raw, predictions = tmp_path / 'raw', tmp_path / 'predictions'
    write_dataset(raw, num_training=0, num_test=2, shape=(16, 20, 18))
    shutil.copytree(raw / 'labelsTs', predictions / 'stock')
    (predictions / 'pdddpm').mkdir()
    expected = []
    for file in sorted((raw / 'labelsTs').iterdir()):
        truth = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(truth)
        shifted = np.roll(array, 1, 2)
        expected.append([2 * ((array == label) & (shifted == label)).sum() / ((array == label).sum() * 2)
                         for label in (1, 2)])
        image = sitk.GetImageFromArray(shifted)
        image.CopyInformation(truth)
        sitk.WriteImage(image, str(predictions / 'pdddpm' / file.name))
        np.savez(predictions / 'pdddpm' / file.name.replace('.nii.gz', '.npz'),
                 probabilities=np.full((3, *array.shape), 1 / 3))
    labels = {'organ': 1, 'lesion': 2}
    dice = {name: mean_dice(raw / 'labelsTs', predictions / name, labels) for name in ('stock', 'pdddpm')}
    assert dice['stock'] == {'organ': 1, 'lesion': 1, 'mean': 1}
    assert [dice['pdddpm'][name] for name in labels] == pytest.approx(np.mean(expected, 0))
    assert dice['pdddpm']['mean'] == pytest.approx(np.mean(expected))

    table = format_table({'dice': dice, 'seconds_per_case': {'stock': 1.0, 'pdddpm': 2.5}, 'cases': 2}).splitlines()
    assert table[1].split()[-4:] == ['1.0000', '1.0000', '1.0000', '1.0']
    assert table[2].split()[-4:] == [f'{value:.4f}' for value in dice['pdddpm'].values()] + ['2.5']
    draw_figure(raw, predictions, tmp_path / 'demo.png', num_cases=2)
    assert imread(tmp_path / 'demo.png').std() > 0.05


def test_entropy_is_0_where_certain_and_1_where_all_classes_are_equal():
    probabilities = np.array([[1, 0.5, 0.25], [0, 0.5, 0.25], [0, 0, 0.25], [0, 0, 0.25]])
    assert entropy(probabilities) == pytest.approx([0, 0.5, 1], abs=1e-6)
