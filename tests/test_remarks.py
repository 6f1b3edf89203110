"""Images that are predicted and flagged: intensities far from the training cases', silent geometry; nothing in them."""
from __future__ import annotations

import csv
import gzip
import json
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nibabel.spatialimages import HeaderDataError
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from skimage import io
from tiny_model import NORMALISATION, plans, write_model

from nnunet_pdddpm.commands.predict import main_modelfolder
from nnunet_pdddpm.inference.preprocess import CasePreprocessor, FailedCase

SHAPE = (8, 20, 22)
CT = 'CTNormalization'


def description(channels: int = 1, ending: str = '.nii.gz') -> dict[str, Any]:
    return {'channel_names': {str(i): f'T{i + 1}' for i in range(channels)}, 'file_ending': ending, 'numTraining': 1,
            'labels': {'background': 0, 'cell': 1}}


def image(seed: int = 0) -> np.ndarray:
    """As the training cases of `plans`: mean 100, standard deviation 40."""
    return np.random.default_rng(seed).normal(100, 40, SHAPE).astype(np.float32)


def write(folder: Path, array: np.ndarray, case: str = 'a', channel: int = 0) -> str:
    file = str(folder / f'{case}_{channel:04d}.nii.gz')
    sitk.WriteImage(sitk.GetImageFromArray(array), file)
    return file


def preprocess(files: list[str], scheme: str = NORMALISATION, masked: bool = False, reader: str = 'SimpleITKIO'
               ) -> list[str] | str:
    """What is remarked of an image; or why it is refused."""
    content = plans(reader, 3, len(files), scheme)
    content['configurations']['3d_fullres']['use_mask_for_norm'] = [masked] * len(files)
    manager = PlansManager(content)
    item = CasePreprocessor(manager, manager.get_configuration('3d_fullres'), description(len(files)), False)(
        files, None, 'out/a')
    return item.reason if isinstance(item, FailedCase) else item['remarks']


@pytest.mark.parametrize('scheme', [NORMALISATION, CT, 'NoNormalization', 'RescaleTo01Normalization'])
def test_an_image_like_the_training_cases_is_not_flagged(tmp_path, scheme):
    assert preprocess([write(tmp_path, image())], scheme) == []


def test_the_scale_does_not_matter_where_an_image_is_normalised_by_its_own(tmp_path):
    assert preprocess([write(tmp_path, 1e-3 * image())]) == []
    organ = image()
    organ[2:5, 4:9, 4:9] += 4000  # more than few voxels
    assert preprocess([write(tmp_path, organ)]) == []


def spiked(value: float, voxels: int = 1) -> np.ndarray:
    array = image()
    array[3, 4, 5:5 + voxels] = value
    return array


@pytest.mark.parametrize('array', [spiked(1e6), spiked(-3e4), spiked(2e4, 3), 1e-3 * spiked(1e6)])
@pytest.mark.parametrize('scheme', [NORMALISATION, 'RescaleTo01Normalization'])
def test_a_few_extreme_voxels_that_squeeze_all_others_are_flagged(tmp_path, array, scheme):
    said, = preprocess([write(tmp_path, array)], scheme)
    assert said.startswith('channel 0 (T1): a few extreme voxels squeeze all others to 1/')


def test_a_spike_that_is_clipped_does_no_harm(tmp_path):
    assert preprocess([write(tmp_path, spiked(1e6))], CT) == []


@pytest.mark.parametrize(('array', 'scheme'), [
    (image() / 8, CT), (image() / 1000, 'NoNormalization'), (image() + 5000, 'NoNormalization'),
    (100 * image(), 'NoNormalization'), (np.clip(image() / 1000, 0, 1), 'RGBTo01Normalization')])
def test_other_units_are_flagged_where_the_normalisation_is_fixed(tmp_path, array, scheme):
    said, = preprocess([write(tmp_path, array)], scheme)
    assert said.startswith('channel 0 (T1): its values after normalisation') and said.endswith('other units?')


def test_a_constant_channel_beside_others_is_flagged_and_named(tmp_path):
    files = [write(tmp_path, image()), write(tmp_path, 0 * image() + 7, channel=1)]
    assert preprocess(files) == ['channel 1 (T2): after normalisation all its voxels are alike: it holds nothing']


def boxed() -> np.ndarray:
    """Not constant as it is, but where nnU-Net looks: it crops away what is 0."""
    array = np.zeros(SHAPE, np.float32)
    array[2:6, 3:15, 4:18] = 7
    return array


