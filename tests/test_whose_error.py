"""Whose an error is: what is raised for the files of one case fails that case, what is raised for any ends the run."""
from __future__ import annotations

import gzip
import json
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_model import plans, write_model

from nnunet_pdddpm.commands.predict import main_modelfolder
from nnunet_pdddpm.files import image_identity
from nnunet_pdddpm.image_files import damage
from nnunet_pdddpm.inference import predictor as predictor_module
from nnunet_pdddpm.inference import remarks
from nnunet_pdddpm.inference.preprocess import CasePreprocessor, FailedCase
from nnunet_pdddpm.network.checkpoint import CheckpointError, load_checkpoint
from nnunet_pdddpm.tuning.cases import ValidationCases

SHAPE = (8, 20, 22)
DESCRIPTION = {'channel_names': {'0': 'T1'}, 'file_ending': '.nii.gz', 'numTraining': 1,
               'labels': {'background': 0, 'cell': 1}}
NORMALISE = DefaultPreprocessor._normalize


def write(file: Path, high: float = 200) -> str:
    array = np.random.default_rng(0).uniform(0, high, SHAPE).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
    return str(file)


def preprocessor(dims: int = 3, transposed: tuple[int, ...] = (0, 1, 2), reader: str = 'SimpleITKIO', **changes: Any
                 ) -> CasePreprocessor:
    """`changes`: of the configuration in the plans."""
    content = plans(reader, dims, 1)
    content['transpose_forward'] = list(transposed)
    configuration, = content['configurations']
    content['configurations'][configuration].update(changes)
    manager = PlansManager(content)
    return CasePreprocessor(manager, manager.get_configuration(configuration), DESCRIPTION, False)


def fail_for_bright_images(error: Exception):
    def normalise(self, data, *args):
        if data.max() > 1e5:
            raise error
        return NORMALISE(self, data, *args)
    return normalise


@pytest.mark.parametrize('error', [IndexError('index 7 is out of bounds'), RuntimeError('singular matrix'),
                                   AssertionError('no voxels'), KeyError(0)])
@pytest.mark.parametrize(('dims', 'transposed'), [(3, (0, 1, 2)), (3, (2, 0, 1)), (2, (1, 0, 2))])
def test_whatever_the_preprocessor_raises_for_one_image_fails_that_case(tmp_path, monkeypatch, error, dims, transposed):
    monkeypatch.setattr(DefaultPreprocessor, '_normalize', fail_for_bright_images(error))
    preprocess = preprocessor(dims, transposed)
    failed = preprocess([write(tmp_path / 'bright_0000.nii.gz', 1e6)], None, 'out/bright')
    assert isinstance(failed, FailedCase)
    assert failed.reason.startswith('bright_0000.nii.gz cannot be preprocessed: ') and str(error) in failed.reason
    assert not isinstance(preprocess([write(tmp_path / 'a_0000.nii.gz')], None, 'out/a'), FailedCase)


def test_a_mask_of_the_previous_stage_that_does_not_fit_fails_its_case(tmp_path):
    previous = tmp_path / 'a.nii.gz'
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 20, 21), np.uint8)), str(previous))
    failed = preprocessor()([write(tmp_path / 'a_0000.nii.gz')], str(previous), 'out/a')
    assert isinstance(failed, FailedCase) and 'cannot be preprocessed: Shape mismatch' in failed.reason


@pytest.mark.parametrize('value', [7, 0.5, 300])
def test_a_mask_of_the_previous_stage_with_other_labels_fails_its_case(tmp_path, value):
    mask = np.zeros(SHAPE, np.float32)
    mask[3, 4:9, 5:9] = 1
    previous = str(tmp_path / 'a.nii.gz')
    sitk.WriteImage(sitk.GetImageFromArray(mask), previous)
    assert not isinstance(preprocessor()([write(tmp_path / 'a_0000.nii.gz')], previous, 'out/a'), FailedCase)
    mask[3, 4, 5] = value
    sitk.WriteImage(sitk.GetImageFromArray(mask), previous)
    failed = preprocessor()([write(tmp_path / 'a_0000.nii.gz')], previous, 'out/a')
    assert isinstance(failed, FailedCase)
    assert failed.reason == (f'a.nii.gz of the previous stage has label values such as {value} that the model does not '
                             f'know (0, 1)')


