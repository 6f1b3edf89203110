"""2d, 3d_lowres and the cascade on it; whose predictions of the previous stage a cascade is trained on."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import (
    BRIEF,
    BRIEF_STOCK,
    CASCADE,
    PLANS,
    add_cascade,
    make_trainer,
    predict_in_process,
    prepare,
    train_in_process,
)

from nnunet_pdddpm.commands import check
from nnunet_pdddpm.demo.phantom import write_dataset
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.fold import FoldData

DATASET_ID = 703
DATASET = f'Dataset{DATASET_ID}_Cascade'
FOLDS = 2


def predictions(trainer: str) -> Path:
    """Folder of the previous stage's predictions."""
    model = Path(os.environ['nnUNet_results']) / DATASET / f'{trainer}__{PLANS}__3d_lowres'
    return model / 'predicted_next_stage' / CASCADE


@pytest.fixture(scope='module')
def cascade(folders) -> Path:
    """Raw data set with every configuration preprocessed, and stock models of 3d_lowres (validated) and the cascade."""
    raw = Path(os.environ['nnUNet_raw']) / DATASET
    write_dataset(raw, num_training=4, num_test=1, shape=(14, 24, 18), seed=3)
    add_cascade(prepare(raw, '2d', '3d_fullres', folds=FOLDS))
    for fold in range(FOLDS):
        train_in_process(DATASET_ID, '3d_lowres', fold, BRIEF_STOCK)
    for fold in range(FOLDS):
        make_trainer(BRIEF_STOCK, fold, CASCADE, DATASET_ID).run_training()
    return raw


@pytest.fixture
def brief_presegmenter(monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)


@pytest.fixture
def scratch(cascade, brief_presegmenter, tmp_path, monkeypatch) -> Path:
    """An own copy of the stock models."""
    results = tmp_path / 'nnUNet_results'
    shutil.copytree(Path(os.environ['nnUNet_results']) / DATASET, results / DATASET)
    monkeypatch.setenv('nnUNet_results', str(results))
    return results / DATASET


def log_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


def test_3d_lowres_is_trained_and_leaves_the_next_stage_its_predictions(scratch):
    train_in_process(DATASET_ID, '3d_lowres', 0, BRIEF)
    written = {file.stem for file in predictions(BRIEF).iterdir()}
    assert written == {file.stem for file in predictions(BRIEF_STOCK).iterdir()} - {'phantom_001', 'phantom_003'}
    trainer = make_trainer(BRIEF, 0, CASCADE, DATASET_ID)
    trainer.initialize()
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, ['phantom_000'], str(predictions(BRIEF)))
    image, _, previous, _ = data.load_case('phantom_000')
    assert previous.shape == image.shape[1:] and set(np.unique(previous[:])) <= {0, 1, 2}


def test_a_cascade_is_trained_on_the_stock_predictions_validated_and_predicts(scratch, tmp_path):
    train_in_process(DATASET_ID, CASCADE, 0, BRIEF)
    model = scratch / f'{BRIEF}__{PLANS}__{CASCADE}'
    log = next((model / 'fold_0').glob('training_log*')).read_text()
    assert log.count('Previous stage:') == 1 and f'Previous stage: {predictions(BRIEF_STOCK)}' in log
    assert len(list((model / 'fold_0' / 'validation').glob('*.nii.gz'))) == 2

    source = Path(os.environ['nnUNet_raw']) / DATASET / 'imagesTs'
    case = next(source.iterdir())
    previous = {}
    for stage, label in (('empty', 0), ('full', 1)):
        image = sitk.ReadImage(str(case))
        mask = sitk.Cast(image * 0 + label, sitk.sitkUInt8)
        (tmp_path / stage).mkdir()
        sitk.WriteImage(mask, str(tmp_path / stage / case.name.replace('_0000', '')))
        output = tmp_path / f'on_{stage}'
        predict_in_process(source, output, DATASET_ID, CASCADE, BRIEF, '--save_probabilities',
                           '-prev_stage_predictions', str(tmp_path / stage))
        previous[stage] = np.load(next(output.glob('*.npz')))['probabilities']
    assert previous['empty'].shape == previous['full'].shape
    assert np.abs(previous['empty'] - previous['full']).max() > 0.01