@pytest.mark.parametrize(('array', 'scheme', 'masked'), [
    (boxed(), NORMALISATION, False), (boxed(), NORMALISATION, True), (image() + 9000, CT, False),
    (-image() - 900, CT, False), (image() / 1000, CT, False)])
def test_an_image_that_holds_nothing_after_normalisation_is_refused(tmp_path, array, scheme, masked):
    assert preprocess([write(tmp_path, array)], scheme, masked) == (
        'a_0000.nii.gz: after normalisation all voxels are alike, there is nothing to segment')


def with_header(file: str, **fields: Any) -> str:
    """The file with another NIfTI header."""
    loaded: Any = nibabel.load(file)
    array = np.asarray(loaded.dataobj)
    header = loaded.header.copy()
    for name, value in fields.items():
        header[name] = value
    changed = nibabel.Nifti1Image(array, None, header)
    for name, value in fields.items():  # nibabel makes the header fit
        changed.header[name] = value
    nibabel.save(changed, file)
    return file


@pytest.mark.parametrize(('fields', 'said'), [
    ({'sform_code': 1, 'qform_code': 1, 'srow_x': [1, 0, 0, 0], 'srow_y': [0, 1, 0, 0], 'srow_z': [0, 0, 1, 0],
      'quatern_b': 0, 'quatern_c': 0, 'quatern_d': 1, 'qoffset_x': 21, 'qoffset_y': 19, 'qoffset_z': 0},
     'its sform and qform disagree by up to'),
    ({'sform_code': 1, 'qform_code': 1, 'srow_x': [1, 0, 0, 5], 'srow_y': [0, 1, 0, 0], 'srow_z': [0, 0, 1, 0],
      'quatern_b': 0, 'quatern_c': 0, 'quatern_d': 0, 'qoffset_x': 0, 'qoffset_y': 0, 'qoffset_z': 0},
     'its sform and qform disagree by up to 5 mm'),
    ({'sform_code': 0, 'qform_code': 0}, 'it does not say where it lies (no sform, no qform)'),
    ({'sform_code': 0, 'qform_code': 1, 'qoffset_y': np.nan}, 'the origin in its qform is no number')])
def test_odd_geometry_of_a_nifti_is_told(tmp_path, fields, said):
    found = preprocess([with_header(write(tmp_path, image()), **fields)], reader='NibabelIO')
    assert isinstance(found, list) and len(found) == 1 and found[0].startswith(f'a_0000.nii.gz: {said}'), found


def test_forms_that_agree_are_not_told(tmp_path):
    file = write(tmp_path, image())
    header: Any = nibabel.load(file).header
    assert header['sform_code'] > 0 and header['qform_code'] > 0
    assert preprocess([file]) == []


def with_qfac(file: str, value: float) -> str:
    """The file with another pixdim[0]: 0 is legal and read as 1."""
    content = bytearray(gzip.decompress(Path(file).read_bytes()))
    content[76:80] = struct.pack('<f', value)
    Path(file).write_bytes(gzip.compress(content))
    return file


@pytest.mark.parametrize('reader', ['SimpleITKIO', 'NibabelIO'])
@pytest.mark.parametrize('qfac', [0.0, 1.0, 3.0, np.nan])
def test_whatever_the_handedness_of_a_nifti_says_it_is_predicted(tmp_path, reader, qfac):
    assert preprocess([with_qfac(write(tmp_path, image()), qfac)], reader=reader) == []


@pytest.mark.parametrize('reader', ['SimpleITKIO', 'NibabelIO'])
def test_a_form_that_no_rotation_can_be_made_of_is_told_and_ends_nothing(tmp_path, reader, monkeypatch):
    def damaged(*args):
        raise HeaderDataError('it cannot be computed')
    monkeypatch.setattr(nibabel.Nifti1Header, 'get_qform', damaged)
    file = with_header(write(tmp_path, image()), sform_code=1)
    monkeypatch.setattr('nnunet_pdddpm.inference.remarks.read_header', lambda start: nibabel.Nifti1Header(start[:348]))
    said, = preprocess([file], reader=reader)
    assert said == 'a_0000.nii.gz: its qform is damaged: a viewer may show the mask elsewhere'


