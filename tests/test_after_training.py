"""What nnU-Net users do after training, by nnU-Net's commands, with a stock and a PDDDPM model of three folds."""
from __future__ import annotations

import filecmp
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from conftest import (
    DATASET,
    DATASET_ID,
    PLANS,
    REFINED,
    STOCK,
    Workspace,
    in_this_process,
    make_trainer,
    predict,
    predict_in_process,
    printed_commands,
    succeed_in_process,
)

CASES = ('phantom_009', 'phantom_010')
FOLDS = (0, 1, 2)
LABELS = (1, 2)
CROSSVALIDATION = 'crossval_results_folds_0_1_2'


@pytest.fixture(scope='module')
def results(refined: Workspace, tmp_path_factory) -> Path:
    """The data set's folder in an own nnUNet_results: all three folds of both models, validated with probabilities."""
    folder = tmp_path_factory.mktemp('results') / DATASET
    with pytest.MonkeyPatch.context() as patch:
        for trainer in (STOCK, REFINED):
            shutil.copytree(refined.model(trainer), folder / refined.model(trainer).name)
        patch.setenv('nnUNet_results', str(folder.parent))
        with in_this_process():
            make_trainer(REFINED, 2).run_training()
            for trainer in (STOCK, REFINED):
                for fold in FOLDS:
                    trained = make_trainer(trainer, fold)
                    trained.load_checkpoint(str(Path(trained.output_folder) / 'checkpoint_final.pth'))
                    trained.perform_actual_validation(save_probabilities=True)
        yield folder


def model(results: Path, trainer: str) -> Path:
    return results / f'{trainer}__{PLANS}__3d_fullres'


@pytest.fixture(scope='module')
def predicted(results: Path, tmp_path_factory) -> dict[str, Path]:
    """The held-out cases by the three folds of either model, with probabilities and without mirroring, for speed."""
    folders = {trainer: tmp_path_factory.mktemp(trainer) for trainer in (STOCK, REFINED)}
    predict_in_process(Path(os.environ['nnUNet_raw']) / DATASET / 'imagesTs', folders[STOCK], DATASET_ID, '3d_fullres',
                       STOCK, '--save_probabilities', folds=FOLDS)
    predict(folders[REFINED], REFINED, '--save_probabilities', '--disable_tta', folds=FOLDS)
    return folders


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {file.name: read(file) for file in folder.glob('*.nii.gz')}


def foreground_dice(predictions: dict[str, np.ndarray], truth: Path) -> float:
    """Mean over labels of the mean over cases, as in nnU-Net's summary.json; the phantoms hold every label."""
    dice = np.zeros((len(predictions), len(LABELS)))
    for i, (name, prediction) in enumerate(predictions.items()):
        labels = read(truth / name)
        for j, label in enumerate(LABELS):
            of_truth, of_prediction = labels == label, prediction == label
            dice[i, j] = 2 * (of_truth & of_prediction).sum() / (of_truth.sum() + of_prediction.sum())
    return dice.mean()


def summary_dice(folder: Path) -> float:
    return json.loads((folder / 'summary.json').read_text())['foreground_mean']['Dice']


def validation_masks(results: Path, trainer: str) -> dict[str, np.ndarray]:
    """The validation cases of all folds."""
    return {name: mask for fold in FOLDS
            for name, mask in masks(model(results, trainer) / f'fold_{fold}' / 'validation').items()}


def test_find_best_configuration_compares_both_and_its_commands_work(results, refined, tmp_path, monkeypatch, capsys):
    succeed_in_process('nnUNetv2_find_best_configuration', str(DATASET_ID), '-c', '3d_fullres', '-tr', STOCK, REFINED,
                       '-p', PLANS, '-f', *map(str, FOLDS), '-np', '1')
    printed = capsys.readouterr().out
    found = json.loads((results / 'inference_information.json').read_text())['all_results']
    names = [model(results, trainer).name for trainer in (STOCK, REFINED)]
    assert set(found) == {*names, f'ensemble___{names[0]}___{names[1]}___0_1_2'}
    for trainer, name in zip((STOCK, REFINED), names, strict=True):
        assert f'{name}: {found[name]}' in printed
        merged = validation_masks(results, trainer)
        assert len(merged) == 9
        assert found[name] == pytest.approx(foreground_dice(merged, refined.raw / 'labelsTr'))

    commands = printed_commands(results, refined.raw / 'imagesTs', tmp_path)
    assert len(commands) in (2, 4)  # one model, or two and their ensemble; then the postprocessing
    for variable in ('nnUNet_npp', 'nnUNet_nps'):
        monkeypatch.setenv(variable, '0')
    for command in commands:
        succeed_in_process(*command)
    for case in CASES:
        mask = sitk.ReadImage(str(tmp_path / 'OUTPUT_FOLDER_PP' / f'{case}.nii.gz'))
        image = sitk.ReadImage(str(refined.raw / 'imagesTs' / f'{case}_0000.nii.gz'))
        assert mask.GetSize() == image.GetSize()
        assert mask.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-5)
        truth = read(refined.raw / 'labelsTs' / f'{case}.nii.gz') > 0
        organ = sitk.GetArrayFromImage(mask) > 0
        assert 2 * (organ & truth).sum() / (organ.sum() + truth.sum()) > 0.5


