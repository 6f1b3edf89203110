"""Images that cannot be segmented: each is named at the end and in the summary, and the others are predicted."""
from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import shutil
import struct
import weakref
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET_ID, PLANS, REFINED, Workspace
from filelock import FileLock
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.commands.predict import main
from nnunet_pdddpm.demo.phantom import write_dataset
from nnunet_pdddpm.image_files import damage
from nnunet_pdddpm.inference import export, volume_predictor
from nnunet_pdddpm.inference import preprocess as preprocess_module
from nnunet_pdddpm.inference.case import ExportQueue, PendingCase
from nnunet_pdddpm.inference.errors import PredictionError
from nnunet_pdddpm.inference.export import Outputs
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.inference.preprocess import CasePreprocessor, FailedCase, preprocessed
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.network.refiner import BlindNetwork, Refiner

GOOD = 'phantom_009'


def predict(source: Path, output: Path, *flags: str, processes: int = 0) -> Path:
    """The command in this process, as fast as it goes."""
    main(['-i', str(source), '-o', str(output), '-d', str(DATASET_ID), '-c', '3d_fullres', '-tr', REFINED, '-p', PLANS,
          '-f', '0', '-device', 'cpu', '--disable_progress_bar', '--disable_tta', '-step_size', '1', '-samples', '2',
          '-npp', str(processes), '-nps', '0', *flags])
    return output


def refusal(*args, **kwargs) -> str:
    """What is said at the end: one line, exit status 1."""
    with pytest.raises(SystemExit) as refused:
        predict(*args, **kwargs)
    assert isinstance(refused.value.code, str) and '\n' not in refused.value.code
    return refused.value.code


@pytest.fixture
def source(refined: Workspace, tmp_path: Path) -> Path:
    """A folder with one good image."""
    folder = tmp_path / 'images'
    folder.mkdir()
    shutil.copy(refined.raw / 'imagesTs' / f'{GOOD}_0000.nii.gz', folder)
    return folder


def good_file(source: Path) -> Path:
    return source / f'{GOOD}_0000.nii.gz'


def write(source: Path, case: str, array: np.ndarray) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.float32)), str(source / f'{case}_0000.nii.gz'))


def array(source: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(good_file(source))))


def with_header(source: Path, case: str, offset: int, value: float) -> None:
    """The good image with a float32 of its header replaced."""
    content = bytearray(gzip.decompress(good_file(source).read_bytes()))
    content[offset:offset + 4] = struct.pack('<f', value)
    (source / f'{case}_0000.nii.gz').write_bytes(gzip.compress(content))


