"""nnUNetv2_pdddpm_predict: files, geometry, numbers, repeatability, continuation and the Python API."""
from __future__ import annotations

import csv
import filecmp
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import DATASET, STOCK, Workspace
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from predicting import (
    EVERYTHING,
    MARGIN,
    OF_SAMPLES,
    OF_STOCK,
    QUICK,
    arguments,
    assert_same_results,
    command,
    images,
    model_folder,
    predict,
    predict_by_nnunet,
    read,
    refusal,
    rows,
    samples_of,
    write_odd_case,
)
from scipy import ndimage

from nnunet_pdddpm.commands.predict import SETTINGS, main_modelfolder
from nnunet_pdddpm.demo.phantom import make_case
from nnunet_pdddpm.inference.errors import PredictionError
from nnunet_pdddpm.inference.export import Outputs
from nnunet_pdddpm.inference.intervals import FIELDS
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.network.settings import KINDS, SamplingSettings
from nnunet_pdddpm.network.state import stored_settings
from nnunet_pdddpm.tuning.stored import store, store_calibration

CASES = ('odd', 'phantom_009', 'phantom_010')
@pytest.fixture(scope='module')
def source(refined: Workspace, tmp_path_factory) -> Path:
    """Two phantoms and the odd case."""
    folder = tmp_path_factory.mktemp('images')
    for file in (refined.raw / 'imagesTs').iterdir():
        shutil.copy(file, folder)
    write_odd_case(folder)
    return folder