@pytest.mark.parametrize('changes', [
    {'normalization_schemes': ['NoSuchNormalization']}, {'resampling_fn_data': 'no_such_resampling'},
    {'resampling_fn_seg_kwargs': {'is_seg': True, 'no_such_argument': 1}}])
def test_what_the_preprocessor_raises_for_every_image_is_an_error_of_the_program(tmp_path, changes):
    file = write(tmp_path / 'a_0000.nii.gz')
    preprocess = preprocessor(**changes)
    with pytest.raises(Exception) as expected:
        preprocess.run_nnunet(np.ones((1, *SHAPE), np.float32), None, {'spacing': [1.5, 1, 1]})
    with pytest.raises(type(expected.value)) as raised:
        preprocess([file], None, 'out/a')
    assert str(raised.value) == str(expected.value)


def test_an_error_of_the_program_ends_the_run_and_calls_no_image_bad(tmp_path, monkeypatch):
    def wrong(*args):
        raise TypeError('of the program')
    monkeypatch.setattr(DefaultPreprocessor, '_normalize', wrong)
    with pytest.raises(TypeError, match='of the program'):
        run(tmp_path)
    assert not list((tmp_path / 'out').glob('pdddpm*'))


@pytest.mark.parametrize('name', ['_axes_problem', 'read_header'])
def test_an_error_in_the_remarks_is_none_of_the_image_but_for_the_reading(tmp_path, monkeypatch, name):
    def wrong(*args):
        raise TypeError('of the program')
    monkeypatch.setattr(remarks, name, wrong)
    file = write(tmp_path / 'a_0000.nii.gz')
    if name == 'read_header':
        assert 'of the program' in preprocessor()([file], None, 'out/a').reason
        return
    with pytest.raises(TypeError, match='of the program'):
        preprocessor()([file], None, 'out/a')


def test_a_truth_that_is_damaged_gives_no_volume_to_calibrate_by_and_is_told(tmp_path):
    cases, said = object.__new__(ValidationCases), []
    manager = PlansManager(plans('SimpleITKIO', 3, 1))
    cases.data, cases.log = SimpleNamespace(truth=tmp_path, dataset_json=DESCRIPTION), said.append
    cases.label_manager, cases._reader = manager.get_label_manager(DESCRIPTION), SimpleITKIO()
    cases.dataset = SimpleNamespace(load_case=lambda name: (None, None, None, {'spacing': [2.0, 1.0, 1.0]}))
    file = tmp_path / 'a.nii.gz'
    sitk.WriteImage(sitk.GetImageFromArray((np.random.default_rng(0).random(SHAPE) < 0.5).astype(np.uint8)), str(file))
    whole, array = file.read_bytes(), sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    assert cases.true_volumes('a') == {'cell': pytest.approx(array.sum() * 2 / 1000)} and said == []
    for content in (whole[:-40], b'', b'no image'):
        file.write_bytes(content)
        assert cases.true_volumes('a') is None
        assert said.pop().startswith(f'The true volume of a is not known: {file} is ')


@pytest.mark.parametrize('pickled', [b'\x80\x02.', b'\x80\x02h\x05.', b'\x80\x02K', b'\x80\x02X\x00', b''])
def test_whatever_loading_raises_for_a_checkpoint_lies_in_the_file(tmp_path, pickled):
    file, other = tmp_path / 'whole.pth', tmp_path / 'other.pth'
    torch.save({'network_weights': {}, 'init_args': {}, 'trainer_name': 'x'}, file)
    assert load_checkpoint(file)['trainer_name'] == 'x'
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(other, 'w') as copy:
        for entry in whole.infolist():
            copy.writestr(entry.filename, pickled if entry.filename.endswith('data.pkl') else whole.read(entry))
    with pytest.raises(CheckpointError, match=r'The stock model .*other.pth (cannot be read|holds objects)'):
        load_checkpoint(other)


