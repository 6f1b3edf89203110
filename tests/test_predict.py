"""Prediction with nnU-Net's unmodified commands and its Python API."""
from __future__ import annotations

import filecmp
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import (
    DATASET,
    DATASET_ID,
    PLANS,
    REFINED,
    STOCK,
    Workspace,
    predict_in_process,
    run_command,
    succeed,
    succeed_in_process,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

CASES = ('phantom_009', 'phantom_010')


def read(folder: Path, case: str) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f'{case}.nii.gz')))


def assert_same_files(one: Path, other: Path) -> None:
    for case in CASES:
        assert filecmp.cmp(one / f'{case}.nii.gz', other / f'{case}.nii.gz', shallow=False), case


def predict(workspace: Workspace, output: Path, trainer: str, *flags: str) -> None:
    """nnU-Net's command on the held-out cases, without background processes."""
    predict_in_process(workspace.raw / 'imagesTs', output, DATASET_ID, '3d_fullres', trainer, *flags, mirroring=True)


def predict_array(workspace: Workspace, trainer: str, folds: tuple[int, ...] = (0,),
                  case: str = CASES[0]) -> tuple[np.ndarray, np.ndarray]:
    """Label map and class probabilities of a held-out case, without mirroring, through nnU-Net's Python API."""
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(workspace.model(trainer)), folds)
    image = workspace.raw / 'imagesTs' / f'{case}_0000.nii.gz'
    array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(image)])
    labels, probabilities = predictor.predict_single_npy_array(array, properties,
                                                               save_or_return_probabilities=True)
    return labels, probabilities


@pytest.fixture
def predicted(predicted_by_nnunet: Path) -> Path:
    """Folder with the refined prediction of fold 0, with probabilities, by `nnUNetv2_predict` in processes."""
    return predicted_by_nnunet


def test_start_0_and_mask_stock_1_are_the_stock_prediction_voxel_for_voxel(refined, tmp_path, monkeypatch):
    predict(refined, tmp_path / 'stock', STOCK)
    for name, variables in (('start', {'start': '0'}), ('mask', {'mask_stock': '1', 'mask_blind': '0'})):
        with monkeypatch.context() as patch:
            for variable, value in variables.items():
                patch.setenv(f'nnUNet_pdddpm_{variable}', value)
            predict(refined, tmp_path / name, REFINED)
        assert_same_files(tmp_path / 'stock', tmp_path / name)


def test_predicting_again_and_in_two_parts_gives_the_same_files(predicted, refined, tmp_path):
    predict(refined, tmp_path / 'again', REFINED)
    for part in ('0', '1'):
        predict(refined, tmp_path / 'parts', REFINED, '-num_parts', '2', '-part_id', part)
    assert_same_files(predicted, tmp_path / 'again')
    assert_same_files(predicted, tmp_path / 'parts')


def test_the_mask_has_the_geometry_of_its_image_and_the_probabilities_sum_to_one(predicted, refined):
    for case in CASES:
        mask = sitk.ReadImage(str(predicted / f'{case}.nii.gz'))
        image = sitk.ReadImage(str(refined.raw / 'imagesTs' / f'{case}_0000.nii.gz'))
        assert mask.GetSize() == image.GetSize()
        for of_mask, of_image in ((mask.GetSpacing(), image.GetSpacing()), (mask.GetOrigin(), image.GetOrigin()),
                                  (mask.GetDirection(), image.GetDirection())):
            assert of_mask == pytest.approx(of_image, abs=1e-5)
        probabilities = np.load(predicted / f'{case}.npz')['probabilities']
        assert probabilities.shape == (3, *read(predicted, case).shape)
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-4)
        np.testing.assert_array_equal(probabilities.argmax(0), read(predicted, case))


def test_predict_from_modelfolder_gives_the_same_files(predicted, refined, tmp_path):
    succeed('nnUNetv2_predict_from_modelfolder', '-i', str(refined.raw / 'imagesTs'), '-o', str(tmp_path), '-m',
            str(refined.model(REFINED)), '-f', '0', '-device', 'cpu', '-npp', '1', '-nps', '1')
    assert_same_files(predicted, tmp_path)


def test_an_exported_zip_predicts_the_same_from_an_empty_results_folder(predicted, refined, tmp_path, monkeypatch):
    archive, results = tmp_path / 'model.zip', tmp_path / 'results'
    results.mkdir()
    succeed_in_process('nnUNetv2_export_model_to_zip', '-d', str(DATASET_ID), '-o', str(archive), '-c', '3d_fullres',
                       '-tr', REFINED, '-p', PLANS, '-f', '0')
    monkeypatch.setenv('nnUNet_results', str(results))
    succeed_in_process('nnUNetv2_install_pretrained_model_from_zip', str(archive))
    assert not (results / DATASET / refined.model(STOCK).name).exists()
    predict(refined, tmp_path / 'prediction', REFINED)
    assert_same_files(predicted, tmp_path / 'prediction')