def test_axes_that_are_not_at_right_angles_are_told(tmp_path):
    sheared = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    file = str(tmp_path / 'a_0000.nii.gz')
    nibabel.save(nibabel.Nifti1Image(image(), sheared), file)
    found = preprocess([file], reader='NibabelIO')
    assert any('the axes of its sform are not at right angles' in said for said in found), found
    moved = sitk.GetImageFromArray(image())
    moved.SetDirection(sheared[:3, :3].ravel().tolist())
    sitk.WriteImage(moved, str(tmp_path / 'b_0000.nrrd'))
    assert preprocess([str(tmp_path / 'b_0000.nrrd')]) == [
        'b_0000.nrrd: its axes are not at right angles: distances and volumes are computed as if they were']


@pytest.mark.parametrize(('ending', 'line'), [('.nrrd', 'space origin:'), ('.mha', 'Offset =')])
def test_a_missing_origin_is_told(tmp_path, ending, line):
    file = tmp_path / f'a_0000{ending}'
    sitk.WriteImage(sitk.GetImageFromArray(image()), str(file))
    assert preprocess([str(file)]) == []
    content = file.read_bytes()
    start = content.index(line.encode())
    file.write_bytes(content[:start] + content[content.index(b'\n', start) + 1:])
    assert preprocess([str(file)]) == [
        f'a_0000{ending}: it does not say where it lies: its origin counts as 0, a viewer may show the mask elsewhere']


def test_neither_of_two_oddities_of_a_header_hides_the_other(tmp_path):
    file = tmp_path / 'a_0000.mha'
    sheared = sitk.GetImageFromArray(image())
    sheared.SetDirection([1, 0.2, 0, 0, 1, 0, 0, 0, 1])
    sitk.WriteImage(sheared, str(file))
    content = file.read_bytes()
    start = content.index(b'Offset =')
    file.write_bytes(content[:start] + content[content.index(b'\n', start) + 1:])
    said = preprocess([str(file)])
    assert isinstance(said, list) and len(said) == 2
    assert 'it does not say where it lies' in said[0] and 'its axes are not at right angles' in said[1]


@pytest.mark.parametrize('kind', [np.float32, np.float64])
def test_voxels_that_simpleitk_reads_as_0_are_told(tmp_path, kind):
    array = image().astype(kind)[:, :19, :21]
    array[1, 2, 3:5], array[-1, -1, -1] = np.nan, np.inf
    assert preprocess([write(tmp_path, array)]) == ['a_0000.nii.gz: 3 voxels are NaN or infinite: they are read as 0']


def test_images_without_a_voxel_size_are_told(tmp_path):
    tifffile.imwrite(tmp_path / 'a_0000.tif', image().astype(np.uint8))
    said, = preprocess([str(tmp_path / 'a_0000.tif')], reader='Tiff3DIO')
    assert said.startswith('a_0000.tif: no a.json gives its voxel size') and said.endswith('not in ml')
    (tmp_path / 'a.json').write_text('{"spacing": [1, 1, 1]}')
    assert preprocess([str(tmp_path / 'a_0000.tif')], reader='Tiff3DIO') == []
    io.imsave(tmp_path / 'b_0000.png', np.clip(image()[0], 0, 255).astype(np.uint8))
    said, = preprocess([str(tmp_path / 'b_0000.png')], reader='NaturalImage2DIO')
    assert said.startswith('b_0000.png: pictures have no voxel size')


def test_a_flag_is_in_summary_table_report_and_on_the_console_and_the_case_is_predicted(tmp_path, capsys):
    model = write_model(tmp_path / 'model', plans('SimpleITKIO', 3, 1), description())
    (tmp_path / 'images').mkdir()
    write(tmp_path / 'images', image(), 'good')
    write(tmp_path / 'images', spiked(1e6), 'spiked')
    out = tmp_path / 'out'
    main_modelfolder(['-m', str(model), '-i', str(tmp_path / 'images'), '-o', str(out), '-f', '0', '-device', 'cpu',
                      '-npp', '0', '-nps', '0', '--disable_progress_bar', '--disable_tta', '--report'])
    rows = {row['case']: row for row in json.loads((out / 'pdddpm_summary.json').read_text())['cases']}
    assert rows['good']['remarks'] == []
    said, = rows['spiked']['remarks']
    assert said.startswith('channel 0 (T1): a few extreme voxels') and (out / 'spiked.nii.gz').is_file()
    assert f'Look at spiked: {said}.' in capsys.readouterr().err
    lines = list(csv.DictReader((out / 'pdddpm_summary.csv').open(newline='')))
    assert {line['case']: line['case_remarks'] for line in lines} == {'good': '', 'spiked': said}
    page = (out / 'report.html').read_text()
    assert page.count('Look at the image:') == 1 and said in page
