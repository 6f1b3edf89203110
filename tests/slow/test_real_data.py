"""nnU-Net's integration data sets in every configuration up to the ensemble, and a large volume of three channels.

A few iterations on a few cases: that every path runs is what it shows. The data sets are those of the Medical
Segmentation Decathlon and of open_ms_data, in nnU-Net's format in the folder that NNUNET_PDDDPM_DATA names.
"""
from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import (
    BRIEF,
    BRIEF_STOCK,
    CASCADE,
    PLANS,
    REFINED,
    Workspace,
    add_cascade,
    in_this_process,
    make_trainer,
    predict_in_process,
    prepare,
    printed_commands,
    succeed_in_process,
    train_in_process,
)

from nnunet_pdddpm.commands.predict import main

pytestmark = pytest.mark.slow

HIPPOCAMPUS, LESION = 'Dataset004_Hippocampus', 'Dataset006_MSLesion'
INTEGRATION = {number: f'Dataset{number}_IntegrationTest_Hippocampus{labels}' for number, labels in
               ((999, ''), (998, '_ignore'), (997, '_regions'), (996, '_regions_ignore'))}
CONFIGURATIONS = ('2d', '3d_lowres', '3d_fullres', CASCADE)
UNMIRRORED = 'nnUNetTrainerUnmirrored'
TRAINERS = (UNMIRRORED, REFINED)
NUM_TRAINING, NUM_TEST, FOLDS = 9, 2, (0, 1, 2)


def copy_cases(folders: Workspace, name: str, training: slice, test: slice) -> Path:
    """Cases of a data set with labels as a raw data set; skips where it is not at hand."""
    source, raw = Path(os.environ.get('NNUNET_PDDDPM_DATA', '')) / name, folders.root / 'nnUNet_raw' / name
    if not (source / 'dataset.json').is_file():
        pytest.skip(f'{name} is not in the folder that NNUNET_PDDDPM_DATA names')
    cases = sorted(file.name[:-len('.nii.gz')] for file in (source / 'labelsTr').glob('*.nii.gz'))
    for part, chosen in (('Tr', cases[training]), ('Ts', cases[test])):
        for case in chosen:
            for file in (*source.glob(f'imagesTr/{case}_????.nii.gz'), source / 'labelsTr' / f'{case}.nii.gz'):
                target = raw / file.parent.name.replace('Tr', part)
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
    description = json.loads((source / 'dataset.json').read_text())
    (raw / 'dataset.json').write_text(json.dumps({**description, 'numTraining': len(cases[training])}))
    return raw


def assert_geometry(file: Path, image: Path) -> None:
    written, read = sitk.ReadImage(str(file)), sitk.ReadImage(str(image))
    for of in ('GetSize', 'GetSpacing', 'GetOrigin', 'GetDirection'):
        assert getattr(written, of)() == pytest.approx(getattr(read, of)(), abs=1e-5), (file, of)


def assert_masks(raw: Path, masks: Path) -> None:
    """Each test case has a mask with its image's geometry and some of the labels that are predicted."""
    labels = json.loads((raw / 'dataset.json').read_text())['labels']
    known = set(np.hstack([value for name, value in labels.items() if name != 'ignore']).tolist())
    for image in (raw / 'imagesTs').iterdir():
        mask = masks / image.name.replace('_0000', '')
        assert_geometry(mask, image)
        assert {0} < set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))).tolist()) <= known, mask


@pytest.fixture(scope='module')
def hippocampus(folders) -> Path:
    return copy_cases(folders, HIPPOCAMPUS, slice(NUM_TRAINING), slice(NUM_TRAINING, NUM_TRAINING + NUM_TEST))


@pytest.mark.parametrize('number', INTEGRATION)
def test_integration_of_every_configuration(folders, hippocampus, tmp_path, monkeypatch, number):
    """Three folds of eight models, both cascades, and the best model or ensemble by the commands nnU-Net prints."""
    raw, results = hippocampus.parent / INTEGRATION[number], folders.root / 'nnUNet_results' / INTEGRATION[number]
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', UNMIRRORED)
    for variable in ('nnUNet_npp', 'nnUNet_nps'):
        monkeypatch.setenv(variable, '0')
    runpy.run_module(f'nnunetv2.dataset_conversion.datasets_for_integration_tests.{raw.name}', run_name='__main__')
    add_cascade(prepare(raw, '2d', '3d_fullres'))
    for trainer in TRAINERS:
        for configuration in CONFIGURATIONS:
            for fold in FOLDS:
                train_in_process(number, configuration, fold, trainer, '--npz')

    succeed_in_process('nnUNetv2_find_best_configuration', str(number), '-c', *CONFIGURATIONS, '-tr', *TRAINERS,
                       '-p', PLANS, '-f', *map(str, FOLDS), '-np', '1')
    found = json.loads((results / 'inference_information.json').read_text())
    dice = {name: value for name, value in found['all_results'].items() if not name.startswith('ensemble')}
    assert len(dice) == 8 and len(found['all_results']) == 8 + 28
    assert all(value > 0 for value in dice.values()), dice

    previous = {trainer: tmp_path / f'{trainer}_previous' for trainer in TRAINERS}
    for trainer, folder in previous.items():
        predict_in_process(raw / 'imagesTs', folder, number, '3d_lowres', trainer, folds=FOLDS)
        predict_in_process(raw / 'imagesTs', tmp_path / trainer, number, CASCADE, trainer, '-prev_stage_predictions',
                           str(folder), folds=FOLDS)
        assert_masks(raw, tmp_path / trainer)

    for words in printed_commands(results, raw / 'imagesTs', tmp_path):
        if CASCADE in words:  # for which it prints no -prev_stage_predictions, whatever the trainer (nnU-Net 2.8.1)
            words += ['-prev_stage_predictions', str(previous[words[words.index('-tr') + 1]])]
        succeed_in_process(*words)
    assert_masks(raw, tmp_path / 'OUTPUT_FOLDER_PP')


def test_a_large_volume_of_three_channels(folders, tmp_path, monkeypatch):
    """182 x 218 x 182 voxels: trained, validated, and predicted with eight samples, all maps and the report."""
    raw = copy_cases(folders, LESION, slice(None), slice(1))
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)
    file = prepare(raw, '3d_fullres') / f'{PLANS}.json'
    plans = json.loads(file.read_text())
    plans['configurations']['3d_fullres']['patch_size'] = [96, 96, 96]
    file.write_text(json.dumps(plans))
    make_trainer(BRIEF_STOCK, 0, dataset=6).run_training()
    train_in_process(6, '3d_fullres', 0, BRIEF)
    with in_this_process():
        main(['-i', str(raw / 'imagesTs'), '-o', str(tmp_path), '-d', '6', '-c', '3d_fullres', '-tr', BRIEF,
              '-p', PLANS, '-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '-samples', '8', '--save_samples',
              '--uncertainty', 'all', '--report'])
    assert len(list((tmp_path / 'samples').iterdir())) == 8
    for file in tmp_path.rglob('*.nii.gz'):
        assert_geometry(file, raw / 'imagesTs' / 'ms_07_0000.nii.gz')
    assert 'ms_07' in (tmp_path / 'report.html').read_text()