@pytest.fixture(scope='module')
def one_case(source: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('one_image')
    shutil.copy(source / 'phantom_009_0000.nii.gz', folder)
    return folder


@pytest.fixture(scope='module')
def predicted(source: Path, tmp_path_factory) -> Path:
    """One fold, everything written."""
    return predict(source, tmp_path_factory.mktemp('predicted') / 'new' / 'folder', *EVERYTHING)


@pytest.fixture(scope='module')
def two_folds(source: Path, tmp_path_factory) -> Path:
    """Two folds, everything written."""
    return predict(source, tmp_path_factory.mktemp('two_folds'), *EVERYTHING, folds=(0, 1))


@pytest.fixture(scope='module')
def quick(one_case: Path, tmp_path_factory) -> Path:
    """One case with the model's own settings but two samples."""
    return predict(one_case, tmp_path_factory.mktemp('quick'), *QUICK, '-samples', '2')


# the mask: nnU-Net's with the same model, or the stock model's

@pytest.mark.parametrize('folds', [(0,), (0, 1)])
def test_the_default_mask_is_what_nnunets_own_command_predicts_with_the_model_byte_for_byte(
        folds, source, predicted, two_folds, tmp_path):
    ours = {(0,): predicted, (0, 1): two_folds}[folds]
    theirs = predict_by_nnunet(source, tmp_path / 'nnunet', folds, model_folder())
    for case in CASES:
        assert filecmp.cmp(theirs / f'{case}.nii.gz', ours / f'{case}.nii.gz', shallow=False), case
        np.testing.assert_array_equal(*(np.load(folder / f'{case}.npz')['probabilities'] for folder in (theirs, ours)))
    assert any(not filecmp.cmp(ours / f'{case}.nii.gz', ours / 'presegmentation' / f'{case}.nii.gz', shallow=False)
               for case in CASES)  # which is not the stock model's


@pytest.mark.parametrize('folds', [(0,), (0, 1)])
def test_presegmentation_start_0_and_mask_stock_1_are_stock_nnunets_prediction_byte_for_byte(
        folds, source, predicted, two_folds, one_case, tmp_path):
    stock = predict_by_nnunet(source, tmp_path / 'stock', folds, model_folder(STOCK))
    ours = {(0,): predicted, (0, 1): two_folds}[folds]
    for case in CASES:
        assert filecmp.cmp(stock / f'{case}.nii.gz', ours / 'presegmentation' / f'{case}.nii.gz', shallow=False), case
    for name, flags in (('start', ('-start', '0')), ('mask', OF_STOCK)):
        predict(one_case, tmp_path / name, *flags, '-samples', '1', folds=folds)
        assert filecmp.cmp(stock / f'{CASES[1]}.nii.gz', tmp_path / name / f'{CASES[1]}.nii.gz', shallow=False), name
        row = rows(tmp_path / name)[CASES[1]]
        assert all(values['volume_ml_stock'] is None for values in row['labels'].values())  # its mask is not written


def opened(folds: tuple[int, ...] = (0,), **overrides) -> PDDDPMPredictor:
    """A predictor of few tiles."""
    predictor = PDDDPMPredictor(tile_step_size=1, use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False,
                                overrides=overrides)
    predictor.initialize_from_trained_model_folder(str(model_folder()), folds)
    return predictor


def phantom() -> torch.Tensor:
    return torch.from_numpy(make_case((20, 26, 22), 3)[0])[None].float()


@pytest.mark.parametrize(('settings', 'of', 'denoiser_calls'), [
    ({'start': 0}, 'stock', 0), ({'samples_from': 'stock'}, 'stock', 1), ({'samples_from': 'blind'}, 'blind', 1),
    ({'samples_from': 'blind', 'mask_stock': 1, 'mask_blind': 0}, 'blind', 1),
    ({'samples_from': 'stock', 'mask_stock': 1, 'mask_blind': 0}, 'stock', 0)], ids=str)
def test_samples_without_a_chain_are_draws_from_tempered_probabilities_and_cost_no_call(refined, settings, of,
                                                                                       denoiser_calls):
    """The denoiser is called for the blind mask alone, once a tile."""
    samples = 100
    predictor = opened(samples=samples, temperature=2.0, blind_temperature=3.0, **settings)
    frequency = torch.zeros(3, 20, 26, 22)
    sizes = []

    def add(number: int, logits: torch.Tensor) -> None:
        mask = torch.nn.functional.one_hot(logits.argmax(0), 3).movedim(-1, 0)
        frequency.add_(mask, alpha=1 / samples)
        sizes.append(int(mask[1].sum()))
    prediction = predictor.predict_volume(phantom(), add)
    tiles = prediction.network_calls['stock']
    assert prediction.network_calls['denoiser'] == denoiser_calls * tiles
    assert tiles > 1
    logits = prediction.presegmentation.float() / 2 if of == 'stock' else \
        opened(samples=1, blind_temperature=3.0).predict_volume(phantom()).logits.float()  # the blind mask's own
    expected = torch.softmax(logits, 0)
    torch.testing.assert_close(prediction.spread.mean, expected, atol=1e-5, rtol=0)
    assert (frequency - expected).abs().max() < 4 * 0.5 / math.sqrt(samples)
    torch.testing.assert_close(prediction.spread.count_at(slice(None)).float() / samples, frequency)
    assert len(set(sizes)) > 10
    if settings.get('mask_stock') == 1 or settings.get('start') == 0:
        assert torch.equal(prediction.logits, prediction.presegmentation)


@pytest.mark.parametrize('steps', [1, 2, 3])
@pytest.mark.parametrize('redraw', [0, 1])
def test_a_chain_of_k_steps_makes_k_calls_of_the_denoiser_a_tile_and_sample(refined, steps, redraw):
    calls = opened(samples=3, steps=steps, redraw=redraw).predict_volume(phantom()).network_calls
    assert calls['denoiser'] == calls['stock'] * (3 * steps + 1)  # and one a tile for the mask
    without = opened(samples=3, steps=steps, mask_stock=1, mask_blind=0).predict_volume(phantom()).network_calls
    assert without['denoiser'] == without['stock'] * 3 * steps


def test_what_is_only_the_start_of_chains_is_not_mirrored(refined, monkeypatch):
    """Stock logits cost one call a tile, unless they are asked for, or mask or samples are made of them."""
    predictor = opened(samples=8, steps=1)
    predictor.use_mirroring = True
    mirrored, single = (predictor.predict_volume(phantom(), stock=stock) for stock in (True, False))
    assert mirrored.presegmentation is not None and single.presegmentation is None
    assert mirrored.network_calls['stock'] == 9 * single.network_calls['stock'] > 9
    assert mirrored.network_calls['denoiser'] == single.network_calls['denoiser'] == 16 * single.network_calls['stock']
    assert torch.equal(mirrored.logits, single.logits)  # the blind mask
    assert torch.equal(mirrored.spread.mean, single.spread.mean)  # the samples do not depend on what else is asked for
    for settings, calls in (({'mask_stock': 0.5, 'mask_blind': 0.5}, 9), ({'samples_from': 'stock'}, 8),
                            ({'start': 0.0}, 8)):
        needed = opened(samples=1, **settings)
        needed.use_mirroring = True
        found = needed.predict_volume(phantom(), stock=False).network_calls
        assert found['stock'] == calls * single.network_calls['stock'], settings


# files and their geometry

def test_everything_asked_for_is_written_and_nothing_else(predicted, two_folds, quick):
    maps = ['uncertainty', 'variance', 'mutual_information', 'probability_organ', 'probability_lesion']
    expected = {f'{case}{ending}' for case in CASES for ending in ('.nii.gz', '.npz', '.pkl')}
    expected |= {f'presegmentation/{case}.nii.gz' for case in CASES}
    expected |= {f'samples/{case}_s{i:02d}.nii.gz' for case in CASES for i in range(4)}
    expected |= {f'uncertainty/{case}_{name}.nii.gz' for case in CASES for name in maps}
    assert images(predicted).keys() == expected
    assert images(two_folds).keys() == expected | {f'uncertainty/{case}_variance_between_folds.nii.gz'
                                                   for case in CASES}
    assert images(quick).keys() == {'phantom_009.nii.gz', 'samples/phantom_009_s00.nii.gz',
                                    'samples/phantom_009_s01.nii.gz'}


def test_every_file_has_the_geometry_of_its_image(predicted, source):
    files = [file for file in predicted.rglob('*.nii.gz')]
    assert len(files) == 3 * (1 + 1 + 4 + 5)
    for file in files:
        case = next(case for case in CASES if file.name.startswith(case))
        written, image = (sitk.ReadImage(str(f)) for f in (file, source / f'{case}_0000.nii.gz'))
        assert written.GetSize() == image.GetSize(), file
        for what in ('GetSpacing', 'GetOrigin', 'GetDirection'):
            assert getattr(written, what)() == pytest.approx(getattr(image, what)(), abs=1e-5), (file, what)


def test_maps_lie_in_0_to_1_are_float32_and_0_outside_the_crop(predicted, two_folds):
    inside = np.zeros(read(predicted / 'odd.nii.gz').shape, bool)
    inside[tuple(slice(low, n - high) for (low, high), n in zip(MARGIN, inside.shape, strict=True))] = True
    for folder in (predicted, two_folds):
        for file in (folder / 'uncertainty').iterdir():
            image: nibabel.Nifti1Image = nibabel.load(file)
            assert image.get_data_dtype() == np.float32
            assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
            values = read(file)
            assert values.dtype == np.float32
            assert 0 <= values.min() < values.max() <= 1, file
            if file.name.startswith('odd'):
                assert (values[~inside] == 0).all(), file
                assert (values[inside] > 0).any()
    uncertainty, information = (read(predicted / 'uncertainty' / f'odd_{name}.nii.gz')
                                for name in ('uncertainty', 'mutual_information'))
    assert uncertainty.max() > 0.3
    assert (information <= uncertainty + 0.02).all()  # but for the overshoot of resampling


def test_probability_maps_are_the_probabilities_of_the_mask(predicted):
    for case in CASES:
        organ, lesion = (read(predicted / 'uncertainty' / f'{case}_probability_{name}.nii.gz')
                         for name in ('organ', 'lesion'))
        saved = np.load(predicted / f'{case}.npz')['probabilities']
        np.testing.assert_allclose(np.stack([1 - organ - lesion, organ, lesion]), saved, atol=1e-3)
        np.testing.assert_array_equal(saved.argmax(0), read(predicted / f'{case}.nii.gz'))


@pytest.mark.parametrize('reader', ['NibabelIOWithReorient', 'SimpleITKIOWithReorient'])
def test_with_a_reader_that_turns_images_files_have_the_affine_of_their_image(refined, tmp_path, reader):
    """Axes that the reader swaps and flips on the way in have to be swapped and flipped back."""
    model = tmp_path / 'model'
    shutil.copytree(model_folder(), model, ignore=shutil.ignore_patterns('validation', '*.png', 'fold_1'))
    plans = json.loads((model / 'plans.json').read_text())
    plans['image_reader_writer'] = reader
    (model / 'plans.json').write_text(json.dumps(plans))
    write_odd_case(tmp_path / 'images', (100, 10, -95))
    image = nibabel.load(tmp_path / 'images' / 'odd_0000.nii.gz')
    assert nibabel.aff2axcodes(image.affine) != ('R', 'A', 'S')
    main_modelfolder(['-i', str(tmp_path / 'images'), '-o', str(tmp_path / 'out'), '-m', str(model), '-f', '0',
                      '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar', '--uncertainty', 'all',
                      '-samples', '1', *QUICK])
    files = list((tmp_path / 'out').rglob('*.nii.gz'))
    assert len(files) == 1 + 1 + 5
    for file in files:
        written = nibabel.load(file)
        assert written.shape == image.shape
        np.testing.assert_allclose(written.affine, image.affine, atol=1e-4)
    mask, organ, lesion = (nibabel.load(tmp_path / 'out' / name).get_fdata() for name in (
        'odd.nii.gz', 'uncertainty/odd_probability_organ.nii.gz', 'uncertainty/odd_probability_lesion.nii.gz'))
    probabilities = np.stack([1 - organ - lesion, organ, lesion])
    second, first = np.sort(probabilities, axis=0)[1:]
    decided = first - second > 4 / 254  # maps of SimpleITKIOWithReorient have 8 bits
    assert decided.mean() > 0.9 and mask[decided].any()
    np.testing.assert_array_equal(probabilities.argmax(0)[decided], mask[decided])


# the same again

def test_two_parts_on_another_day_give_the_same_bytes(source, predicted, tmp_path):
    for part in ('1', '0'):
        predict(source, tmp_path, *EVERYTHING, '-num_parts', '2', '-part_id', part)
    assert_same_results(predicted, tmp_path)


def test_the_real_command_on_one_case_with_background_processes_gives_the_same_bytes(one_case, predicted, tmp_path):
    output = command(arguments(one_case, tmp_path, *EVERYTHING, '-npp', '1', '-nps', '2'))
    assert output.returncode == 0, output.stdout[-4000:]
    assert rows(tmp_path)[CASES[1]] == rows(predicted)[CASES[1]]
    alone, among = images(tmp_path), images(predicted)
    assert alone.keys() == {name for name in among if CASES[1] in name}
    assert [name for name in alone if alone[name] != among[name]] == []


# the summary

@pytest.mark.parametrize('folds', [1, 2])
def test_the_summary_is_what_the_files_say(folds, predicted, two_folds, source):
    folder = {1: predicted, 2: two_folds}[folds]
    lines = {(line['case'], line['label']): line
             for line in csv.DictReader((folder / 'pdddpm_summary.csv').open(newline=''))}
    summary = rows(folder)
    assert list(summary) == list(CASES) and lines.keys() == set(itertools.product(CASES, ('organ', 'lesion')))
    for case, row in summary.items():
        ml = np.prod(sitk.ReadImage(str(source / f'{case}_0000.nii.gz')).GetSpacing()) / 1000
        mask, stock = read(folder / f'{case}.nii.gz'), read(folder / 'presegmentation' / f'{case}.nii.gz')
        samples = [read(folder / 'samples' / f'{case}_s{i:02d}.nii.gz') for i in range(4)]
        assert row['num_samples'] == 4 and len(row['settings']) == folds
        assert row['versions'].keys() >= {'nnunet_pdddpm', 'nnunetv2', 'torch'}
        for name, label in (('organ', 1), ('lesion', 2)):
            values = row['labels'][name]
            of_samples = ml * np.array([(sample == label).sum() for sample in samples])
            expected = {'volume_ml': ml * (mask == label).sum(), 'volume_ml_stock': ml * (stock == label).sum(),
                        'volume_ml_mean': of_samples.mean(), 'volume_ml_sd': of_samples.std(ddof=1),
                        'samples_low_ml': of_samples.min(), 'samples_high_ml': of_samples.max(),
                        'components': ndimage.label(mask == label, np.ones((3, 3, 3)))[1]}
            if folds == 2:
                of_fold = of_samples[::2], of_samples[1::2]
                within = np.mean([own.var(ddof=1) for own in of_fold])
                between = np.var([own.mean() for own in of_fold], ddof=1) - within / 2
                expected['volume_ml_sd_between_folds'] = max(between, 0) ** 0.5
                expected['volume_ml_sd_within_folds'] = within ** 0.5
            # samples are counted before resampling and half precision, in voxels that give the mask its volume
            resampled = {'rel': 0.1, 'abs': 0.05} if case == 'odd' else {'rel': 0.01, 'abs': 0.005}
            for key, value in expected.items():
                exact = key in ('volume_ml', 'volume_ml_stock', 'components')
                assert values[key] == pytest.approx(value, **({} if exact else resampled)), (case, name, key)
            assert re.fullmatch(r'the true volume is known of \d validation cases whose mask holds (some|no)thing of '
                                r'it, 9 are needed', values['interval_missing'])
            of_interval = {'volume_ml_low', 'volume_ml_high', 'interval_level', 'interval_cases', 'interval_unit'}
            assert {values[key] for key in of_interval} == {None}
            of_model = {'estimated_dice', 'estimated_dice_low', 'interval_missing', 'pairwise_dice', 'uncertain_share',
                        *(['folds_dice'] if folds == 2 else [])} | of_interval
            assert values.keys() == expected.keys() | of_model
            values = {key: value for key, value in values.items() if not isinstance(value, str)}
            known = values['pairwise_dice'] is not None
            assert known == any((sample == label).any() for sample in samples)
            assert not known or 0 <= values['pairwise_dice'] < 1
            assert 0 <= values['uncertain_share'] <= 1
            for key, value in values.items():
                assert lines[case, name][key] == '' if value is None else \
                    float(lines[case, name][key]) == pytest.approx(value), (case, name, key)
        dices = [v['estimated_dice'] for v in row['labels'].values() if v['estimated_dice'] is not None]
        assert row['estimated_dice'] == pytest.approx(np.mean(dices)) and row['estimated_dice_low'] is None
        assert row['order']['by'] == ('folds_dice' if folds == 2 else 'estimated_dice')
        assert float(lines[case, 'organ']['case_seconds']) > 0


def test_the_estimated_dice_is_what_mask_and_probabilities_say(one_case, tmp_path):
    """Where the mask is made of the samples, the saved probabilities are their mean."""
    (row,) = rows(predict(one_case, tmp_path, *QUICK, '--save_probabilities', '-samples', '4', *OF_SAMPLES)).values()
    probabilities = np.load(tmp_path / f'{row["case"]}.npz')['probabilities'].astype(float)
    mask = read(tmp_path / f'{row["case"]}.nii.gz')
    for name, label in (('organ', 1), ('lesion', 2)):
        p, inside = probabilities[label], mask == label
        found, expected = row['labels'][name]['estimated_dice'], 2 * p[inside].sum() / (inside.sum() + p.sum())
        assert found == pytest.approx(expected, abs=0.002) or found is None and name == 'lesion' and not inside.any()


def test_intervals_hold_for_masks_as_in_calibration_and_any_samples(one_case, tmp_path, capsys, monkeypatch):
    """20 validation cases, in which the true volume of the organ is 10 to 20 % above the mask's; no lesion is known."""
    results = tmp_path / 'nnUNet_results'
    shutil.copytree(model_folder(), results / DATASET / model_folder().name)
    monkeypatch.setenv('nnUNet_results', str(results))
    file = model_folder() / 'fold_0' / 'checkpoint_final.pth'
    stored = stored_settings(torch.load(file, weights_only=False)['network_weights'])
    scores = torch.zeros(20, 3, len(FIELDS))
    mask = torch.linspace(1, 5, 20)
    scores[:, 1] = torch.stack([mask * torch.linspace(1.1, 1.2, 20), mask, torch.ones(20)], 1)
    store_calibration(file, list('abcdefghijklmnopqrst'), scores)
    flags = ('--save_samples', '-samples', '4')

    def organ(name: str, *change: str) -> dict[str, Any]:
        (row,) = rows(predict(one_case, tmp_path / name, *flags, *change)).values()
        lesion = row['labels']['lesion']
        assert lesion['volume_ml_low'] is None and lesion['interval_missing']
        return row['labels']['organ']
    as_calibrated = organ('as calibrated')
    assert ('Volumes of lesion have no calibrated interval: the true volume is known of 0 validation cases whose mask '
            'holds something of it, 9 are needed.') in capsys.readouterr().err
    volume = as_calibrated['volume_ml']
    assert (as_calibrated['interval_level'], as_calibrated['interval_cases']) == (0.95, 20)
    assert as_calibrated['interval_unit'].startswith('the volume') and as_calibrated['interval_missing'] is None
    assert as_calibrated['volume_ml_high'] == pytest.approx(1.2 * volume, rel=1e-3)
    assert as_calibrated['volume_ml_low'] < 0.9 * volume
    assert stored.mask_blind == 1  # so the mask does not depend on how samples are drawn
    for i, change in enumerate((('-samples', '2'), ('-start', '0.5'), ('-dependence', '0'))):
        assert organ(f'drawn otherwise {i}', *change)['volume_ml_high'] == pytest.approx(1.2 * volume, rel=1e-3)
    for i, change in enumerate((('--disable_tta',), ('-step_size', '1'), ('-mask_stock', '0.5', '-mask_blind', '0.5'))):
        other = organ(f'other mask {i}', *change)
        reason = 'the calibrated one holds only for masks made as in validation'
        assert other['interval_missing'] == reason and other['interval_level'] is None
        assert f'Volumes have no calibrated interval: {reason}.' in capsys.readouterr().err
        assert other['samples_low_ml'] <= other['volume_ml_mean'] <= other['samples_high_ml']
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder()), (0,))
    predictor.use_mirroring = False  # nnU-Net's attributes may be set after loading
    predictor.predict_from_files_sequential(str(one_case), str(tmp_path / 'later'))
    assert next(iter(rows(tmp_path / 'later').values()))['labels']['organ']['interval_missing'] == reason


