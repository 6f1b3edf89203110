"""nnU-Net's Python API and 3D Slicer's command line give what `nnUNetv2_predict` gives, with nothing to adapt."""
from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import REFINED, Workspace, succeed
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

CASES = ('phantom_009', 'phantom_010')


@pytest.fixture
def predicted(predicted_by_nnunet: Path) -> Path:
    """Folder with the masks and probabilities of `nnUNetv2_predict`, fold 0, mirroring as trained."""
    return predicted_by_nnunet


@pytest.fixture(scope='module')
def predictor(refined: Workspace) -> nnUNetPredictor:
    predictor = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), use_folds=(0,),
                                                   checkpoint_name='checkpoint_final.pth')
    return predictor


@pytest.fixture(scope='module')
def images(refined: Workspace, predictor: nnUNetPredictor) -> list[tuple[np.ndarray, dict]]:
    """The held-out cases as nnU-Net's reader of this data set gives them."""
    reader = predictor.plans_manager.image_reader_writer_class()
    return [reader.read_images([str(refined.raw / 'imagesTs' / f'{case}_0000.nii.gz')]) for case in CASES]


def assert_as_predicted(predicted: Path, case: str, labels: np.ndarray,
                        probabilities: np.ndarray | None = None) -> None:
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(predicted / f'{case}.nii.gz')))
    assert expected.max() > 0
    np.testing.assert_array_equal(labels, expected)
    if probabilities is not None:
        saved = np.load(predicted / f'{case}.npz')['probabilities']
        np.testing.assert_allclose(probabilities, saved, atol=1e-6)  # the softmax is taken in another process


def test_a_single_array(predicted, predictor, images):
    for case, (image, properties) in zip(CASES, images, strict=True):
        labels, probabilities = predictor.predict_single_npy_array(image, properties, None, None, True)
        assert_as_predicted(predicted, case, labels, probabilities)


def test_a_list_of_arrays(predicted, predictor, images):
    arrays, properties = map(list, zip(*images, strict=True))
    segmentations = predictor.predict_from_list_of_npy_arrays(
        arrays, None, properties, None, 1, save_probabilities=False, num_processes_segmentation_export=1)
    for case, labels in zip(CASES, segmentations, strict=True):
        assert_as_predicted(predicted, case, labels)


def test_lists_of_files_without_processes_returned_and_written(predicted, refined, predictor, tmp_path):
    files = [[str(refined.raw / 'imagesTs' / f'{case}_0000.nii.gz')] for case in CASES]
    for case, (labels, probabilities) in zip(
            CASES, predictor.predict_from_files_sequential(files, None, save_probabilities=True), strict=True):
        assert_as_predicted(predicted, case, labels, probabilities)
    predictor.predict_from_files_sequential(files, [str(tmp_path / case) for case in CASES])
    for case in CASES:
        assert filecmp.cmp(predicted / f'{case}.nii.gz', tmp_path / f'{case}.nii.gz', shallow=False)


def preprocessed(predictor: nnUNetPredictor, images: list[tuple[np.ndarray, dict]]) -> Iterator[dict]:
    """An own iterator over preprocessed cases, as in nnU-Net's examples."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    for image, properties in images:
        data, _, properties = preprocessor.run_case_npy(image, None, properties, predictor.plans_manager,
                                                        predictor.configuration_manager, predictor.dataset_json)
        yield {'data': torch.from_numpy(data).contiguous(), 'data_properties': properties, 'ofile': None}


def test_an_own_iterator(predicted, predictor, images):
    segmentations = predictor.predict_from_data_iterator(preprocessed(predictor, images),
                                                         num_processes_segmentation_export=1)
    for case, labels in zip(CASES, segmentations, strict=True):
        assert_as_predicted(predicted, case, labels)


def test_logits_of_preprocessed_data(predicted, predictor, images):
    case, = preprocessed(predictor, images[:1])
    logits = predictor.predict_logits_from_preprocessed_data(case['data'])
    assert logits.shape == (3, *case['data'].shape[1:])
    assert torch.isfinite(logits).all()
    again = predictor.predict_logits_from_preprocessed_data(case['data'])
    assert torch.equal(logits, again)
    labels = convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, predictor.plans_manager, predictor.configuration_manager, predictor.label_manager,
        case['data_properties'])
    assert_as_predicted(predicted, CASES[0], labels)


def test_the_command_line_of_3d_slicer(refined, predictor, images, tmp_path):
    """Slicer's extension is given the data set's folder and knows only what the names of the folders in it say."""
    chosen = tmp_path / 'models' / refined.raw.name
    shutil.copytree(refined.model(REFINED), chosen / refined.model(REFINED).name)
    model = next(chosen.rglob('dataset.json')).parent
    trainer, plans, configuration = model.name.split('__')
    assert (model / 'fold_0' / 'checkpoint_final.pth').is_file()
    source, output = tmp_path / 'input', tmp_path / 'output'
    source.mkdir()
    output.mkdir()
    shutil.copy(refined.raw / 'imagesTs' / f'{CASES[0]}_0000.nii.gz', source / 'volume_0000.nii.gz')
    models = str(model.parent.parent)
    succeed('nnUNetv2_predict', '-i', source.as_posix(), '-o', output.as_posix(), '-d', model.parent.name,
            '-tr', trainer, '-p', plans, '-c', configuration, '-f', '0', '-npp', '1', '-nps', '1', '-step_size', '0.5',
            '-device', 'cpu', '-chk', 'checkpoint_final.pth', '--disable_tta',
            environment={'nnUNet_preprocessed': models, 'nnUNet_raw': models, 'nnUNet_results': models})
    written, = output.rglob('*.nii*')
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(written)))

    predictor.use_mirroring = False
    try:
        expected = predictor.predict_single_npy_array(*images[0])
    finally:
        predictor.use_mirroring = True
    np.testing.assert_array_equal(labels, expected)