def test_several_folds_and_no_mirroring(refined, tmp_path):
    predict_in_process(refined.raw / 'imagesTs', tmp_path, DATASET_ID, '3d_fullres', REFINED, '--save_probabilities',
                       folds=(0, 1))
    saved = np.load(tmp_path / f'{CASES[0]}.npz')['probabilities']
    single = [predict_array(refined, REFINED, (fold,))[1] for fold in (0, 1)]
    assert np.abs(single[0] - single[1]).max() > 0.01  # two different models
    # nnU-Net averages logits over folds
    both = np.exp((np.log(single[0]) + np.log(single[1])) / 2)
    np.testing.assert_allclose(saved, both / both.sum(0), atol=0.02)


def test_the_mask_is_not_the_stock_models(refined):
    stock, of_blind = (predict_array(refined, trainer)[1] for trainer in (STOCK, REFINED))
    assert np.abs(stock - of_blind).max() > 1e-3


def set_settings(monkeypatch, **settings: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f'nnUNet_pdddpm_{name}', value)


@pytest.mark.parametrize('override', [{'start': '1'}, {'steps': '3'}, {'mask_samples': '3'}, {'mask_stock': '0.5'},
                                      {'mask_blind': '0.5'}, {'seed': '7'}, {'start_mask': 'hard'},
                                      {'samples_from': 'stock'}, {'temperature': '3'}], ids=str)
def test_environment_variables_change_a_mask_that_is_the_mean_of_samples_and_it_is_said_once(
        refined, monkeypatch, override):
    set_settings(monkeypatch, mask_blind='0', mask_samples='4')  # a single one starts from the hard mask
    before = predict_array(refined, REFINED)[1]
    set_settings(monkeypatch, **override)
    with pytest.warns(UserWarning) as warned:
        assert not np.array_equal(predict_array(refined, REFINED)[1], before)
    assert sum('The environment overrides the sampling settings of the model' in str(warning.message)
               for warning in warned) == 1


def test_settings_of_samples_leave_the_default_mask_as_it_is(refined, monkeypatch, recwarn):
    labels, before = predict_array(refined, REFINED)
    assert not any('The environment overrides' in str(warning.message) for warning in recwarn)
    with monkeypatch.context() as patch:
        set_settings(patch, start='1', steps='3', samples='2', seed='7', temperature='3', redraw='0', dependence='0')
        np.testing.assert_array_equal(predict_array(refined, REFINED)[1], before)
    monkeypatch.setenv('nnUNet_pdddpm_blind_temperature', '4')
    cooler, probabilities = predict_array(refined, REFINED)
    assert (cooler == labels).mean() > 0.999  # but for ties in half precision
    assert probabilities.max(0).mean() < before.max(0).mean() - 0.05


@pytest.mark.parametrize(('settings', 'says'), [
    ({'start': '1.5'}, r'^nnUNet_pdddpm_start=1.5 in .* is out of range: it must lie in 0 to 1\.$'),
    ({'start': 'nan'}, r'^nnUNet_pdddpm_start=nan in .* is out of range: it must lie in 0 to 1\.$'),
    ({'steps': '-1'}, r'^nnUNet_pdddpm_steps=-1 in .* is out of range: it must lie in 1 to 1000\.$'),
    ({'steps': '1.5'}, r'nnUNet_pdddpm_steps must be a whole number, got "1.5"\.$'),
    ({'samples': 'many'}, r'nnUNet_pdddpm_samples must be a whole number, got "many"\.$'),
    ({'mask_samples': '0'}, r'^nnUNet_pdddpm_mask_samples=0 in .* it must lie in 1 to 10000\.$'),
    ({'temperature': 'hot'}, r'nnUNet_pdddpm_temperature must be a number, got "hot"\.$'),
    ({'samples_from': 'truth'}, r'^nnUNet_pdddpm_samples_from=truth in .* it must be one of chain, stock, blind\.$'),
    ({'start_mask': 'soft'}, r'^nnUNet_pdddpm_start_mask=soft in .* it must be one of drawn, hard\.$'),
    ({'mask_stock': '0.7', 'mask_blind': '0.5'}, r'^mask_stock=0.7 and mask_blind=0.5 in .* cannot be above 1'),
    ({'t_start': '300'}, r'nnUNet_pdddpm_t_start is unknown; the known ones are nnUNet_pdddpm_start, '),
    ({'blend': '0.5'}, r'nnUNet_pdddpm_blend is unknown')], ids=str)
def test_a_wrong_setting_is_refused_by_name(refined, monkeypatch, settings, says):
    set_settings(monkeypatch, **settings)
    with pytest.raises(ValueError, match=says):
        predict_array(refined, REFINED)


def test_a_refused_prediction_exits_with_an_error_and_leaves_earlier_results(predicted, refined, tmp_path):
    shutil.copytree(predicted, tmp_path / 'out')
    result = run_command(
        'nnUNetv2_predict', '-i', str(refined.raw / 'imagesTs'), '-o', str(tmp_path / 'out'), '-d', str(DATASET_ID),
        '-c', '3d_fullres', '-tr', REFINED, '-p', PLANS, '-f', '0', '-device', 'cpu',
        environment={'nnUNet_pdddpm_start': '1.5'})
    assert result.returncode != 0
    assert 'start=1.5' in result.stdout.strip().splitlines()[-1]
    assert sorted(os.listdir(predicted)) == sorted(os.listdir(tmp_path / 'out'))
    assert_same_files(predicted, tmp_path / 'out')
