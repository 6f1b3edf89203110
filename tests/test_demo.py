"""The demo's parts: phantoms, table and picture. The demo itself is `make demo`."""
from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.image import imread

from nnunet_pdddpm.commands.demo import NUM_VALIDATION, Demo
from nnunet_pdddpm.demo.phantom import ORIGIN, SPACING, make_case, oblique_direction, write_dataset
from nnunet_pdddpm.demo.report import dice_of_cases, draw_figure, format_table, mean_dice, volume_lines
from nnunet_pdddpm.inference.intervals import COVERAGE, attainable_level
from nnunet_pdddpm.logs import PACKAGE, log_to_console


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


def test_the_demo_has_enough_validation_cases_for_intervals_of_95_percent():
    assert attainable_level(NUM_VALIDATION) == COVERAGE


def test_progress_reaches_the_console_and_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('nnUNet_pdddpm_steps', '5')
    monkeypatch.setattr(PACKAGE, 'handlers', [])
    log_to_console()
    program = 'import os; print("Epoch 0", *sorted(k for k in os.environ if "pdddpm" in k)); print("more")'
    Demo(tmp_path, 'cpu').call('training', 'python', '-c', program, echo=('Epoch ',))
    log = tmp_path / 'logs' / 'training.log'
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith('$ python -c') and str(log) in shown[0]
    assert shown[1:] == ['    Epoch 0 nnUNet_pdddpm_presegmenter']
    assert log.read_text().splitlines()[1] == 'more'


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
        uncertainty = predictions / 'samples' / 'uncertainty' / file.name.replace('.nii.gz', '_uncertainty.nii.gz')
        uncertainty.parent.mkdir(parents=True, exist_ok=True)
        sample = predictions / 'samples' / 'samples' / file.name.replace('.nii.gz', '_s00.nii.gz')
        sample.parent.mkdir(exist_ok=True)
        for path in (sample, predictions / 'samples' / file.name):
            sitk.WriteImage(image, str(path))
        sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32) / 2, str(uncertainty))
    labels = {'organ': 1, 'lesion': 2}
    dice = {name: mean_dice(raw / 'labelsTs', predictions / name, labels) for name in ('stock', 'pdddpm')}
    assert dice['stock'] == {'organ': 1, 'lesion': 1, 'mean': 1}
    assert [dice['pdddpm'][name] for name in labels] == pytest.approx(np.mean(expected, 0))
    assert dice['pdddpm']['mean'] == pytest.approx(np.mean(expected))

    dice['samples'] = dice['pdddpm']
    seconds = {'stock': 1.0, 'pdddpm': 2.5, 'samples': 3.5}
    table = format_table({'dice': dice, 'seconds_per_case': seconds, 'cases': 2}, 16).splitlines()
    assert table[1].split()[-4:] == ['1.0000', '1.0000', '1.0000', '1.0']
    assert table[2].split()[-4:] == [f'{value:.4f}' for value in dice['pdddpm'].values()] + ['2.5']
    assert table[3].startswith('the same, 16 samples ') and '--control' in table[-1]
    with_control = format_table({'dice': {**dice, 'longer': dice['stock']}, 'cases': 2,
                                 'seconds_per_case': {**seconds, 'longer': 1.1}}, 16).splitlines()
    assert with_control[2].split() == ['stock', 'trained', 'longer', '1.0000', '1.0000', '1.0000', '1.1']
    assert not any('--control' in line for line in with_control)
    mean_dice(raw / 'labelsTs', predictions / 'samples', labels)
    assert dice_of_cases(predictions / 'samples') == pytest.approx(
        dict(zip(('phantom_000', 'phantom_001'), np.mean(expected, 1), strict=True)))
    draw_figure(raw, predictions, tmp_path / 'demo.png', labels, num_cases=2)
    assert imread(tmp_path / 'demo.png').std() > 0.05


def test_volumes_stand_beside_the_true_ones(tmp_path):
    write_dataset(tmp_path / 'raw', num_training=0, num_test=1, shape=(16, 20, 18))
    row = {'volume_ml': 12.3, 'volume_ml_low': 0.1, 'volume_ml_high': 13.9, 'interval_level': 0.95,
           'samples_low_ml': 12.0, 'samples_high_ml': 12.5}
    other = {**row, 'volume_ml_low': None, 'volume_ml_high': None, 'interval_level': None}
    summary = {'cases': [{'case': 'phantom_000', 'num_samples': 8, 'labels': {'organ': row, 'lesion': other}}]}
    (tmp_path / 'pdddpm_summary.json').write_text(json.dumps(summary))
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / 'raw' / 'labelsTs' / 'phantom_000.nii.gz')))
    title, line, of_lesion, inside = volume_lines(tmp_path, tmp_path / 'raw' / 'labelsTs', {'organ': 1, 'lesion': 2})
    assert 'calibrated interval' in title and 'range of 8 samples' in title
    assert '12.30   95 %: 0.10 to 13.90' in line and '12.00 to 12.50' in line
    assert '12.30   none' in of_lesion and '95 %' not in of_lesion
    assert inside == 'The true volume is in 1 of 1 calibrated intervals, and in 0 of 2 ranges of 8 samples.'
    assert float(line.split()[-1]) == pytest.approx((truth == 1).sum() * np.prod(SPACING) / 1000, abs=0.006)
