"""Which files `nnUNetv2_pdddpm_evaluate` compares, and what it says of unusable ones."""
from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import LABELS, OUTPUTS, SHAPE, SPACING, Data, of_points, phantoms, write
from skimage import io

from nnunet_pdddpm.demo.phantom import oblique_direction
from nnunet_pdddpm.evaluation.cases import evaluate_case


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return phantoms(tmp_path)


def test_natural_images(tmp_path, capsys):
    data = Data(tmp_path, {}, {})
    data.pred.mkdir()
    data.ref.mkdir()
    data.describe({'background': 0, 'cell': 1}, file_ending='.png')
    masks = [np.zeros((30, 40), np.uint8) for _ in range(2)]
    masks[0][5:15, 5:25] = masks[1][8:18, 5:25] = 1
    for folder, mask in zip((data.ref, data.pred), masks, strict=True):
        io.imsave(folder / 'image.png', mask, check_contrast=False)
    of = data.evaluate()['cases'][0]['labels']['cell']
    assert (of['dice'], of['hd95_mm']) == (pytest.approx(0.7), 3)
    assert of['volume_ml'] == pytest.approx(0.2)


def test_no_diagram_lies_among_masks_that_are_png_files(tmp_path):
    data, mask = Data(tmp_path, {}, {}), of_points((30, 40), (5, 5), (6, 5))
    for folder in (data.ref, data.pred):
        folder.mkdir()
        io.imsave(folder / 'image.png', mask, check_contrast=False)
    data.describe({'background': 0, 'cell': 1}, file_ending='.png')
    np.savez_compressed(data.pred / 'image.npz', probabilities=np.stack([1 - mask, mask])[:, None].astype(np.float16))
    for _ in range(2):
        assert data.evaluate()['left_out'] == []
    assert [file.name for file in data.pred.glob('*.png')] == ['image.png'] and (data.pred / OUTPUTS[2]).is_file()


def test_the_command_with_two_processes_gives_the_same_files(data):
    data.add_probabilities()
    data.evaluate()
    command = [sys.executable, '-m', 'nnunet_pdddpm.commands.evaluate', '-pred', str(data.pred), '-ref', str(data.ref),
               '-np', '2', '-o', str(data.root / 'out' / 'deep'), '-djfile', str(data.pred / 'dataset.json'), '-pfile',
               str(data.pred / 'plans.json')]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert '5/5' in result.stderr  # the progress bar
    for name in OUTPUTS:
        assert (data.root / 'out' / 'deep' / name).read_bytes() == (data.pred / name).read_bytes()


def test_missing_predictions_are_refused_unless_chill(data):
    (data.pred / 'case_1.nii.gz').unlink()
    (data.pred / 'case_4.nii.gz').unlink()
    message = data.fails()
    assert '2 of 5 references (case_1, case_4)' in message and '--chill' in message
    assert [case['case'] for case in data.evaluate('--chill')['cases']] == ['case_0', 'case_2', 'case_3']


@pytest.mark.parametrize('which', ['case_2.nii.gz', 'uncertainty/case_2_uncertainty.nii.gz',
                                   'samples/case_2_s00.nii.gz', 'rater'])
@pytest.mark.parametrize('change', ['shape', 'spacing', 'origin', 'direction'])
def test_a_case_of_another_geometry_is_named_and_the_others_are_done(data, which, change):
    array = np.zeros(SHAPE if change != 'shape' else (*SHAPE[:2], SHAPE[2] + 1),
                     np.float32 if 'uncertainty' in which else np.uint8)
    file = data.raters / 'case_2__a.nii.gz' if which == 'rater' else data.pred / which
    write(file, array, spacing=(2.5, 1.0, 0.81) if change == 'spacing' else SPACING,
          origin=(3.0, -7.0, 11.5) if change == 'origin' else (3.0, -7.0, 11.0),
          direction=oblique_direction(21) if change == 'direction' else None)
    if which == 'rater':
        write(data.raters / 'case_0__a.nii.gz', data.references['case_0'])
    message, results = data.partly(raters=which == 'rater')
    assert f'differ in {change}' in message and str(file) in message and str(data.ref / 'case_2.nii.gz') in message
    assert [case['case'] for case in results['cases']] == ['case_0', 'case_1', 'case_3', 'case_4']