@pytest.mark.parametrize('shared', [False, True])
def test_folds_that_share_validation_cases_have_no_interval(refined, tmp_path, monkeypatch, shared):
    results = tmp_path / 'nnUNet_results'
    shutil.copytree(model_folder(), results / DATASET / model_folder().name)
    monkeypatch.setenv('nnUNet_results', str(results))
    for fold in (0, 1):
        store_calibration(model_folder() / f'fold_{fold}' / 'checkpoint_final.pth',
                          [f'case {i} of {0 if shared else fold}' for i in range(10)],
                          torch.linspace(1, 2, 10)[:, None, None].expand(10, 3, len(FIELDS)))
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder()), (0, 1))
    found = predictor.calibrated['organ'].with_label
    if shared:
        assert found.startswith('the folds share validation cases, so their errors are not independent: predict with')
    else:
        assert len(found.errors) == 20


def test_the_agreement_is_close_to_that_of_the_saved_samples(predicted):
    """It is taken in the network's grid, before resampling: for the phantoms that is the image's own."""
    for case in CASES[1:]:
        samples = [read(predicted / 'samples' / f'{case}_s{i:02d}.nii.gz') for i in range(4)]
        for name, label in (('organ', 1), ('lesion', 2)):
            pairs = [(a == label, b == label) for a, b in itertools.combinations(samples, 2)]
            sizes = sum(a.sum() + b.sum() for a, b in pairs)
            expected = pytest.approx(2 * sum((a & b).sum() for a, b in pairs) / sizes, abs=0.01) if sizes else None
            assert rows(predicted)[case]['labels'][name]['pairwise_dice'] == expected
            assert name == 'lesion' or sizes


