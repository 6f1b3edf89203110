"""Kinds of images: channels, thick slices, images smaller than the patch, readers, directions, and plain pictures."""
from __future__ import annotations

import json
import math
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert3DTo2DTransform
from conftest import BRIEF, BRIEF_STOCK, PLANS, make_trainer, predict_in_process, prepare, train_in_process
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_model import plans as tiny_plans

from nnunet_pdddpm.demo.phantom import make_case, write_dataset
from nnunet_pdddpm.inference.export import CaseExport, Outputs

READERS = {'SimpleITKIO': 721, 'NibabelIO': 722, 'NibabelIOWithReorient': 723, 'SimpleITKIOWithReorient': 725}


@pytest.fixture(autouse=True)
def brief_presegmenter(monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)


def describe(raw: Path, **changes) -> None:
    """Change dataset.json."""
    description = json.loads((raw / 'dataset.json').read_text())
    (raw / 'dataset.json').write_text(json.dumps({**description, **changes}))


def test_two_channels_in_thick_slices_with_the_plans_as_nnunet_makes_them(folders, tmp_path):
    raw = Path(os.environ['nnUNet_raw']) / 'Dataset720_ThickSlices'
    write_dataset(raw, num_training=4, num_test=1, shape=(8, 40, 30), seed=4)
    for file in raw.glob('*T[rs]/*.nii.gz'):
        image = sitk.ReadImage(str(file))
        image.SetSpacing((0.8, 0.8, 6.0))
        sitk.WriteImage(image, str(file))
        if file.parent.name.startswith('images'):
            sitk.WriteImage(200 - image, str(file).replace('_0000', '_0001'))
    describe(raw, channel_names={'0': 'T1', '1': 'CT'})
    preprocessed = prepare(raw, '3d_fullres', folds=2)
    plan = json.loads((preprocessed / 'nnUNetPlans.json').read_text())['configurations']['3d_fullres']
    architecture = plan['architecture']['arch_kwargs']
    assert architecture['kernel_sizes'][0] == [1, 3, 3] and [1, 2, 2] in architecture['strides']

    make_trainer(BRIEF_STOCK, 0, '3d_fullres', 720, 'nnUNetPlans').run_training()
    train_in_process(720, '3d_fullres', 0, BRIEF, plans='nnUNetPlans')
    trainer = make_trainer(BRIEF, 0, '3d_fullres', 720, 'nnUNetPlans')
    trainer.on_train_start()
    assert any(isinstance(t, Convert3DTo2DTransform)
               for t in trainer.dataloader_train.data_loader.transforms.transforms)
    image_conv = trainer.refiner.denoiser.unet.encoder.stages[0][0].convs[0].conv.image_conv
    assert image_conv.in_channels == 2 and image_conv.kernel_size == (1, 3, 3)
    predict_in_process(raw / 'imagesTs', tmp_path, 720, '3d_fullres', BRIEF, plans='nnUNetPlans')
    assert_same_geometry(raw / 'imagesTs' / 'phantom_004_0000.nii.gz', tmp_path / 'phantom_004.nii.gz')


def turned(image: sitk.Image) -> sitk.Image:
    """The image with its axes permuted and flipped, oblique in all three, off the origin."""
    rotation = sitk.Euler3DTransform((0, 0, 0), math.radians(75), math.radians(-12), math.radians(160))
    flipped = sitk.Flip(image, (True, False, True))
    flipped.SetDirection(rotation.GetMatrix())
    flipped.SetOrigin((-17.5, 203.25, 8.0))
    return flipped


def assert_same_geometry(one: Path, other: Path) -> None:
    """Size, spacing, origin and direction, by two libraries."""
    a, b = sitk.ReadImage(str(one)), sitk.ReadImage(str(other))
    assert a.GetSize() == b.GetSize()
    for of in (sitk.Image.GetSpacing, sitk.Image.GetOrigin, sitk.Image.GetDirection):
        np.testing.assert_allclose(of(a), of(b), atol=1e-4)
    np.testing.assert_allclose(nibabel.load(one).affine, nibabel.load(other).affine, atol=1e-4)