def test_rounding_of_the_geometry_is_accepted(data):
    write(data.pred / 'case_2.nii.gz', data.predictions['case_2'], spacing=(2.5001, 1.0, 0.8),
          origin=(3.01, -7.0, 11.0), direction=oblique_direction(20.001))
    assert len(data.evaluate()['cases']) == 5


def unknown_label(data: Data) -> None:
    write(data.ref / 'case_0.nii.gz', data.references['case_0'] * 4)


def fractional_label(data: Data) -> None:
    write(data.pred / 'case_0.nii.gz', data.predictions['case_0'] * np.float32(0.5))


def almost_a_label(data: Data) -> None:
    write(data.ref / 'case_0.nii.gz', data.references['case_0'] * np.float32(0.9999999))


def not_finite(which: str, value: float) -> Callable[[Data], None]:
    def spoil(data: Data) -> None:
        mask = data.references['case_0'].astype(np.float32)
        mask[1, 2, 3:5] = value
        write(data.root / which / 'case_0.nii.gz', mask)
    return spoil


def damaged(name: str) -> Callable[[Data], None]:
    return lambda data: (data.pred / name).write_bytes(b'damaged') and None


def truncated(name: str) -> Callable[[Data], None]:
    return lambda data: (data.pred / name).write_bytes((data.pred / name).read_bytes()[:-30]) and None


def npz(array: np.ndarray, key: str = 'probabilities') -> Callable[[Data], None]:
    return lambda data: np.savez(data.pred / 'case_0.npz', **{key: array})


def rater_of_another_case(data: Data) -> None:
    write(data.raters / 'other__1.nii.gz', data.references['case_0'])


@pytest.mark.parametrize(('damage', 'words'), [
    (unknown_label, ['ref/case_0.nii.gz', 'label values such as 4', '(0, 1, 2)', '-djfile']),
    (fractional_label, ['pred/case_0.nii.gz', 'label values such as 0.5']),
    (almost_a_label, ['ref/case_0.nii.gz', 'label values such as 0.9999999 that']),
    (not_finite('ref', np.nan), ['ref/case_0.nii.gz: 2 of 4032 voxels are NaN or infinite']),
    (not_finite('ref', np.inf), ['ref/case_0.nii.gz: 2 of 4032 voxels are NaN or infinite']),
    (not_finite('pred', np.nan), ['pred/case_0.nii.gz: 2 of 4032 voxels are NaN or infinite']),
    (damaged('case_0.nii.gz'), ['pred/case_0.nii.gz cannot be read']),
    (truncated('case_0.nii.gz'), ['pred/case_0.nii.gz cannot be read: it is truncated']),
    (damaged('../ref/case_0.nii.gz'), ['ref/case_0.nii.gz cannot be read']),  # by which the reader is chosen
    (truncated('../ref/case_0.nii.gz'), ['ref/case_0.nii.gz cannot be read: it is truncated']),
    (lambda data: (data.ref / 'case_0.nii.gz').write_bytes(b''), ['ref/case_0.nii.gz cannot be read: it is empty']),
    (damaged('case_0.npz'), ['pred/case_0.npz is not what --save_probabilities writes']),
    (npz(np.zeros((3, *SHAPE)), 'softmax'), ['pred/case_0.npz is not what --save_probabilities writes']),
    (npz(np.zeros((4, *SHAPE))), ['(4, 14, 18, 16)', 'need (3, 14, 18, 16)', 'predict the case again']),
    (npz(np.full((3, *SHAPE), 1.5)), ['pred/case_0.npz has values outside of 0 to 1']),
    (npz(np.full((3, *SHAPE), np.nan)), ['pred/case_0.npz has values outside of 0 to 1']),
])
def test_a_case_with_an_unusable_file_is_named_with_its_reason_and_the_others_are_done(data, damage, words):
    of_all = {case['case']: case for case in data.evaluate()['cases']}
    damage(data)
    message, results = data.partly()
    assert message.startswith('Error: 1 of 5 cases could not be evaluated, the others are done: '
                              'case_0 (')
    assert all(word in message for word in words), message
    assert results['num_cases'] == 4 and results['cases'] == [of_all[f'case_{i}'] for i in range(1, 5)]
    failed, = results['failed']
    assert failed['case'] == 'case_0' and all(word in failed['error'] for word in words)
    rows = list(csv.DictReader((data.pred / 'evaluation.csv').open(newline='')))
    assert [row['error'] for row in rows] == [''] * 8 + [failed['error']] and rows[-1]['case'] == 'case_0'