def run(folder: Path, *flags: str) -> Path:
    """Predict two images with a model of random weights."""
    if not (folder / 'model').exists():
        write_model(folder / 'model', plans('SimpleITKIO', 3, 1), DESCRIPTION)
        (folder / 'images').mkdir()
        for case in 'ab':
            write(folder / 'images' / f'{case}_0000.nii.gz')
    main_modelfolder(['-m', str(folder / 'model'), '-i', str(folder / 'images'), '-o', str(folder / 'out'), '-f', '0',
                      '-device', 'cpu', '-nps', '0', '--disable_progress_bar', '--disable_tta', '-npp', '0', *flags])
    return folder / 'out'


def test_the_identity_of_an_image_is_taken_where_it_is_read(tmp_path, monkeypatch):
    def here(*args):
        raise AssertionError('in the main process')
    monkeypatch.setattr(predictor_module, 'image_identity', here)
    out = run(tmp_path)
    rows = json.loads((out / 'pdddpm_summary.json').read_text())['cases']
    assert {row['case']: row['image'] for row in rows} == {
        case: image_identity([str(tmp_path / 'images' / f'{case}_0000.nii.gz')]) for case in 'ab'}


def test_the_identity_of_an_image_holds_the_file_that_gives_its_voxel_size_and_no_other(tmp_path):
    image, previous = str(tmp_path / 'a_0000.tif'), str(tmp_path / 'a_0001.tif')  # of case a, and of a case a_0001
    for name in ('a_0000.tif', 'a_0001.tif', 'a.json', 'a_0001.json', 'a_0000.json'):
        (tmp_path / name).write_text(name)
    assert [of['file'] for of in image_identity([image])] == ['a_0000.tif', 'a.json']
    assert [of['file'] for of in image_identity([image], previous)] == [
        'a_0000.tif', 'a_0001.tif', 'a.json', 'a_0001.json']


# headers that hold any numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('ending', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_nifti_whose_voxels_begin_nowhere_is_damaged(tmp_path, ending, value):
    file = Path(write(tmp_path / f'a_0000{ending}'))
    zipped = ending == '.nii.gz'
    content = bytearray(gzip.decompress(file.read_bytes()) if zipped else file.read_bytes())
    struct.pack_into('<f', content, 108, value)
    file.write_bytes(gzip.compress(content) if zipped else content)
    assert damage(file).startswith('is truncated or damaged (')
    failed = preprocessor()([str(file)], None, 'out/a')
    assert isinstance(failed, FailedCase) and failed.reason.startswith(f'{file.name} is truncated or damaged (')


@pytest.mark.parametrize('entries', [2 ** 64 - 1, 2 ** 62, 2 ** 32])
def test_a_tif_with_more_entries_than_any_file_holds_is_damaged(tmp_path, entries):
    file = tmp_path / 'a_0000.tif'
    tifffile.imwrite(file, np.zeros(SHAPE, np.uint8), bigtiff=True)
    content = bytearray(file.read_bytes())
    first, = struct.unpack_from('<Q', content, 8)
    struct.pack_into('<Q', content, first, entries)
    file.write_bytes(content)
    assert damage(file).startswith('is truncated or damaged')
    failed = preprocessor(reader='Tiff3DIO')([str(file)], None, 'out/a')
    assert isinstance(failed, FailedCase) and failed.reason.startswith('a_0000.tif is truncated or damaged')


@pytest.mark.parametrize(('beside', 'said'), [
    ('{"spacing": [1, 1, 1' + '0' * 400 + ']}', 'needs "spacing"'), ('[' * 100_000, 'cannot be read'),
    ('{"spacing": [1, 1, true]}', 'needs "spacing"'), (b'\xff\xfe{}', 'cannot be read')])
def test_whatever_lies_beside_a_tif_fails_its_case_alone(tmp_path, beside, said):
    tifffile.imwrite(tmp_path / 'a_0000.tif', np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.uint8))
    (tmp_path / 'a.json').write_bytes(beside if isinstance(beside, bytes) else beside.encode())
    failed = preprocessor(reader='Tiff3DIO')([str(tmp_path / 'a_0000.tif')], None, 'out/a')
    assert isinstance(failed, FailedCase)
    assert failed.reason.startswith(f'a.json, which gives the voxel size of a_0000.tif, {said}')