def test_several_folds_share_the_samples_and_each_sees_every_mirroring(predicted, two_folds):
    for case in CASES:
        one, two = (rows(folder)[case]['network_calls'] for folder in (predicted, two_folds))
        tiles = one['stock'] // 9  # its own mask is written, and chains start from what is not mirrored
        assert one == {'stock': 9 * tiles, 'denoiser': (8 * 2 + 8) * tiles}  # samples in two steps, and the mask
        assert two == {'stock': 2 * one['stock'], 'denoiser': 2 * one['denoiser']}
        between, all_variance = (read(two_folds / 'uncertainty' / f'{case}_{name}.nii.gz')
                                 for name in ('variance_between_folds', 'variance'))
        assert (between <= all_variance + 0.02).all() and 0 < between.mean() < all_variance.mean()


def test_samples_of_all_folds_weigh_alike_in_mask_maps_and_estimates(two_folds, monkeypatch):
    """Recomputed from the samples' own probabilities: three of each of two folds, where five are asked for."""
    settings = {'samples': 5, 'mask_stock': 0.0, 'mask_blind': 0.0, 'dependence': 0.0, 'steps': 2}
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False, overrides=settings)
    predictor.initialize_from_trained_model_folder(str(model_folder()), (0, 1))
    image = torch.from_numpy(make_case((20, 30, 26), 5)[0])[None]
    image = (image - image.mean()) / image.std()
    probabilities, mirrored, masks = [], {0: [], 1: []}, []
    add, mirrorings_of = Spread.add, Volume.mirrorings_of

    def add_and_keep(self, number, z, p, mask):  # the volume is one chunk
        probabilities.append(p.clone())
        masks.append(mask[:20, :30, :26].clone())
        add(self, number, z, p, mask)

    def note(self, sample, samples):
        mirrored[sample % 2] += mirrorings_of(self, sample, samples)
        return mirrorings_of(self, sample, samples)
    monkeypatch.setattr(Spread, 'add', add_and_keep)
    monkeypatch.setattr(Volume, 'mirrorings_of', note)
    told = []
    prediction = predictor.predict_volume(image, lambda number, logits: told.append(logits.argmax(0)), 'case')
    assert len(probabilities) == len(masks) == len(told) == 6
    # half precision
    assert all((one != other).float().mean() < 1e-3 for one, other in zip(masks, told, strict=True))
    for seen in mirrored.values():
        assert len({seen.count(axes) for axes in seen}) == 1 and len(set(seen)) == 8
    p = torch.stack(probabilities)[:, :, :20, :30, :26].double()  # three samples of a fold, then those of the other
    p = p if p.shape[2:] == image.shape[1:] else pytest.fail(f'padded: {p.shape}')
    mean, maps = p.mean(0), prediction.spread.maps()
    torch.testing.assert_close(prediction.spread.mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(prediction.logits.softmax(0).double(), mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(maps['uncertainty'].double(), torch.special.entr(mean).sum(0) / math.log(3), rtol=0,
                               atol=1e-4)
    of_folds = torch.stack([p[:3].mean(0), p[3:].mean(0)])
    within = (p[:3].var(0) + p[3:].var(0)).sum(0) / 2
    between = (of_folds.var(0, correction=0).sum(0) - within / 6).clamp(min=0)  # six samples of two folds
    torch.testing.assert_close(maps['variance_between_folds'].double(), between, rtol=0, atol=1e-4)
    hard = prediction.logits.argmax(0)
    for label, dice in enumerate(prediction.spread.estimated_dice(prediction.logits)):
        inside = hard == label
        expected = 2 * mean[label][inside].sum() / (inside.sum() + mean[label].sum())
        assert dice is None or dice == pytest.approx(float(expected), abs=1e-4)
    sizes = prediction.counts.sample_sizes()  # in the order of their numbers: the folds take turns
    for number, mask in zip((0, 2, 4, 1, 3, 5), masks, strict=True):
        assert sizes[number].tolist() == [(mask == 1).sum(), (mask == 2).sum()]


def test_with_more_folds_than_samples_there_is_one_sample_a_fold(one_case, tmp_path, capsys):
    predict(one_case, tmp_path, *QUICK, '-samples', '1', folds=(0, 1))
    assert '2 samples instead of 1: 1 of every fold.' in capsys.readouterr().out
    assert rows(tmp_path)[CASES[1]]['num_samples'] == 2
    assert rows(tmp_path)[CASES[1]]['labels']['organ']['volume_ml_sd_within_folds'] is None


# sampling settings

def test_samples_differ_from_one_another_and_with_the_seed(predicted, quick, one_case, tmp_path):
    for case in CASES:
        samples = [read(predicted / 'samples' / f'{case}_s{i:02d}.nii.gz') for i in range(4)]
        assert all((a != b).any() for a, b in itertools.combinations(samples, 2))
    predict(one_case, tmp_path, *QUICK, '-samples', '3', '-seed', '7')
    other_seed = samples_of(tmp_path)
    assert len(other_seed) == 3 and rows(tmp_path)[CASES[1]]['num_samples'] == 3
    assert all((a != b).any() for a in samples_of(quick) for b in other_seed)


def saved(folder: Path) -> np.ndarray:
    return np.load(folder / f'{CASES[1]}.npz')['probabilities']


@pytest.mark.parametrize('settings', [{'start': '1'}, {'steps': '4'}, {'redraw': '0', 'steps': '2'}, {'seed': '3'},
                                      {'start_mask': 'hard'}, {'samples_from': 'stock'}, {'samples_from': 'blind'},
                                      {'temperature': '4'}, {'dependence': '0'}], ids=str)
def test_settings_of_the_samples_change_these_and_not_the_blind_mask(one_case, quick, tmp_path, monkeypatch, settings):
    flags = [text for name in settings.keys() & SETTINGS.keys() for text in (f'-{name}', settings[name])]
    for name in settings.keys() - SETTINGS.keys():
        monkeypatch.setenv(f'nnUNet_pdddpm_{name}', settings[name])
    predict(one_case, tmp_path, *QUICK, '-samples', '2', *flags)
    assert filecmp.cmp(tmp_path / f'{CASES[1]}.nii.gz', quick / f'{CASES[1]}.nii.gz', shallow=False)
    assert any((a != b).any() for a, b in zip(samples_of(tmp_path), samples_of(quick), strict=True))
    before, after = (rows(folder)[CASES[1]]['settings'][0] for folder in (quick, tmp_path))
    assert after == {**before, **{name: KINDS[name](value) for name, value in settings.items()}}


def test_the_mask_is_the_weighted_mean_of_the_probabilities_of_stock_blind_mask_and_samples(one_case, tmp_path,
                                                                                            monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_temperature', '1')
    flags = (*QUICK, '--save_probabilities', '-samples', '2')

    def run(stock: str, blind: str) -> np.ndarray:
        weights = '-mask_stock', stock, '-mask_blind', blind
        return saved(predict(one_case, tmp_path / f'{stock}_{blind}', *flags, *weights))
    stock, blind, samples = run('1', '0'), run('0', '1'), run('0', '0')
    assert all(np.abs(a - b).max() > 0.02 for a, b in itertools.combinations((stock, blind, samples), 2))
    for weights in ((0.5, 0), (0, 0.25), (0.75, 0.25), (0.25, 0.5)):
        expected = weights[0] * stock + weights[1] * blind + (1 - sum(weights)) * samples
        np.testing.assert_allclose(run(*map(str, weights)), expected, atol=0.01, err_msg=str(weights))
    row = rows(tmp_path / '0_0')[CASES[1]]
    assert row['network_calls']['denoiser'] == 2 * row['network_calls']['stock']


def test_a_temperature_makes_probabilities_in_the_mask_less_sure(one_case, tmp_path, monkeypatch):
    def probabilities(name: str, *flags: str, **temperatures: int) -> np.ndarray:
        with monkeypatch.context() as environment:
            for of, temperature in temperatures.items():
                environment.setenv(f'nnUNet_pdddpm_{of}', str(temperature))
            return saved(predict(one_case, tmp_path / name, *QUICK, '--save_probabilities', '-samples', '1', *flags))
    half = ('-mask_stock', '0.5', '-mask_blind', '0.5')
    base, of_stock, of_blind = (probabilities(str(i), *half, **of).max(0).mean() for i, of in enumerate(
        ({}, {'temperature': 6}, {'blind_temperature': 6})))
    assert max(of_stock, of_blind) < base - 0.05
    # the stock prediction itself has none
    np.testing.assert_array_equal(probabilities('hot', *OF_STOCK, temperature=6),
                                  probabilities('plain', *OF_STOCK, temperature=1))


def test_environment_variables_stand_in_for_flags_that_are_not_given(one_case, quick, tmp_path, monkeypatch):
    before = rows(quick)[CASES[1]]['settings'][0]
    changed = {'start': 0.3, 'steps': 2, 'samples': 2, 'mask_stock': 0.5, 'mask_blind': 0.25, 'start_mask': 'hard',
               'dependence': 0.5, 'seed': 3}
    for name, value in changed.items():
        monkeypatch.setenv(f'nnUNet_pdddpm_{name}', str(value))
    predict(one_case, tmp_path / 'environment', *QUICK)
    row = rows(tmp_path / 'environment')[CASES[1]]
    assert row['num_samples'] == 2 and row['settings'][0] == {**before, **changed}
    predict(one_case, tmp_path / 'flags', *QUICK, '-start', '0.7', '-samples', '1', '-mask_stock', '0', '-seed', '0')
    row = rows(tmp_path / 'flags')[CASES[1]]
    assert row['num_samples'] == 1
    assert row['settings'][0] == {**before, **changed, 'start': 0.7, 'samples': 1, 'mask_stock': 0, 'seed': 0}
    monkeypatch.setenv('nnUNet_pdddpm_t_start', '1')
    assert 'nnUNet_pdddpm_t_start is unknown' in refusal(predict, one_case, tmp_path / 'wrong')
    assert not (tmp_path / 'wrong').exists()


def test_a_start_asks_for_a_chain_of_a_model_whose_samples_are_drawn_without_one(one_case, tmp_path, monkeypatch):
    results = tmp_path / 'nnUNet_results'
    shutil.copytree(model_folder(), results / DATASET / model_folder().name)
    monkeypatch.setenv('nnUNet_results', str(results))
    store(model_folder() / 'fold_0', SamplingSettings(samples_from='stock', samples=2))

    def drawn_from(name: str, *flags: str) -> tuple[str, int]:
        (row,) = rows(predict(one_case, tmp_path / name, *QUICK, *flags)).values()
        return row['settings'][0]['samples_from'], row['network_calls']['denoiser'] // row['network_calls']['stock']
    assert drawn_from('stored') == ('stock', 1)
    assert drawn_from('start', '-start', '0.5') == ('chain', 3)
    assert drawn_from('steps', '-steps', '2') == ('chain', 5)
    assert drawn_from('both', '-start', '0.5', '-samples_from', 'blind') == ('blind', 1)


# continuing

def written_at(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in images(folder)}


def test_continuing_does_nothing_twice_and_only_what_is_missing(source, predicted, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(predicted, out)
    before = written_at(out)
    predict(source, out, *EVERYTHING, '--continue_prediction')
    assert written_at(out) == before

    (out / 'samples' / 'odd_s02.nii.gz').unlink()
    (out / 'pdddpm_summary.json').unlink()
    predict(source, out, *EVERYTHING, '--c')
    after = written_at(out)
    assert {name for name in after if after[name] != before[name]} == {name for name in after if 'odd' in name}
    assert_same_results(predicted, out)


def test_continuing_after_a_kill_before_the_summary_writes_it(source, predicted, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(predicted, out)
    for ending in ('json', 'csv'):
        (out / f'pdddpm_summary.{ending}').unlink()
    predict(source, out, *EVERYTHING, '--continue_prediction')
    assert rows(out) == rows(predicted)
    assert (out / 'pdddpm_summary.csv').read_text() == (predicted / 'pdddpm_summary.csv').read_text()


def test_continuing_with_other_settings_is_refused(source, predicted, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(predicted, out)
    everything = {file: file.read_bytes() for file in out.rglob('*') if file.is_file()}
    for flags in (('-seed', '5'), ('-start', '0.8'), ('-samples', '2'), ('-dependence', '0'), ('-mask_blind', '0.5'),
                  ('-step_size', '0.7')):
        said = refusal(predict, source, out, *EVERYTHING, *flags, '--continue_prediction')
        assert f'with other sampling settings ({flags[0][1:]})' in said and str(out) in said
    assert {file: file.read_bytes() for file in out.rglob('*') if file.is_file()} == everything


def test_what_an_earlier_prediction_left_of_a_case_is_taken_away(one_case, tmp_path):
    predict(one_case, tmp_path, *QUICK, '-samples', '3', '--uncertainty', 'all')
    stranger = tmp_path / 'samples' / f'{CASES[1]}_s00_s00.nii.gz'  # of a case that is named like a sample
    stranger.write_bytes(b'')
    predict(one_case, tmp_path, *QUICK, '-samples', '2')
    assert sorted(file.name for file in (tmp_path / 'samples').iterdir()) == sorted(
        [stranger.name, *(f'{CASES[1]}_s{i:02d}.nii.gz' for i in range(2))])
    assert not list((tmp_path / 'uncertainty').iterdir())


def test_a_run_that_was_interrupted_can_be_repeated_in_the_same_process(one_case, tmp_path, monkeypatch):
    """A notebook keeps the error, and with it what it holds."""
    predictor = opened(samples=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(predictor, '_predict_case', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        predictor.predict_from_files_sequential(str(one_case), str(tmp_path))
    predictor.predict_from_files_sequential(str(one_case), str(tmp_path))
    assert kept.tb is not None and len(rows(tmp_path)) == 1 and not list(tmp_path.glob('.*'))


def test_python_asks_for_probabilities_by_the_outputs_too(one_case, tmp_path):
    predictor = opened(samples=2)
    predictor.outputs = Outputs(probabilities=True)
    predictor.predict_from_files_sequential(str(one_case), str(tmp_path))
    assert (tmp_path / f'{CASES[1]}.npz').is_file()


def test_items_of_an_iterator_stay_as_they_are(refined):
    predictor = opened(samples=2)
    read, properties = predictor.plans_manager.image_reader_writer_class().read_images(
        [str(refined.raw / 'imagesTs' / f'{CASES[1]}_0000.nii.gz')])
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    image, _, properties = preprocessor.run_case_npy(read, None, properties, predictor.plans_manager,
                                                     predictor.configuration_manager, predictor.dataset_json)
    items = [{'data': torch.from_numpy(image), 'data_properties': properties, 'ofile': None}]
    (one,), (other,) = (predictor.predict_from_data_iterator(items, num_processes_segmentation_export=0)
                        for _ in range(2))
    assert (one == other).all() and one.any()


def test_a_preprocessor_with_a_reading_of_its_own_is_refused(one_case, tmp_path, monkeypatch):
    class OwnPreprocessor(DefaultPreprocessor):
        def run_case(self, *args):
            raise AssertionError
    predictor = opened()
    monkeypatch.setattr(ConfigurationManager, 'preprocessor_class', OwnPreprocessor)
    with pytest.raises(PredictionError, match='OwnPreprocessor reads images in a way of its own'):
        predictor.predict_from_files_sequential(str(one_case), str(tmp_path))


def test_a_report_of_an_earlier_prediction_is_told(one_case, tmp_path, capsys):
    predict(one_case, tmp_path, *QUICK, '-samples', '2', '--report')
    predict(one_case, tmp_path, *QUICK, '-samples', '2', '--continue_prediction')  # the mask stays as it is shown
    assert 'of an earlier prediction' not in capsys.readouterr().err
    predict(one_case, tmp_path, *QUICK, '-samples', '2')
    assert f'{tmp_path / "report.html"} is of an earlier prediction: add --report' in capsys.readouterr().err


def test_the_report_shows_every_case_and_what_it_needs_is_written(source, tmp_path):
    predict(source, tmp_path, *QUICK, '-samples', '2', '--report')
    page = (tmp_path / 'report.html').read_text()
    for case, row in rows(tmp_path).items():
        assert case in page and f'{row["labels"]["organ"]["volume_ml"]:.2f} ml' in page
        for folder, ending in (('presegmentation', ''), ('uncertainty', '_uncertainty')):
            assert (tmp_path / folder / f'{case}{ending}.nii.gz').is_file()


def test_a_killed_run_leaves_whole_files_and_is_completed_to_the_same_bytes(source, predicted, tmp_path):
    out = tmp_path / 'out'
    flags = arguments(source, out, *EVERYTHING, '-npp', '0', '-nps', '1')
    with (tmp_path / 'log.txt').open('w') as log:
        process = subprocess.Popen([sys.executable, '-m', 'nnunet_pdddpm.commands.predict', *flags], stdout=log,
                                   stderr=log, start_new_session=True)
    try:
        while not any((out / f'{case}.nii.gz').exists() for case in CASES):
            assert process.poll() is None, (tmp_path / 'log.txt').read_text()[-4000:]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        patience = time.monotonic() + 60
        while group_is_alive(process.pid):  # background processes that outlive it would write on
            assert time.monotonic() < patience, 'background processes stay after the command was killed'
            time.sleep(0.1)
    finally:
        if group_is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    done = [case for case in CASES if (out / f'{case}.nii.gz').exists()]
    assert 0 < len(done) < len(CASES)
    expected = images(predicted)
    partial = {name for name in images(out) if '.partial' in name}
    assert [name for name, content in images(out).items() if name not in partial and content != expected[name]] == []
    for case in done:
        assert {name for name in expected if case in name} <= images(out).keys()

    before = written_at(out)
    predict(source, out, *EVERYTHING, '--continue_prediction')
    assert_same_results(predicted, out)
    after = written_at(out)
    assert all(after[name] == before[name] for name in before for case in done if case in name and name not in partial)


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Python

def test_from_python_it_is_used_as_nnunets_predictor(source, quick, tmp_path):
    predictor = PDDDPMPredictor(tile_step_size=1, use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False,
                                overrides={'samples': 2})
    predictor.initialize_from_trained_model_folder(str(model_folder()), use_folds=(0,))
    expected = read(quick / f'{CASES[1]}.nii.gz')
    file = source / f'{CASES[1]}_0000.nii.gz'
    array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(file)])

    np.testing.assert_array_equal(predictor.predict_single_npy_array(array, properties), expected)
    labels, probabilities = predictor.predict_single_npy_array(array, properties, save_or_return_probabilities=True)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(probabilities.argmax(0), expected)

    returned = predictor.predict_from_files_sequential([[str(file)]], None)
    np.testing.assert_array_equal(returned[0], expected)
    predictor.predict_from_files_sequential([[str(file)]], [str(tmp_path / 'sequential' / 'mask')])
    assert filecmp.cmp(tmp_path / 'sequential' / 'mask.nii.gz', quick / f'{CASES[1]}.nii.gz', shallow=False)

    returned = predictor.predict_from_list_of_npy_arrays([array, array], None, [properties] * 2, None, 1, False, 0)
    assert len(returned) == 2
    for mask in returned:
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize('folds', ['0', None, ['1'], (0, 1)])
def test_folds_can_be_named_as_nnunets_predictor_takes_them(refined, folds):
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model_folder()), folds)
    assert len(predictor.fold_settings) == len(predictor.list_of_parameters) == (1 if folds in ('0', ['1']) else 2)
    with pytest.raises(PredictionError, match='fold_all/checkpoint_final.pth'):
        predictor.initialize_from_trained_model_folder(str(model_folder()), 'all')