def test_bad_cases_are_named_by_background_processes_too(data):
    unknown_label(data)
    (data.pred / 'case_3.nii.gz').write_bytes(b'')
    message, results = data.partly('-np', '2')
    assert '2 of 5 cases' in message and 'case_0 (' in message
    assert 'case_3.nii.gz cannot be read: it is empty)' in message
    assert [case['case'] for case in results['cases']] == ['case_1', 'case_2', 'case_4']


def test_where_no_case_can_be_evaluated_nothing_is_written(data):
    for case, array in data.references.items():
        write(data.ref / f'{case}.nii.gz', array * 4)
    message = data.fails()
    assert 'ref/case_0.nii.gz has label values such as 4' in message
    assert message.endswith('The other 4 cases cannot be evaluated either.')
    for case in data.references:
        (data.ref / f'{case}.nii.gz').write_bytes(b'')
    assert data.fails().endswith("None of nnU-Net's readers can read "
                                 f'{data.ref / "case_0.nii.gz"}, nor another of the references.')


def test_a_case_that_memory_is_not_enough_for_fails_alone(data, monkeypatch):
    def too_large(folders, case: str, tolerance: float):
        if case == 'case_3':
            raise MemoryError('Unable to allocate 90 GiB')
        return evaluate_case(folders, case, tolerance)
    monkeypatch.setattr('nnunet_pdddpm.evaluation.evaluate.evaluate_case', too_large)
    message, results = data.partly()
    assert message.startswith('Error: 1 of 5 cases could not be evaluated, the others are done: case_3 (there is not '
                              'enough memory for it: ')
    assert [case['case'] for case in results['cases']] == ['case_0', 'case_1', 'case_2', 'case_4']


def test_an_error_of_the_program_is_none_of_a_case(data, monkeypatch):
    def wrong(*args):
        raise KeyError('of the program')
    monkeypatch.setattr('nnunet_pdddpm.evaluation.cases.hd95_and_surface_dice', wrong)
    with pytest.raises(KeyError, match='of the program'):
        data.evaluate()


@pytest.mark.parametrize(('damage', 'words'), [
    (damaged('pdddpm_summary.json'), ['pred/pdddpm_summary.json is empty or damaged: predict again']),
    (lambda data: (data.pred / 'pdddpm_summary.json').write_text(''), ['pdddpm_summary.json is empty or damaged']),
    (lambda data: (data.pred / 'pdddpm_summary.json').write_text('{}'), [
        'pdddpm_summary.json is not what nnUNetv2_pdddpm_predict writes']),
    (damaged('dataset.json'), ['pred/dataset.json is empty or damaged', '-djfile']),
    (damaged('plans.json'), ['pred/plans.json is empty or damaged', '-pfile']),
    (lambda data: (data.pred / 'dataset.json').write_text('{}'), ['do not fit together', '-djfile']),
    (lambda data: (data.pred / 'dataset.json').write_text('[]'), ['not a dataset of nnU-Net', '-djfile']),
    (lambda data: data.describe({'background': 0, 'organ': 'one'}), ['do not fit together', '-djfile']),
    (lambda data: data.describe({'background': 0, 'organ': 1, 'lesion': []}), ['do not fit together', '-djfile']),
    (lambda data: data.describe({'background': 0, 'organ': 1, 'lesion': {}}), ['do not fit together', '-djfile']),
    (lambda data: data.describe(LABELS, file_ending='.nrrd'), ['have no *.nrrd files of the same name']),
])
def test_unusable_input_is_refused_in_one_sentence(data, damage, words):
    damage(data)
    message = data.fails()
    assert all(word in message for word in words), message