def write_bad_images(source: Path) -> dict[str, str]:
    """One image for each way to be bad: case -> what is said of it."""
    image, content = array(source), good_file(source).read_bytes()
    write(source, 'zeros', 0 * image)
    write(source, 'constant', 0 * image + 7)
    for case, bytes_ in (('truncated', content[:len(content) // 2]), ('empty', b''), ('text', b'no image'),
                         ('short', gzip.compress(gzip.decompress(content)[:2000])),
                         ('flipped', content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])):
        (source / f'{case}_0000.nii.gz').write_bytes(bytes_)
    with_header(source, 'spacing_0', 80, 0.0)
    with_header(source, 'spacing_negative', 84, -1.5)
    with_header(source, 'spacing_nan', 88, np.nan)
    (source / 'dangling_0000.nii.gz').symlink_to(source / 'nowhere.nii.gz')
    for channel in range(2):
        shutil.copy(good_file(source), source / f'two_{channel:04d}.nii.gz')
    shutil.copy(good_file(source), source / 'unnumbered.nii.gz')
    shutil.copy(good_file(source), source / 'nrrd_0000.nrrd')
    return {'zeros': 'all voxels have the value 0', 'constant': 'all voxels have the value 7',
            'truncated': 'is truncated or damaged', 'empty': 'is empty', 'text': 'is truncated or damaged',
            'short': 'is truncated: it has 2000 bytes of', 'flipped': 'is truncated or damaged',
            'spacing_0': 'gives a voxel size of 0 x', 'spacing_negative': 'x -1.5 x', 'spacing_nan': 'x nan mm',
            'dangling': 'cannot be read (No such file or directory)', 'two': 'has 2 channel files, the model needs 1',
            'unnumbered': 'has no channel number', 'nrrd': 'ends in .nrrd, this model reads .nii.gz'}


@pytest.mark.parametrize('processes', [0, 1])
def test_bad_images_are_named_at_the_end_and_in_the_summary_and_the_good_ones_are_done(source, tmp_path, processes):
    alone = predict(source, tmp_path / 'alone')
    bad = write_bad_images(source)
    out = tmp_path / 'out'
    said = refusal(source, out, '--report', processes=processes)
    assert said.startswith(f'Error: {len(bad)} of {len(bad) + 1} cases could not be predicted, the others are done: ')
    summary = json.loads((out / 'pdddpm_summary.json').read_text())
    reasons = {row['case']: row['error'] for row in summary['failed']}
    assert reasons.keys() == bad.keys()
    page = (out / 'report.html').read_text()
    for case, reason in bad.items():
        assert reason in reasons[case]
        assert f'{case} ({reasons[case]})' in said
        assert f'{case} (' in page
    assert [row['case'] for row in summary['cases']] == [GOOD]
    lines = list(csv.DictReader((out / 'pdddpm_summary.csv').open(newline='')))
    assert {line['case']: line['error'] for line in lines if line['error']} == reasons
    assert [file.name for file in out.glob('*.nii.gz')] == [f'{GOOD}.nii.gz']
    assert (out / f'{GOOD}.nii.gz').read_bytes() == (alone / f'{GOOD}.nii.gz').read_bytes()
    assert not list(out.glob('.*'))


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_refused_where_the_reader_keeps_them_and_0_where_it_makes_them_0(refined, source, value):
    """SimpleITK reads them as 0 from NIfTI, in training as in prediction, and so does stock nnU-Net."""
    spoiled = array(source).astype(np.float32)
    spoiled[3, 4, 5] = value
    write(source, 'spoiled', spoiled)
    spoiled[3, 4, 5] = 0
    write(source, 'zero', spoiled)
    plans = json.loads((refined.model(REFINED) / 'plans.json').read_text())
    description = json.loads((refined.model(REFINED) / 'dataset.json').read_text())

    def read(case: str, reader: str):
        manager = PlansManager({**plans, 'image_reader_writer': reader})
        preprocess = CasePreprocessor(manager, manager.get_configuration('3d_fullres'), description, False)
        return preprocess([str(source / f'{case}_0000.nii.gz')], None, f'out/{case}')
    assert read('spoiled', 'NibabelIO') == FailedCase(
        'out/spoiled', f'spoiled_0000.nii.gz: 1 of {spoiled.size} voxels are NaN or infinite')
    np.testing.assert_array_equal(read('spoiled', 'SimpleITKIO')['data'], read('zero', 'SimpleITKIO')['data'])


def preprocessor(refined: Workspace, reader: Any = None) -> CasePreprocessor:
    """Of the trained model; `reader`: in the place of nnU-Net's."""
    plans, description = (json.loads((refined.model(REFINED) / name).read_text())
                          for name in ('plans.json', 'dataset.json'))
    manager = PlansManager(plans)
    if reader is not None:
        manager = SimpleNamespace(image_reader_writer_class=lambda: reader, transpose_forward=[0, 1, 2])
    configuration = PlansManager(plans).get_configuration('3d_fullres')
    return CasePreprocessor(manager, configuration, description, False)


@pytest.mark.parametrize(('error', 'said'), [
    (SyntaxError('broken PNG file'), '(SyntaxError: broken PNG file)'), (KeyError('spacing'), "(KeyError: 'spacing')"),
    (TypeError('bad operand type for abs()'), '(TypeError: bad operand type for abs())'),
    (struct.error('unpack requires a buffer of 8 bytes'), '(error: unpack requires a buffer of 8 bytes)'),
    (IndexError('list index out of range'), '(IndexError: list index out of range)'),
    (AssertionError(), '(AssertionError)'), (AssertionError('only 3d images'), 'only 3d images'),
    (ValueError('first\nno tif'), 'no tif')])
def test_whatever_a_reader_raises_for_a_case_fails_that_case_and_names_its_file(refined, tmp_path, error,
                                                                                      said):
    class Reader:
        def read_images(self, files):
            raise error
    said = f'it is damaged, or not what its name says {said}' if said.startswith('(') else said
    assert preprocessor(refined, Reader())([str(tmp_path / 'a_0000.mha')], None, 'out/a') == FailedCase(
        'out/a', f'a_0000.mha cannot be read: {said}')


def test_the_channel_that_cannot_be_read_is_named_and_channels_that_do_not_fit_all(refined):
    class Reader:
        def read_images(self, files):
            if len(files) > 1 or 'a_0001' in files[0]:
                raise RuntimeError('unreadable' if 'a_' in files[0] else 'shapes differ')
            return np.zeros((1, 2, 2, 2)), {'spacing': (1, 1, 1)}
    preprocess = preprocessor(refined, Reader())
    assert preprocess(['a_0000.mha', 'a_0001.mha'], None, None).reason == 'a_0001.mha cannot be read: unreadable'
    assert preprocess(['b_0000.mha', 'b_0001.mha'], None, None).reason == (
        'b_0000.mha, b_0001.mha cannot be read: shapes differ')


def test_a_voxel_size_that_is_no_number_fails_its_case(refined):
    class Reader:
        def read_images(self, files):
            return np.arange(8.0).reshape(1, 2, 2, 2), {'spacing': ['1 mm', '1 mm', '1 mm']}
    failed = preprocessor(refined, Reader())(['a_0000.mha'], None, None)
    assert failed.reason == "a_0000.mha cannot be read: could not convert string to float: '1 mm'"


def test_an_error_of_the_program_is_none_of_the_image(refined, source, monkeypatch):
    def wrong(*args):
        raise TypeError('of the program')
    monkeypatch.setattr(preprocess_module, 'require_image', wrong)
    with pytest.raises(TypeError, match='of the program'):
        preprocessor(refined)([str(good_file(source))], None, None)


def test_channels_of_different_shape_or_spacing_are_refused(refined, source):
    plans, description = (json.loads((refined.model(REFINED) / name).read_text())
                          for name in ('plans.json', 'dataset.json'))
    manager = PlansManager(plans)
    preprocess = CasePreprocessor(manager, manager.get_configuration('3d_fullres'), description, False)
    write(source, 'small', array(source)[1:])
    with_header(source, 'coarse', 80, 1.7)
    z, y, x = array(source).shape
    for other, said in (('small', f'shape (z, y, x): {GOOD}_0000.nii.gz has [{z}, {y}, {x}], small_0000.nii.gz has '
                                  f'[{z - 1}, {y}, {x}]'), ('coarse', 'voxel size (z, y, x): ')):
        failed = preprocess([str(good_file(source)), str(source / f'{other}_0000.nii.gz')], None, None)
        assert failed.reason.startswith(f'the channels differ in {said}')


def test_channels_of_different_origin_or_direction_are_predicted_with_nnunets_warning(refined, source, capsys):
    plans, description = (json.loads((refined.model(REFINED) / name).read_text())
                          for name in ('plans.json', 'dataset.json'))
    for name in ('normalization_schemes', 'use_mask_for_norm'):
        plans['configurations']['3d_fullres'][name] *= 2
    intensities = plans['foreground_intensity_properties_per_channel']
    intensities['1'] = intensities['0']
    description['channel_names'] = {'0': 'T1', '1': 'T2'}
    manager = PlansManager(plans)
    image = sitk.ReadImage(str(good_file(source)))
    image.SetOrigin((1, 2, 3))
    image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    sitk.WriteImage(image, str(source / 'moved_0000.nii.gz'))
    preprocess = CasePreprocessor(manager, manager.get_configuration('3d_fullres'), description, False)
    item = preprocess([str(good_file(source)), str(source / 'moved_0000.nii.gz')], None, None)
    assert item['data'].shape[0] == 2 and np.array_equal(item['data'][0], item['data'][1])
    said = capsys.readouterr().out
    assert 'not all input images have the same origin' in said.lower() and 'have the same direction' in said


@pytest.mark.parametrize(('factor', 'flag', 'words'), [
    (np.inf, '--verbose', 'Encountered inf'), (np.nan, '--verbose', 'logits of the stock model'),
    (np.nan, '--save_presegmentation', 'logits of the stock model')])
def test_a_case_of_which_the_networks_make_no_numbers_fails_alone(source, tmp_path, monkeypatch, factor, flag, words):
    spiked = array(source).astype(np.float32)
    spiked[10, 13, 11] = 1e6
    write(source, 'spiked', spiked)
    predict_tile = nnUNetPredictor._internal_maybe_mirror_and_predict

    def overflowing(self, tile):
        return predict_tile(self, tile) * (factor if tile.max() > 50 else 1)
    monkeypatch.setattr(nnUNetPredictor, '_internal_maybe_mirror_and_predict', overflowing)
    said = refusal(source, tmp_path / 'out', flag)
    assert '1 of 2 cases' in said and f'spiked (the networks give NaN or infinite values for it ({words}' in said
    assert [file.name for file in (tmp_path / 'out').glob('*.nii.gz')] == [f'{GOOD}.nii.gz']


@pytest.mark.parametrize(('network', 'method', 'words'), [
    (BlindNetwork, 'forward', 'logits of the mask'), (Refiner, 'denoise', 'probabilities of the samples')])
def test_a_case_of_which_the_denoiser_makes_no_numbers_fails_alone(source, tmp_path, monkeypatch, network, method,
                                                                   words):
    spiked = array(source).astype(np.float32)
    spiked[10, 13, 11] = 1e6
    write(source, 'spiked', spiked)
    original = getattr(network, method)

    def spoiled(self, image, *args):
        return original(self, image, *args) * (np.nan if image.max() > 50 else 1)
    monkeypatch.setattr(network, method, spoiled)
    said = refusal(source, tmp_path / 'out')
    assert '1 of 2 cases' in said and f'spiked (the networks give NaN or infinite values for it ({words})' in said
    assert [file.name for file in (tmp_path / 'out').rglob('*.nii.gz')] == [f'{GOOD}.nii.gz']


def test_a_case_of_which_the_stock_model_alone_makes_no_numbers_fails_alone(source, tmp_path, monkeypatch):
    """Though neither its mask nor its samples show that: chains start from them."""
    spiked = array(source).astype(np.float32)
    spiked[10, 13, 11] = 1e6
    write(source, 'spiked', spiked)
    original = nnUNetPredictor.predict_sliding_window_return_logits

    def spoiled(self, image):
        logits = original(self, image)
        if image.max() > 50 and not isinstance(self.network, BlindNetwork):
            logits[:, 0, 0, 0] = np.nan
        return logits
    monkeypatch.setattr(nnUNetPredictor, 'predict_sliding_window_return_logits', spoiled)
    said = refusal(source, tmp_path / 'out')
    assert '1 of 2 cases' in said and '(the networks give NaN or infinite values for it (logits of the stock' in said
    assert [file.name for file in (tmp_path / 'out').rglob('*.nii.gz')] == [f'{GOOD}.nii.gz']


def test_a_case_that_has_been_put_right_is_no_failure_any_more(source, tmp_path):
    write(source, 'other', np.zeros((20, 26, 22)))
    out = tmp_path / 'out'
    assert '1 of 2 cases could not be predicted' in refusal(source, out)
    done = (out / f'{GOOD}.nii.gz').stat().st_mtime_ns
    write(source, 'other', array(source) + 1)
    predict(source, out, '--continue_prediction')
    summary = json.loads((out / 'pdddpm_summary.json').read_text())
    assert 'failed' not in summary and [row['case'] for row in summary['cases']] == ['other', GOOD]
    assert (out / f'{GOOD}.nii.gz').stat().st_mtime_ns == done


def test_when_nothing_can_be_predicted_that_is_said_and_earlier_masks_stay(source, tmp_path):
    out = predict(source, tmp_path / 'out')
    mask = (out / f'{GOOD}.nii.gz').read_bytes()
    good_file(source).write_bytes(b'')
    assert '1 of 1 cases could not be predicted' in refusal(source, out)
    assert (out / f'{GOOD}.nii.gz').read_bytes() == mask


@pytest.mark.parametrize('shape', [(1, 26, 22), (20, 1, 22), (1, 1, 30), (1, 1, 1), (3, 2, 2)])
def test_axes_of_one_voxel_keep_their_geometry(source, tmp_path, shape):
    good_file(source).unlink()
    write(source, 'thin', np.random.default_rng(0).normal(size=shape))
    if shape == (1, 1, 1):  # constant
        assert 'there is nothing to segment' in refusal(source, tmp_path / 'out')
        return
    out = predict(source, tmp_path / 'out', '--uncertainty', '--save_samples')
    files = list(out.rglob('*.nii.gz'))
    assert len(files) == 4
    for file in files:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        assert values.shape == shape and np.isfinite(values).all()


def test_names_with_spaces_letters_and_markup_and_symbolic_links_are_names_like_others(source, tmp_path):
    names = ['größe 1 é', '<script>alert(1)<∕script>', 'a & "b"; $(c)', '病例 _s00']
    for name in names:
        (source / f'{name}_0000.nii.gz').symlink_to(good_file(source))
    real = tmp_path / 'somewhere else'
    real.mkdir()
    out = tmp_path / 'link to output'
    out.symlink_to(real)
    predict(source, out, '--report', '--save_samples')
    assert {file.name for file in real.glob('*.nii.gz')} == {f'{name}.nii.gz' for name in [*names, GOOD]}
    masks = {file.read_bytes() for file in real.glob('*.nii.gz')}
    assert len(masks) == 1  # the same image under all names
    page = (out / 'report.html').read_text()
    assert '<script>alert' not in page and '&lt;script&gt;alert(1)' in page


def test_files_are_told_whole_from_damaged(source, tmp_path):
    good = good_file(source)
    assert damage(good) == ''
    (tmp_path / 'plain.nii').write_bytes(gzip.decompress(good.read_bytes()))
    assert damage(tmp_path / 'plain.nii') == ''
    (tmp_path / 'plain.nii').write_bytes(gzip.decompress(good.read_bytes())[:-1])
    assert 'is truncated: it has' in damage(tmp_path / 'plain.nii')


# what happens to the output folder

def test_an_output_that_cannot_be_written_is_one_sentence(source, tmp_path):
    (tmp_path / 'file').write_text('')
    said = refusal(source, tmp_path / 'file' / 'out')
    assert said.startswith('Error: Not a directory') and str(tmp_path / 'file') in said
    assert 'continue with --continue_prediction' in said


def test_a_second_run_at_the_same_case_is_refused_and_disturbs_nothing(source, tmp_path, monkeypatch):
    out, seen = tmp_path / 'out', []
    add_prediction = PendingCase.add_prediction

    def while_another_starts(self, prediction):
        if not seen:
            seen.append(refusal(source, out))
        add_prediction(self, prediction)
    monkeypatch.setattr(PendingCase, 'add_prediction', while_another_starts)
    predict(source, out)
    assert f'{GOOD} is being predicted into {out} by another process' in seen[0]
    monkeypatch.undo()
    alone = predict(source, tmp_path / 'alone')
    assert (out / f'{GOOD}.nii.gz').read_bytes() == (alone / f'{GOOD}.nii.gz').read_bytes()


def test_a_file_system_without_locks_is_predicted_into_with_one_warning(source, tmp_path, monkeypatch, caplog):
    """NFS without a lock daemon."""
    shutil.copyfile(source / f'{GOOD}_0000.nii.gz', source / 'case_other_0000.nii.gz')

    def flock(*_):
        raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(pytest.importorskip('fcntl'), 'flock', flock)
    out = predict(source, tmp_path / 'out')
    assert sorted(file.name for file in out.glob('*.nii.gz')) == ['case_other.nii.gz', f'{GOOD}.nii.gz']
    assert not list(out.glob('.*partial*'))
    assert caplog.text.count('has no locks (No locks available)') == 1


def test_what_a_run_killed_at_its_very_end_has_left_is_taken_away(source, tmp_path):
    out = predict(source, tmp_path / 'out')
    left = out / f'.{GOOD}.partial'
    left.mkdir()
    (out / f'.{GOOD}.partial.lock').write_text('')
    predict(source, out, '--continue_prediction')
    assert not list(out.glob('.*partial*'))


def test_no_folder_is_deleted_that_holds_an_open_file(source, tmp_path, monkeypatch):
    """Windows refuses that; the lock of a case lies beside its folder, and goes with it."""
    open_locks, rmtree = [], shutil.rmtree
    acquire = FileLock.acquire

    def acquired(self, *args, **kwargs):
        open_locks.append(Path(self.lock_file))
        return acquire(self, *args, **kwargs)

    def as_on_windows(folder, *args, **kwargs):
        assert not [lock for lock in open_locks if Path(folder) in lock.parents]
        rmtree(folder, *args, **kwargs)
    monkeypatch.setattr(FileLock, 'acquire', acquired)
    monkeypatch.setattr(shutil, 'rmtree', as_on_windows)
    out = predict(source, tmp_path / 'out')
    assert open_locks and (out / f'{GOOD}.nii.gz').is_file() and not list(out.glob('.*partial*'))


def test_nothing_of_a_case_is_alive_when_the_next_one_begins(tmp_path, monkeypatch):
    """A volume's arrays are as large as the memory allows: two at a time would not fit."""
    write_dataset(tmp_path / 'raw', num_training=0, num_test=3, shape=(20, 26, 22))
    alive: list[weakref.ref] = []
    initialise, predict_volume = Volume.__init__, PDDDPMPredictor.predict_volume

    def begin(self, *args):
        assert [reference for reference in alive if reference() is not None] == []
        alive.append(weakref.ref(self))
        initialise(self, *args)

    def predicted(self, *args):
        result = predict_volume(self, *args)
        alive.extend([weakref.ref(result), weakref.ref(result.spread), weakref.ref(result.logits)])
        return result
    monkeypatch.setattr(Volume, '__init__', begin)
    monkeypatch.setattr(PDDDPMPredictor, 'predict_volume', predicted)
    predict(tmp_path / 'raw' / 'imagesTs', tmp_path / 'out')
    assert len(alive) == 3 * 4


@pytest.mark.parametrize(('moment', 'said_then'), [
    ('exporting', 'The folder was deleted while it was written to'), ('afterwards', 'is not there any more')])
def test_a_deleted_output_folder_is_told(source, tmp_path, monkeypatch, moment, said_then):
    out = tmp_path / 'out'
    name = {'exporting': 'add_prediction', 'afterwards': 'move_to_output'}[moment]
    original = getattr(PendingCase, name)

    def deleting(self, *args):
        if moment == 'exporting':
            shutil.rmtree(out)
        original(self, *args)
        if moment == 'afterwards':
            shutil.rmtree(out)
    monkeypatch.setattr(PendingCase, name, deleting)
    assert said_then in refusal(source, out)


def test_a_mask_that_the_writer_left_torn_is_not_put_in_place(source, tmp_path, monkeypatch):
    """As on a full disk, where SimpleITK reports no error."""
    out = predict(source, tmp_path / 'out')
    earlier = {file: file.read_bytes() for file in out.rglob('*') if file.is_file() and file.suffix != '.json'}
    original = export.export_prediction_from_logits

    def torn(logits, properties, configuration, plans, description, file, *args):
        original(logits, properties, configuration, plans, description, file, *args)
        os.truncate(f'{file}.nii.gz', 200)
    monkeypatch.setattr(export, 'export_prediction_from_logits', torn)
    assert 'What was written is truncated or damaged' in refusal(source, out, '-seed', '3')
    assert {file: file.read_bytes() for file in earlier} == earlier


def of_the_device() -> None:
    raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')


@pytest.mark.parametrize('allocate', [lambda: torch.empty(2 ** 60), lambda: np.empty(2 ** 55), of_the_device],
                         ids=['torch', 'numpy', 'cuda'])
def test_a_case_too_large_for_the_memory_fails_alone(source, tmp_path, monkeypatch, allocate):
    write(source, 'huge', np.pad(array(source), 5, mode='reflect'))
    predict_volume = PDDDPMPredictor.predict_volume

    def limited(self, data, *args, **kwargs):
        if data.numel() > 1.3 * array(source).size:
            allocate()
        return predict_volume(self, data, *args, **kwargs)
    monkeypatch.setattr(PDDDPMPredictor, 'predict_volume', limited)
    said = refusal(source, tmp_path / 'out')
    assert '1 of 2 cases could not be predicted' in said and 'huge (not enough memory for it' in said
    assert [file.name for file in (tmp_path / 'out').glob('*.nii.gz')] == [f'{GOOD}.nii.gz']
    assert not list((tmp_path / 'out').glob('.*'))


def test_a_volume_that_does_not_fit_on_the_device_is_predicted_in_main_memory(refined, source, tmp_path, monkeypatch,
                                                                              caplog):
    """On a GPU whose memory ends after the first sample: the sample is drawn again, and the files are the same."""
    predictor = PDDDPMPredictor(tile_step_size=1, use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False,
                                outputs=Outputs(samples=True))
    predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
    results = []
    _predict_volume = PDDDPMPredictor._predict_volume

    def too_large(self, data, device, *args):
        predictor.device = torch.device('cpu')
        result = _predict_volume(self, data, torch.device('cpu'), *args)
        if device.type == 'cuda':
            of_the_device()
        return result
    monkeypatch.setattr(PDDDPMPredictor, 'fits', lambda self, shape: True)  # as it seems before
    monkeypatch.setattr(volume_predictor, 'available_cpus', lambda: 1)
    for device in ('cpu', 'cuda'):
        monkeypatch.setattr(PDDDPMPredictor, '_predict_volume', too_large)
        predictor.device, predictor.perform_everything_on_device = torch.device(device), device == 'cuda'
        predictor.predict_from_files_sequential([[str(good_file(source))]], [str(tmp_path / device / 'case')])
        results.append({file.name: file.read_bytes() for file in (tmp_path / device).rglob('*.nii.gz')})
    assert results[0] == results[1] and len(results[0]) == 1 + predictor.num_samples
    assert caplog.text.count('its arrays are kept in main memory') == 1
    assert predictor.perform_everything_on_device and predictor.failed == {}


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError("can't start new thread"),
                                   RuntimeError('could not create a primitive'),
                                   ImportError('libx.so: failed to map segment from shared object')])