@pytest.mark.parametrize('reader', READERS)
def test_small_images_in_any_direction_by_every_reader(folders, reader, tmp_path, monkeypatch):
    dataset = READERS[reader]
    raw = Path(os.environ['nnUNet_raw']) / f'Dataset{dataset}_Turned'
    write_dataset(raw, num_training=4, num_test=2, shape=(11, 19, 13), seed=5)
    for file in raw.glob('*T[rs]/*.nii.gz'):
        sitk.WriteImage(turned(sitk.ReadImage(str(file))), str(file))
    describe(raw, overwrite_image_reader_writer=reader)
    preprocessed = prepare(raw, '3d_fullres', folds=2)
    plans = json.loads((preprocessed / f'{PLANS}.json').read_text())
    assert plans['image_reader_writer'] == reader
    patch = plans['configurations']['3d_fullres']['patch_size']
    assert (np.array(plans['original_median_shape_after_transp']) < patch).all()

    make_trainer(BRIEF_STOCK, 0, '3d_fullres', dataset).run_training()
    train_in_process(dataset, '3d_fullres', 0, BRIEF)
    predict_in_process(raw / 'imagesTs', tmp_path / 'refined', dataset, '3d_fullres', BRIEF)
    predict_in_process(raw / 'imagesTs', tmp_path / 'stock', dataset, '3d_fullres', BRIEF_STOCK)
    monkeypatch.setenv('nnUNet_pdddpm_start', '0')
    predict_in_process(raw / 'imagesTs', tmp_path / 'unrefined', dataset, '3d_fullres', BRIEF)
    for image in (raw / 'imagesTs').iterdir():
        case = image.name.replace('_0000', '')
        assert_same_geometry(image, tmp_path / 'refined' / case)
        assert (tmp_path / 'unrefined' / case).read_bytes() == (tmp_path / 'stock' / case).read_bytes()


@pytest.mark.parametrize('reader', READERS)
def test_maps_keep_their_values_and_the_geometry_of_the_image_with_every_reader(reader, tmp_path):
    image, rng = tmp_path / 'case_0000.nii.gz', np.random.default_rng(0)
    sitk.WriteImage(turned(sitk.GetImageFromArray(rng.random((4, 5, 6)))), str(image))
    manager = PlansManager(tiny_plans(reader, 3, 1))
    its_reader = manager.image_reader_writer_class()
    array, properties = its_reader.read_images((str(image),))
    values = rng.random(array[0].shape)
    values[0, 0, :2] = 0, 1
    CaseExport(manager, manager.get_configuration('3d_fullres'), {'file_ending': '.nii.gz'}, properties, tmp_path,
               'case', Outputs())._write_map(values, 'uncertainty')
    written = tmp_path / 'uncertainty' / 'case_uncertainty.nii.gz'
    np.testing.assert_allclose(its_reader.read_seg(str(written))[0][0], values, atol=0.51 / 254)
    assert_same_geometry(image, written)
    assert nibabel.load(written).get_data_dtype() == np.float32


def test_colour_pictures(folders, tmp_path):
    raw = Path(os.environ['nnUNet_raw']) / 'Dataset724_Pictures'
    for i in range(6):
        image, labels = make_case((9, 37 + 3 * i, 44 - i), 6000 + i)
        part = 'Tr' if i < 4 else 'Ts'
        for folder in (f'images{part}', f'labels{part}'):
            (raw / folder).mkdir(parents=True, exist_ok=True)
        slices = np.clip(np.stack([image[3], image[4], image[5]], -1), 0, 255).astype(np.uint8)
        picture = sitk.GetImageFromArray(slices, isVector=True)
        sitk.WriteImage(picture, str(raw / f'images{part}' / f'case_{i}_0000.png'))
        sitk.WriteImage(sitk.GetImageFromArray(labels[4]), str(raw / f'labels{part}' / f'case_{i}.png'))
    (raw / 'dataset.json').write_text(json.dumps({
        'channel_names': {'0': 'R', '1': 'G', '2': 'B'}, 'labels': {'background': 0, 'organ': 1, 'lesion': 2},
        'numTraining': 4, 'file_ending': '.png'}))
    preprocessed = prepare(raw, '2d', folds=2)
    assert json.loads((preprocessed / f'{PLANS}.json').read_text())['image_reader_writer'] == 'NaturalImage2DIO'
    make_trainer(BRIEF_STOCK, 0, '2d', 724).run_training()
    train_in_process(724, '2d', 0, BRIEF)
    predict_in_process(raw / 'imagesTs', tmp_path, 724, '2d', BRIEF)
    for i in (4, 5):
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f'case_{i}.png')))
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / 'labelsTs' / f'case_{i}.png')))
        assert mask.shape == truth.shape and mask.max() <= 2