def test_the_previous_stage_s_channels_reach_the_presegmenter_and_the_denoiser(scratch):
    trainer = make_trainer(BRIEF, 0, CASCADE, DATASET_ID)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.network.eval()
    assert trainer.num_input_channels == 3  # the image and two foreground labels
    batch = next(trainer.dataloader_train)
    image = batch['data']
    assert image.shape[1] == 3 and set(torch.unique(image[:, 1:]).tolist()) <= {0.0, 1.0}
    other = torch.cat([image[:, :1], 1 - image[:, 1:]], 1)
    noisy, _ = trainer.make_noisy_batch(image, batch['target'][0])
    with torch.no_grad():
        assert not torch.allclose(trainer.refiner.presegmenter(image), trainer.refiner.presegmenter(other))
        seen, flipped = trainer.network(noisy)[0], trainer.network(noisy._replace(image=other))[0]
    assert not torch.allclose(seen, flipped)

    to_tune_on = ValidationCases(FoldData.from_trainer(trainer))
    case = to_tune_on.load(to_tune_on.names[0])
    previous = to_tune_on.dataset.load_case(to_tune_on.names[0])[2][:]
    np.testing.assert_array_equal(case.image[1:], np.stack([previous == label for label in (1, 2)]))
    assert case.labels.shape == case.image.shape[1:] == previous.shape


def test_an_own_previous_stage_is_preferred_once_it_has_every_case(scratch):
    own = predictions(BRIEF)
    shutil.copytree(predictions(BRIEF_STOCK), own)
    trainer = make_trainer(BRIEF, 0, CASCADE, DATASET_ID)
    trainer.on_train_start()
    assert f'Previous stage: {own}' in log_of(trainer)
    assert trainer.dataloader_train.data_loader._data.folder_with_segs_from_previous_stage == str(own)
    assert trainer.dataloader_val.data_loader._data.folder_with_segs_from_previous_stage == str(own)

    next(own.iterdir()).unlink()
    trainer = make_trainer(BRIEF, 0, CASCADE, DATASET_ID)
    trainer.on_train_start()
    assert f'Previous stage: {predictions(BRIEF_STOCK)}' in log_of(trainer)


def test_without_a_previous_stage_training_is_refused_with_the_command_that_makes_it(scratch):
    for file in [*predictions(BRIEF_STOCK).iterdir()][:3]:
        file.unlink()
    trainer = make_trainer(BRIEF, 0, CASCADE, DATASET_ID)
    with pytest.raises(FileNotFoundError) as error:
        trainer.on_train_start()
    assert str(error.value) == (
        f'{CASCADE} needs the predictions of 3d_lowres for its 4 training and validation cases, and 4 are missing in '
        f'{predictions(BRIEF)} and 3 are missing in {predictions(BRIEF_STOCK)}. The validation of 3d_lowres writes '
        f'them, for every fold: nnUNetv2_train {DATASET} 3d_lowres FOLD -tr {BRIEF_STOCK} -p {PLANS} (with --val if '
        f'it is trained already).')
    assert not (Path(trainer.output_folder_base) / 'plans.json').exists()


def test_the_previous_stage_is_found_beside_a_presegmenter_named_by_its_folder(scratch, tmp_path, monkeypatch):
    elsewhere = tmp_path / 'elsewhere'
    shutil.move(scratch, elsewhere)
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', str(elsewhere / f'{BRIEF_STOCK}__{PLANS}__{CASCADE}'))
    trainer = make_trainer(BRIEF, 0, CASCADE, DATASET_ID)
    trainer.on_train_start()
    assert f'Previous stage: {elsewhere}' in log_of(trainer)


def test_check_looks_at_the_previous_stage(scratch, monkeypatch, capsys):
    monkeypatch.setattr(check, 'find_trainer', lambda trainer: '')
    check.main([str(DATASET_ID), '-p', PLANS, '-c', CASCADE])
    output = capsys.readouterr().out
    assert f'4 of 4 cases in {predictions(BRIEF_STOCK)}' in output
    assert f'0 of 4 cases in {predictions("PDDDPMTrainer")}' in output
    shutil.rmtree(predictions(BRIEF_STOCK))
    with pytest.raises(SystemExit):
        check.main([str(DATASET_ID), '-p', PLANS, '-c', CASCADE])
    assert f'Problem: {CASCADE} needs the predictions of 3d_lowres' in capsys.readouterr().out


def test_2d_is_trained_and_predicts_every_slice(scratch, tmp_path):
    make_trainer(BRIEF_STOCK, 0, '2d', DATASET_ID).run_training()
    train_in_process(DATASET_ID, '2d', 0, BRIEF)
    source = Path(os.environ['nnUNet_raw']) / DATASET / 'imagesTs'
    predict_in_process(source, tmp_path, DATASET_ID, '2d', BRIEF)
    image, mask = (sitk.ReadImage(str(next(folder.glob('*.nii.gz')))) for folder in (source, tmp_path))
    assert mask.GetSize() == image.GetSize()
    assert mask.GetOrigin() == pytest.approx(image.GetOrigin())
    assert mask.GetDirection() == pytest.approx(image.GetDirection())