APPLE = bytes([0, 5, 22, 7, 0, 2, 0, 0]) + b'Mac OS X        '


def test_masks_that_are_not_compared_are_named_and_what_macos_writes_beside_files_is_none(data, capsys):
    of_all = data.evaluate()['mean']
    for folder in (data.ref, data.pred):
        (folder / '._case_0.nii.gz').write_bytes(APPLE)
    for name in ('case_0.nii', 'case_1.NII.GZ', 'case_9.nrrd'):
        write(data.root / name.lower(), data.references['case_0'])
        (data.root / name.lower()).rename(data.ref / name)
    write(data.pred / 'other.nii.gz', data.references['case_0'])
    write(data.raters / 'case_0__1.nii.gz', data.references['case_0'])
    write(data.raters / 'case0__1.nii.gz', data.references['case_0'])
    capsys.readouterr()
    results = data.evaluate(raters=True)
    said = [f'3 files in {data.ref} do not end in .nii.gz: case_0.nii, case_1.NII.GZ, case_9.nrrd',
            f'1 masks in {data.raters} belong to no reference: case0__1.nii.gz',
            f'1 masks in {data.pred} have no reference: other.nii.gz']
    assert results['left_out'] == said
    assert [line for line in capsys.readouterr().out.splitlines() if 'Not compared' in line] == [
        f'Not compared: {line}' for line in said]
    assert results['num_cases'] == 5 and results['mean']['organ']['dice'] == of_all['organ']['dice']


@pytest.mark.parametrize(('rater', 'name'), [
    ('case_0__b__r1', 'case_0, by b__r1'), ('case_1__dr__smith', 'case_1, by dr__smith'),
    ('case_2____', 'case_2, by __')])
def test_a_rater_whose_name_holds_the_separator_is_told_in_one_line(data, capsys, rater, name):
    write(data.raters / 'case_4__1.nii.gz', data.references['case_4'])
    assert data.evaluate(raters=True)['doubtful'] == []
    write(data.raters / f'{rater}.nii.gz', data.references['case_0'])
    capsys.readouterr()
    results = data.evaluate(raters=True)
    said = (f'1 masks in {data.raters} have a rater with __ in the name, unless a reference is missing: {rater}.nii.gz '
            f'(of {name})')
    assert results['doubtful'] == [said]
    assert [line for line in capsys.readouterr().out.splitlines() if 'rater with __' in line] == [
        f'Look at this: {said}']


def test_unusable_folders_are_refused_in_one_sentence(data):
    assert f'There is no folder {data.root / "x"}.' in data.fails('-ref', str(data.root / 'x'))
    assert f'There is no folder {data.raters}.' in data.fails(raters=True)
    rater_of_another_case(data)
    assert 'CASE__RATER.nii.gz, such as case_0__1.nii.gz' in data.fails(raters=True)
    assert 'dataset.json cannot be read' in data.fails('-djfile', str(data.root / 'dataset.json'))
    assert str(data.pred / 'case_0.nii.gz') in data.fails('-o', str(data.pred / 'case_0.nii.gz'))


@pytest.mark.parametrize('flags', [['-np', '0'], ['-nsd_tolerance', '-1'], ['-nsd_tolerance', 'nan']])
def test_settings_out_of_range_are_refused(data, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        data.evaluate(*flags)
    assert stop.value.code == 2
    assert f'{flags[0]} must be' in capsys.readouterr().err