def test_crossval_results_are_accumulated_and_their_postprocessing_is_applied(results, refined, predicted, tmp_path):
    merged = tmp_path / 'merged'
    succeed_in_process('nnUNetv2_accumulate_crossval_results', str(DATASET_ID), '-c', '3d_fullres', '-tr', REFINED,
                       '-p', PLANS, '-f', *map(str, FOLDS), '-o', str(merged))
    for name, mask in validation_masks(results, REFINED).items():
        np.testing.assert_array_equal(read(merged / name), mask)
    assert summary_dice(merged) == pytest.approx(foreground_dice(masks(merged), refined.raw / 'labelsTr'))

    succeed_in_process('nnUNetv2_determine_postprocessing', '-i', str(merged), '-ref', str(refined.raw / 'labelsTr'),
                       '-np', '1')
    assert summary_dice(merged / 'postprocessed') >= summary_dice(merged)

    succeed_in_process('nnUNetv2_apply_postprocessing', '-i', str(predicted[REFINED]), '-o', str(tmp_path / 'applied'),
                       '-pp_pkl_file', str(merged / 'postprocessing.pkl'), '-np', '1')
    for name, mask in masks(predicted[REFINED]).items():
        for function, arguments in zip(*load_pickle(str(merged / 'postprocessing.pkl')), strict=True):
            mask = function(mask, **arguments)
        np.testing.assert_array_equal(read(tmp_path / 'applied' / name), mask)


def test_ensemble_of_a_stock_and_a_pdddpm_model(predicted, tmp_path):
    succeed_in_process('nnUNetv2_ensemble', '-i', str(predicted[STOCK]), str(predicted[REFINED]), '-o', str(tmp_path),
                       '-np', '1', '--save_npz')
    for case in CASES:
        of_both = [np.load(folder / f'{case}.npz')['probabilities'] for folder in predicted.values()]
        assert np.abs(of_both[0] - of_both[1]).max() > 1e-3
        mean = np.mean(of_both, 0)
        np.testing.assert_allclose(np.load(tmp_path / f'{case}.npz')['probabilities'], mean, atol=1e-6)
        chosen = np.take_along_axis(mean, read(tmp_path / f'{case}.nii.gz')[None].astype(int), 0)[0]
        np.testing.assert_allclose(chosen, mean.max(0), atol=1e-6)


def test_evaluate_folder(results, refined, predicted, tmp_path):
    succeed_in_process('nnUNetv2_evaluate_folder', str(refined.raw / 'labelsTs'), str(predicted[REFINED]),
                       '-djfile', str(model(results, REFINED) / 'dataset.json'),
                       '-pfile', str(model(results, REFINED) / 'plans.json'), '-o', str(tmp_path / 'summary.json'),
                       '-np', '1')
    assert summary_dice(tmp_path) == pytest.approx(
        foreground_dice(masks(predicted[REFINED]), refined.raw / 'labelsTs'))


def test_without_processes_and_continued_prediction_give_the_same_files(results, predicted, tmp_path):
    """`-npp 0 -nps 0 --continue_prediction` predicts what is missing and leaves what is there."""
    finished, missing = CASES
    (tmp_path / f'{finished}.nii.gz').write_bytes(b'an earlier result')
    predict_in_process(Path(os.environ['nnUNet_raw']) / DATASET / 'imagesTs', tmp_path, DATASET_ID, '3d_fullres',
                       REFINED, '--continue_prediction', folds=FOLDS)
    assert (tmp_path / f'{finished}.nii.gz').read_bytes() == b'an earlier result'
    assert filecmp.cmp(predicted[REFINED] / f'{missing}.nii.gz', tmp_path / f'{missing}.nii.gz', shallow=False)