def test_too_little_memory_for_the_model_is_one_sentence(source, tmp_path, monkeypatch, error):
    def no_memory(*args):
        raise SystemError('initialization of x raised unreported exception') from error
    monkeypatch.setattr(PDDDPMPredictor, 'initialize_from_trained_model_folder', no_memory)
    assert refusal(source, tmp_path / 'out').startswith('Error: There is not enough memory, not even for the model.')


def test_errors_that_are_no_lack_of_memory_are_not_taken_for_one(source, tmp_path, monkeypatch):
    def broken(self, data, *args):
        raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')
    monkeypatch.setattr(PDDDPMPredictor, 'predict_volume', broken)
    with pytest.raises(RuntimeError, match='mat1 and mat2'):
        predict(source, tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*.nii.gz'))


def test_a_background_process_that_is_killed_is_told_in_one_sentence():
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False)
    items = preprocessed(os._exit, [(9,), (9,)], 1)  # each process ends at its first case, as one that is killed
    with pytest.raises(PredictionError, match='A background process was killed, probably for lack of memory'):
        predictor.predict_from_data_iterator(items, num_processes_segmentation_export=0)


def test_a_killed_process_of_the_export_is_told_in_one_sentence(source, tmp_path, monkeypatch):
    def broken(self, *args):
        future = Future()
        future.set_exception(BrokenProcessPool())
        return future
    monkeypatch.setattr(ExportQueue, 'submit', broken)
    assert 'A background process was killed, probably for lack of memory' in refusal(source, tmp_path / 'out')
    assert not list((tmp_path / 'out').glob('*.nii.gz'))


def test_from_python_a_bad_image_without_a_file_for_its_mask_is_an_error(refined, source):
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
    write(source, 'dark', np.zeros((20, 26, 22)))
    with pytest.raises(PredictionError, match='dark_0000.nii.gz: all voxels have the value 0'):
        predictor.predict_from_files_sequential([[str(source / 'dark_0000.nii.gz')]], None)
