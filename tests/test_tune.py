"""nnUNetv2_pdddpm_tune and the tuning at the end of training: the sweep, what is stored, what is left out."""
from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from conftest import DATASET, DATASET_ID, PLANS, STOCK, Workspace, make_trainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor

from nnunet_pdddpm.commands.tune import main
from nnunet_pdddpm.diffusion.coding import logits_to_probabilities, one_hot
from nnunet_pdddpm.diffusion.levels import LevelTable
from nnunet_pdddpm.diffusion.process import log_likelihood_ratio, noise_scale, signal
from nnunet_pdddpm.evaluation.voxelwise import class_statistics
from nnunet_pdddpm.inference.errors import NNUNET_INF_ERROR
from nnunet_pdddpm.inference.intervals import FIELDS
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.refiner import DiffusionDesign
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers
from nnunet_pdddpm.network.state import CALIBRATION, SETTING, stored_settings
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper
from nnunet_pdddpm.tuning import budget as budget_module
from nnunet_pdddpm.tuning import case_sweep as case_sweep_module
from nnunet_pdddpm.tuning import sweep as sweep_module
from nnunet_pdddpm.tuning import tune as tune_module
from nnunet_pdddpm.tuning.case_sweep import CaseSweep
from nnunet_pdddpm.tuning.cases import Case, ValidationCases
from nnunet_pdddpm.tuning.choice import TuningError, difference_interval
from nnunet_pdddpm.tuning.fold import FoldData
from nnunet_pdddpm.tuning.report import describe_mask, describe_samples
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.stored import store
from nnunet_pdddpm.tuning.sweep import mask_candidates, sweep
from nnunet_pdddpm.tuning.temperature import GRID
from nnunet_pdddpm.tuning.tune import open_model

CPU = torch.device('cpu')
TUNED = 'PDDDPMTrainerTuned'
FILES = {'sampling_sweep.json', 'sampling_sweep.csv', 'sampling_sweep.png'}
CHECKPOINTS = ('checkpoint_final.pth', 'checkpoint_best.pth')
CASES = ('phantom_000', 'phantom_003', 'phantom_006')  # held out in fold 0


# the sweep on what is known

class Exact(torch.nn.Module):
    """The denoiser that knows which masks there are, and that all are as probable: it gives the exact posterior."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.masks = masks  # (K, C, Z, Y, X) of 0 and 1

    def forward(self, image: Tensor, noisy: Tensor | None, log_snr: Tensor) -> Tensor:
        if noisy is None:
            weights = torch.ones(len(image), len(self.masks)) / len(self.masks)
        else:
            likeness = torch.einsum('bczyx,kczyx->bk', noisy, 2 * self.masks - 1)
            scale = signal(log_snr) / noise_scale(log_snr) ** 2
            weights = (likeness * scale[:, None].float()).softmax(1)
        logits = torch.einsum('bk,kczyx->bczyx', weights, self.masks).clamp(1e-6).log()
        return logits if noisy is None else logits - log_likelihood_ratio(noisy, log_snr, -1, 1)


class Stock(Exact):
    """Knows how often each voxel is in them."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image, None, torch.zeros(len(image)))


class KnownCases:
    """Cases in the place of `ValidationCases`, of equal size."""

    def __init__(self, labels: Sequence[np.ndarray]) -> None:
        self.names = [str(i) for i in range(len(labels))]
        self.labels = labels

    def voxels(self, name: str) -> int:
        return self.labels[0].size

    def load(self, name: str) -> Case:
        labels = self.labels[int(name)]
        image = torch.full((1, *labels.shape), 1e-6 * int(name))  # no two images are the same
        return Case(image, labels, [], {}, name)


def validation_cases(raters: Path | None = None) -> ValidationCases:
    return ValidationCases(FoldData.from_trainer(make_trainer(TUNED, 0)), raters)


SIZE = (16, 24, 16)  # of a patch


def shapes(nested: bool) -> list[np.ndarray]:
    """Label maps of three boxes, each within the next one; or of a box that is at one of two places, which touch."""
    boxes = (8, 16), (4, 16), (4, 20)
    maps = []
    for start, stop in boxes if nested else ((4, 12), (12, 20)):
        maps.append(np.zeros(SIZE, int))
        maps[-1][4:12, start:stop, 4:12] = 1
    return maps


@pytest.mark.parametrize('apart', [True, False])
def test_an_exact_chain_is_chosen_where_masks_are_no_thresholds_and_only_there(tuned, monkeypatch, apart):
    monkeypatch.setattr(sweep_module, 'STARTS', (1.0, 0.5))
    monkeypatch.setattr(sweep_module, 'MORE_STEPS', ())
    monkeypatch.setattr(sweep_module, 'DRAWS', 8)
    known = shapes(nested=not apart)
    predictor = open_model(tuned, 0, CPU)
    predictor.use_mirroring, refiner = False, predictor.refiner
    # half of it is decided where two masks that differ in so many voxels of two channels are told apart
    log_snr = np.linspace(-6, 6, 41) + math.log(1.25 / (2 * (known[0] != known[1]).sum()))
    share = np.linspace(1, 0, 41)
    share[1:-1] = 1 / (1 + np.exp(log_snr - log_snr[20]))[1:-1]
    refiner.store_levels(LevelTable(tuple(log_snr), tuple(share)))
    masks = torch.cat([one_hot(torch.from_numpy(labels)[None, None], 3) for labels in known])
    refiner.denoiser, refiner.presegmenter = Exact(masks), Stock(masks)
    found = sweep(predictor, KnownCases([known[i % len(known)] for i in range(12)]))
    chain, thresholds = (min(np.mean(row.energy) for row in found.samples if (row.calls > 0) == with_chain)
                         for with_chain in (True, False))
    if apart:
        assert found.chosen_samples.samples_from == 'chain' and chain < 0.8 * thresholds
    else:
        assert found.chosen_samples.samples_from == 'stock' and thresholds < 1.2 * chain
        assert found.temperature == pytest.approx(1, abs=0.05)


# the sweep and what is stored

@pytest.fixture(scope='module')
def small_grid():
    """Two starts, one or two steps, two draws."""
    with pytest.MonkeyPatch.context() as patch:
        for name, values in (('STARTS', (0.8, 0.4)), ('MORE_STEPS', ()), ('DRAWS', 2), ('DEPENDENCES', (1.0, 0.0))):
            patch.setattr(sweep_module, name, values)
        yield


@pytest.fixture(scope='module')
def tuned(stock: Workspace, small_grid, tmp_path_factory) -> Path:
    """Model folder of a fold that was trained with tuning at its end, in an own results folder.

    It mirrors along one axis only, for speed; `network.json` holds the settings in the network after training.
    """
    results = tmp_path_factory.mktemp('tuned') / 'nnUNet_results'
    stock_fold = results / DATASET / stock.model(STOCK).name / 'fold_0'
    shutil.copytree(stock.model(STOCK) / 'fold_0', stock_fold)
    for name in ('plans.json', 'dataset.json'):
        shutil.copy(stock.model(STOCK) / name, stock_fold.parent)
    checkpoint = torch.load(stock_fold / 'checkpoint_final.pth', weights_only=False)
    torch.save({**checkpoint, 'inference_allowed_mirroring_axes': (2,)}, stock_fold / 'checkpoint_final.pth')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('nnUNet_results', str(results))
        trainer = make_trainer(TUNED, 0)
        trainer.run_training()
        model = Path(trainer.output_folder_base)
        (model / 'network.json').write_text(json.dumps(asdict(trainer.refiner.settings)))
        yield model


@pytest.fixture
def scratch(tuned, tmp_path, monkeypatch) -> Path:
    """An own copy of it, with the settings that a model has before tuning, and without the sweep's files."""
    results = tmp_path / 'nnUNet_results'
    shutil.copytree(tuned.parents[1], results)
    monkeypatch.setattr(sweep_module, 'STARTS', (0.6,))
    monkeypatch.setattr(sweep_module, 'FIRST_STEPS', (1,))
    monkeypatch.setenv('nnUNet_results', str(results))
    fold = results / DATASET / tuned.name / 'fold_0'
    for name in FILES:
        (fold / name).unlink()
    for file in fold.glob('checkpoint_*.pth'):
        change(file, SamplingSettings(samples=2))
    return fold.parent


def change(file: Path, settings: SamplingSettings) -> None:
    checkpoint = torch.load(file, weights_only=False)
    for name, value in as_numbers(settings).items():
        checkpoint['network_weights'][SETTING + name].fill_(value)
    torch.save(checkpoint, file)


def command(*flags: str, fold: str = '0', trainer: str = TUNED) -> None:
    main([str(DATASET_ID), '3d_fullres', fold, '-tr', trainer, '-p', PLANS, '-device', 'cpu', '--disable_progress_bar',
          *flags])


def weights(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=False)['network_weights']


def report(model: Path) -> dict:
    return json.loads((model / 'fold_0' / 'sampling_sweep.json').read_text())


def chosen_in(model: Path) -> SamplingSettings:
    return SamplingSettings(**report(model)['chosen'])


def log(model: Path) -> str:
    return ''.join(file.read_text() for file in (model / 'fold_0').glob('training_log*'))


def rows_of(content: dict, kind: str) -> dict[SamplingSettings, dict]:
    return {SamplingSettings(**row['settings']): row for row in content['rows'] if row['kind'] == kind}


def test_training_ends_with_tuned_settings_in_both_checkpoints_and_in_the_network(tuned):
    assert FILES <= {file.name for file in (tuned / 'fold_0').iterdir()}
    chosen = chosen_in(tuned)
    assert chosen.samples == 2 and chosen.temperature != SamplingSettings().temperature
    for name in CHECKPOINTS:
        assert stored_settings(weights(tuned / 'fold_0' / name)) == chosen
    assert asdict(chosen) == json.loads((tuned / 'network.json').read_text())  # nnU-Net goes on to validate it
    assert not list((tuned / 'fold_0').glob('.*partial'))

    trainer = make_trainer(TUNED, 0)  # --val, and --c after a validation that was cut off
    trainer.load_checkpoint(str(tuned / 'fold_0' / 'checkpoint_final.pth'))
    assert trainer.refiner.settings == chosen
    before = (tuned / 'fold_0' / 'sampling_sweep.json').stat().st_mtime_ns
    trainer.run_training()
    assert (tuned / 'fold_0' / 'sampling_sweep.json').stat().st_mtime_ns == before
    assert 'they were tuned when training ended' in log(tuned)
    assert stored_settings(weights(tuned / 'fold_0' / 'checkpoint_final.pth')) == chosen


def test_the_report_says_what_was_measured(tuned):
    content = report(tuned)
    assert content['cases'] == list(CASES) and content['cases_left_out'] == content['steps_left_out'] == []
    first, last = rows_of(content, 'samples, first rounds'), rows_of(content, 'samples')
    chains = {(s.start, s.steps) for s in first if s.samples_from == 'chain'}
    assert chains == set(itertools.product((0.8, 0.4), (1, 2)))
    without = {(s.samples_from, s.temperature, s.blind_temperature, s.dependence) for s in first
               if s.samples_from != 'chain'}
    fitted, of_blind = content['temperature'], content['blind_temperature']
    assert without == {(of, t, of_blind, dependence) for dependence in (1, 0)
                       for of, t in (('stock', 1), ('stock', fitted), ('blind', fitted))}
    assert len(last) == 3 and sum(s.samples_from == 'chain' for s in last) == 2
    chosen, masks = chosen_in(tuned), rows_of(content, 'mask')
    stock = next(row for s, row in masks.items() if s.is_stock)
    assert masks[chosen]['dice'] >= stock['dice'] and masks[chosen]['chosen'] and stock['network_calls'] == 1
    assert len(masks) == (12 if chosen.samples_from == 'chain' else 5)
    text = log(tuned)
    assert all(text.count(line) == 1 for line in content['log'])
    assert f'Dice {masks[chosen]["dice"]:.4f}, stock {stock["dice"]:.4f}' in content['log'][0]
    of_samples = next(row for row in last.values() if row['chosen'])
    assert f'{of_samples["description"]}: energy {of_samples["energy"]:.3f}' in content['log'][1]
    other = min((row for row in last.values() if (row['network_calls'] > 0) != (of_samples['network_calls'] > 0)),
                key=lambda row: row['energy'])
    assert content['log'][1].endswith(f'{other["description"]}: energy {other["energy"]:.3f}')
    assert f'on 3 validation cases, {content["passes"]:.0f} passes of the denoiser a case' in content['log'][2]
    with open(tuned / 'fold_0' / 'sampling_sweep.csv', newline='') as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(content['rows']) and sum(line['chosen'] == 'True' for line in table) == 2
    assert float(table[0]['dice']) == pytest.approx(content['rows'][0]['dice'], rel=1e-4)
    assert content['plain_dice'] == pytest.approx(masks[chosen]['dice'], abs=0.05)
    assert f'in plain nnUNetv2_predict Dice {content["plain_dice"]:.4f}' in content['log'][0]
    picture = (tuned / 'fold_0' / 'sampling_sweep.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 10_000


@pytest.mark.parametrize(('settings', 'named'), [
    (SamplingSettings(start=0.8, steps=2, dependence=0.5), 'start 0.8, 2 steps, dependence 0.5'),
    (SamplingSettings(start=1.0), 'start 1, 1 step, dependence 1'),
    (SamplingSettings(samples_from='stock', temperature=1.0), 'thresholds of stock, temperature 1, dependence 1'),
    (SamplingSettings(samples_from='blind', blind_temperature=1.2, dependence=0.0),
     'thresholds of the blind mask, temperature 1.2, dependence 0')])
def test_samples_are_named_in_words(settings, named):
    assert describe_samples(settings) == named


def test_masks_that_are_tried():
    chain = SamplingSettings(start=0.8, steps=2, samples=8)
    tried = mask_candidates(chain, 4)
    assert [describe_mask(s) for s in tried] == [
        'stock', 'blind mask', '0.25 stock + 0.75 blind mask', '0.5 stock + 0.5 blind mask',
        '0.75 stock + 0.25 blind mask', 'mean of the samples', '0.25 stock + 0.75 mean of the samples',
        '0.5 stock + 0.5 mean of the samples', '0.75 stock + 0.25 mean of the samples',
        '0.25 blind mask + 0.75 mean of the samples', '0.5 blind mask + 0.5 mean of the samples',
        '0.75 blind mask + 0.25 mean of the samples']
    assert {s.sample_settings == chain.sample_settings for s in tried} == {True}
    assert {s.mask_samples for s in tried if s.mask_chain > 0} == {2}  # each under 4 mirrorings
    assert len(mask_candidates(replace(chain, samples_from='blind'), 4)) == 5


def test_rows_are_what_each_setting_gives_alone(tuned):
    """What is shared between settings changes nothing; stock's and the blind mask are nnU-Net's own predictions."""
    predictor, trainer = open_model(tuned, 0, CPU), make_trainer(TUNED, 0)
    case, content = validation_cases().load(CASES[1]), report(tuned)
    labels = case.labels.clip(0).astype(int)
    image, unpad = pad_nd_image(case.image, predictor.configuration_manager.patch_size, 'constant', {'value': 0}, True)
    box = (slice(None), *unpad[1:])
    for s, row in rows_of(content, 'mask').items():
        if s.mask_chain > 0:
            continue
        plain = nnUNetPredictor(device=CPU, allow_tqdm=False)
        plain.initialize_from_trained_model_folder(str(tuned), (0,))
        network = plain.network
        network.settings = s
        with torch.inference_mode():
            logits = plain.predict_sliding_window_return_logits(case.image).float()
        p = logits.softmax(0)
        hard = p.argmax(0).numpy()
        dice = [2 * ((hard == c) & (labels == c)).sum() / ((hard == c).sum() + (labels == c).sum())
                for c in (1, 2) if ((hard == c) | (labels == c)).any()]
        exact_for = s.is_stock or s.mask_blind == 1  # a blend of logits that are means over tiles is not one of p
        assert row['per_case']['dice'][1] == pytest.approx(np.mean(dice), abs=1e-3 if exact_for else 0.05), s
        nll = class_statistics(p.numpy(), labels).negative_log_likelihood
        assert row['per_case']['nll'][1] == pytest.approx(nll, rel=1e-3 if exact_for else 0.05), s
    truth = Truth(case.labels, trainer.label_manager, CPU)
    for s, row in rows_of(content, 'samples, first rounds').items():
        volume, masks = Volume(predictor, image, CPU), []
        with torch.inference_mode():
            volume.start_fold()
            volume.blind_logits()  # float16, before a temperature divides it
            truth.set_parts(logits_to_probabilities(volume.stock_logits[box][None], False)[0])
            parts, case_settings = volume.parts(s), s.for_case(case.name)
            for sample in range(sweep_module.DRAWS):
                p = volume.sample_volume(case_settings, sample, None)
                shifts = predictor.refiner.end_shifts(case_settings, sample, None, parts.number)
                masks.append(truth.drawn(p[box], shifts, None if parts.index is None else parts.index[box[1:]]))
        energy, ged = truth.energy(masks)
        assert row['per_case']['energy'][1] == pytest.approx(energy), s
        assert row['per_case']['ged_squared_fair'][1] == pytest.approx(ged), s


def test_a_case_of_which_the_stock_model_makes_no_numbers_is_named(tuned, monkeypatch):
    case = validation_cases().load(CASES[1])

    def explode(self, *args):
        raise RuntimeError(f'{NNUNET_INF_ERROR}. Aborting.')
    predict = nnUNetPredictor.predict_sliding_window_return_logits
    for patched, method, spoil in (
            (Volume, 'start_fold', explode),
            (nnUNetPredictor, 'predict_sliding_window_return_logits',
             lambda self, image: predict(self, image) * math.nan)):
        with monkeypatch.context() as patch, \
                pytest.raises(TuningError, match=f'NaN or infinite values for {case.name}: look at its intensities'):
            patch.setattr(patched, method, spoil)
            CaseSweep(open_model(tuned, 0, CPU), case)


@pytest.mark.parametrize('of_masks', [False, True], ids=['samples', 'mask'])
def test_a_case_of_which_a_chain_makes_no_numbers_is_named(tuned, monkeypatch, of_masks):
    """As half precision of a GPU may. A class of NaN must not be counted."""
    predictor, case = open_model(tuned, 0, CPU), validation_cases().load(CASES[1])
    with torch.inference_mode():
        opened = CaseSweep(predictor, case)
        denoise = predictor.refiner.denoise
        monkeypatch.setattr(predictor.refiner, 'denoise', lambda *args: denoise(*args) * math.nan)
        with pytest.raises(TuningError, match=f'NaN or infinite values for {case.name}: look at its intensities'):
            opened.masks([SamplingSettings(samples=2)]) if of_masks else opened.energies([SamplingSettings()], [0])


def test_masks_are_of_the_samples_that_a_prediction_draws(tuned):
    """Which are stratified, see the image under different mirrorings, and depend on the case's name."""
    settings = SamplingSettings(start=0.8, steps=2, samples=3, dependence=0.5, temperature=1.3, mask_blind=0.25,
                                mask_stock=0.25)
    of_prediction = VolumePredictor(device=CPU, allow_tqdm=False, overrides=asdict(settings))
    of_prediction.initialize_from_trained_model_folder(str(tuned), (0,))
    case = validation_cases().load(CASES[1])
    predicted = of_prediction.predict_volume(case.image, case=case.name)
    with torch.inference_mode():
        opened = CaseSweep(open_model(tuned, 0, CPU), case)
        scores = opened.masks([settings, replace(settings, mask_stock=1.0, mask_blind=0.0)])
    of_mask, of_stock = (opened.truth.score(logits.float().softmax(0))
                         for logits in (predicted.logits, predicted.presegmentation))
    np.testing.assert_allclose(scores, [of_mask, of_stock], rtol=1e-4)
    other = of_prediction.predict_volume(case.image, case='another name')
    assert not torch.equal(other.spread.mean, predicted.spread.mean)


def counted(predictor: VolumePredictor) -> list[int]:
    """One entry for each call of the denoiser: for how many tiles."""
    calls: list[int] = []
    predictor.refiner.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    return calls


@pytest.fixture(scope='module')
def results() -> dict[str, np.ndarray]:
    """Those of the first run."""
    return {}


@pytest.mark.parametrize(('memory', 'seconds'), [(2 ** 32, None), (2 ** 32, 1e6), (1, 1e6)])
def test_passes_are_those_that_happen_and_results_the_same_however_little_memory_there_is(
        scratch, monkeypatch, results, memory, seconds):
    monkeypatch.setattr(sweep_module, 'CACHE_BYTES', memory)
    predictor, cases = open_model(scratch, 0, CPU), validation_cases()
    cases.names = cases.names[:2]
    calls = counted(predictor)
    found = sweep(predictor, cases, seconds)
    tiles = [len(predictor._internal_get_sliding_window_slicers(np.maximum(cases.load(name).labels.shape, SIZE)))
             for name in cases.names]
    assert tiles[0] == tiles[1] and found.passes == sum(calls) / sum(tiles)
    # the blind mask, one chain of one step by two draws, with other dependences, two of these by two more, and as the
    # mask: without a chain none
    others = len({1.0, 0.0} - {next(row.settings.dependence for row in found.first_rounds if row.calls)})
    once = 2 + 2 + 2 * others + 2 * min(1 + others, 2) + 2 * (found.chosen_samples.samples_from == 'chain')
    # on the first of two cases twice a chain, and it is opened again; in each of six rounds (none of more steps) both
    probe = 0 if seconds is None else 2 + (memory == 1)
    assert found.passes == once + probe + (memory == 1) * 2 * (sweep_module.ROUNDS - 2)
    results.setdefault('energy', found.samples[0].energy)
    np.testing.assert_array_equal(found.samples[0].energy, results['energy'])


def test_pre_segmentations_take_a_quarter_of_what_is_free_on_a_gpu(tuned, monkeypatch):
    predictor = open_model(tuned, 0, CPU)
    monkeypatch.setattr(sweep_module, 'free_bytes', lambda device: 2 ** 30)
    runs = []
    for device in ('cpu', 'cuda'):
        predictor.device = torch.device(device)
        runs.append(sweep_module._Run(predictor, KnownCases([]), None, lambda: 0.0, False))
    assert [run.cache_bytes for run in runs] == [sweep_module.CACHE_BYTES, 2 ** 28]


MADE_UP = {1: 0.5, 2: 0.4, 3: 0.45, 5: 0.1}
"""Energy by steps."""


def make_up(monkeypatch, of: dict[int, float], thresholds: float = 0.9) -> list[SamplingSettings]:
    """Energies that are known: by steps, a little lower from a lower start. Returns the settings that are measured."""
    measured, real = [], CaseSweep.energies

    def known(case, settings, samples):
        measured.extend(settings)
        real(case, settings, samples)
        return [(of[s.steps] + s.start / 100 if s.samples_from == 'chain' else thresholds, 0.0) for s in settings]
    monkeypatch.setattr(CaseSweep, 'energies', known)
    return measured


class Nothing(torch.nn.Module):
    """A denoiser that says nothing."""

    def forward(self, image: Tensor, noisy: Tensor | None, log_snr: Tensor) -> Tensor:
        return image.new_zeros((len(image), 3, *image.shape[2:]))


@pytest.mark.parametrize(('energies', 'thresholds', 'passes', 'tried'), [
    ({1: 0.4, 2: 0.5}, 0.1, 52, {1, 2}), ({1: 0.4, 2: 0.5}, 0.9, 60, {1, 2}),
    ({1: 0.5, 2: 0.4, 3: 0.45}, 0.1, 88, {1, 2, 3}), ({1: 0.5, 2: 0.4, 3: 0.45}, 0.9, 104, {1, 2, 3}),
    ({1: 0.5, 2: 0.4, 3: 0.3, 5: 0.2}, 0.9, 184, {1, 2, 3, 5})])
def test_more_steps_are_tried_as_long_as_they_are_better_and_cost_so_many_passes(tuned, monkeypatch, energies,
                                                                                thresholds, passes, tried):
    """With eight samples and mirroring along three axes."""
    for name, values in (('STARTS', (1.0, 0.8, 0.6, 0.4)), ('MORE_STEPS', (3, 5)), ('DRAWS', 4)):
        monkeypatch.setattr(sweep_module, name, values)
    predictor = open_model(tuned, 0, CPU)
    predictor.refiner.configure(SamplingSettings(samples=8), False)
    predictor.refiner.denoiser, predictor.allowed_mirroring_axes = Nothing(), (0, 1, 2)
    calls, measured = counted(predictor), make_up(monkeypatch, energies, thresholds)
    found = sweep(predictor, KnownCases([shapes(nested=True)[0]] * 2))
    assert found.passes == sum(calls) / 2 == passes < 112 + 80 * (5 in tried)
    chains = [s for s in measured if s.samples_from == 'chain']
    assert {s.steps for s in chains} == tried
    assert {s.start for s in chains if s.steps == 3} <= {0.4, 0.6}  # the two best
    assert {s.start for s in chains if s.steps == 5} <= {0.4}
    best = min(energies, key=energies.get)
    assert (found.chosen_samples.start, found.chosen_samples.steps) == (0.4, best) or thresholds < energies[best]


def test_a_budget_is_kept_by_leaving_out_cases_and_five_steps(tuned, monkeypatch):
    """By a clock that only passes over the volume move: to pre-segment a case takes as long as 8 of the denoiser."""
    predictor, cases, now = open_model(tuned, 0, CPU), KnownCases([shapes(nested=True)[0]] * 3), [0.0]

    class Clocked(case_sweep_module.SweepVolume):
        def presegment(self, mirrored):
            now[0] += 8 if mirrored else 0
            return super().presegment(mirrored)

        def _denoised_tiles(self, x, level, mirrored):
            now[0] += len(mirrored)
            return super()._denoised_tiles(x, level, mirrored)
    monkeypatch.setattr(case_sweep_module, 'SweepVolume', Clocked)
    monkeypatch.setattr(sweep_module, 'MORE_STEPS', (3, 5))
    monkeypatch.setattr(sweep_module, 'DEPENDENCES', (1.0,))
    predictor.refiner.denoiser = Nothing()
    measured = make_up(monkeypatch, {1: 0.5, 2: 0.4, 3: 0.3, 5: 0.2})
    monkeypatch.setattr(CaseSweep, 'likelihoods', lambda case, of: np.zeros(len(GRID)))

    def found_in(seconds):
        now[0] = 0.0
        measured.clear()
        found = sweep(predictor, cases, seconds, lambda: now[0])
        assert now[0] <= seconds
        return found
    # pre-segmentation; two draws from two starts: one and two steps, three steps; of two dependences; of the last two;
    # and the mask's
    up_to_three = 8 + 2 * 2 * 2 + 2 * 2 * 3 + 2 * 2 * 3 + 2 * 2 * 3 + 2 * 3
    first_look = 8 + 1 + 1  # the first case is opened for two passes, of which the second is timed; then it is kept
    found = found_in(3 * up_to_three + first_look)
    assert found.cases == ['0', '1', '2'] and found.steps_left_out == [5] and {s.steps for s in measured} == {1, 2, 3}
    found = found_in(3 * (up_to_three + 5 * (2 + 2 * 2 + 2 * 2 + 2)) + first_look)
    assert not found.cases_left_out and not found.steps_left_out and {s.steps for s in measured} == {1, 2, 3, 5}
    with pytest.raises(TuningError, match='0.1 minutes are too short to tune the sampling settings: 3 cases take lon'):
        found_in(8)
    with pytest.raises(TuningError):
        found_in(3 * up_to_three + first_look - 1)
    monkeypatch.setattr(budget_module, 'MIN_TUNING_CASES', 2)
    found = found_in(3 * up_to_three + first_look - 1)
    assert found.cases == ['0', '2'] and found.cases_left_out == ['1']
    assert len(found.masks[0].dice) == len(found.samples[0].energy) == 2
    monkeypatch.setattr(sweep_module, 'CACHE_BYTES', 1)  # so that each case is opened again in every round
    in_seven_rounds = 2 * (up_to_three + 6 * 8) + first_look + 8
    assert found_in(in_seven_rounds).cases == ['0', '2']
    with pytest.raises(TuningError):
        found_in(in_seven_rounds - 1)


def test_what_a_budget_left_out_is_in_log_and_report(scratch, monkeypatch):
    monkeypatch.setattr(sweep_module, 'cases_within_budget', lambda *_: [0, 2])
    monkeypatch.setattr(sweep_module._Run, '_try_more_steps', lambda run, rows: run.steps_left_out.append(5) or [])
    command('-budget', '10')
    assert 'Skipped for lack of time: 1 of 3 cases, 5 steps (nnUNetv2_pdddpm_tune measures them)' in log(scratch)
    content = report(scratch)
    assert content['cases'] == [CASES[0], CASES[2]] and content['cases_left_out'] == [CASES[1]]
    assert content['steps_left_out'] == [5] and {len(row['per_case'].popitem()[1]) for row in content['rows']} == {2}


def test_the_command_changes_the_settings_and_nothing_else_and_finds_the_same_again(scratch, monkeypatch):
    fold = scratch / 'fold_0'
    monkeypatch.setenv('nnUNet_wandb_enabled', '1')  # nnU-Net would delete the run of the training, and begin another
    run = fold / 'wandb' / 'latest-run' / 'run-1.wandb'
    run.parent.mkdir(parents=True)
    run.touch()
    before = {name: torch.load(fold / name, weights_only=False) for name in CHECKPOINTS}
    command()
    chosen = chosen_in(scratch)
    for name in CHECKPOINTS:
        after = torch.load(fold / name, weights_only=False)
        assert after.keys() == before[name].keys()
        assert after['logging'] == before[name]['logging'] and after['current_epoch'] == before[name]['current_epoch']
        changed = [key for key, value in after['network_weights'].items()
                   if not torch.equal(value, before[name]['network_weights'][key])]
        assert changed and all(key.startswith(SETTING) or key in ('calibration', 'quality') for key in changed)
        moved = before[name]['optimizer_state']['denoiser_before_averaging']
        for key, value in after['optimizer_state']['denoiser_before_averaging'].items():
            assert torch.equal(value, moved[key])
        assert stored_settings(after['network_weights']) == chosen
    assert run.is_file()
    make_trainer(TUNED, 0).load_checkpoint(str(fold / CHECKPOINTS[0]))  # --c goes on from it
    first = report(scratch)
    for name in CHECKPOINTS:  # as if the tuning before had found something else
        change(fold / name, SamplingSettings(samples=2, start=0.0, steps=7, dependence=0.3, redraw=0, mask_stock=1.0,
                                             mask_blind=0.0, mask_samples=5))
    command()
    again = report(scratch)
    timed = ('seconds', 'log')
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in first.items() if k not in timed}
    assert stored_settings(weights(fold / CHECKPOINTS[0])) == chosen


def test_volumes_of_the_validation_cases_go_into_the_checkpoint_and_end_with_further_training(scratch):
    file = scratch / 'fold_0' / 'checkpoint_final.pth'
    command()
    assert ('Volume of organ: no calibrated interval: the true volume is known of 3 validation cases whose mask holds '
            'something of it, 9 are needed' in log(scratch))
    stored = weights(file)['calibration']
    cases = validation_cases()
    for row, name in zip(stored, cases.names, strict=False):
        for label, channel in (('organ', 1), ('lesion', 2)):
            assert row[channel, 0] == pytest.approx(cases.true_volumes(name)[label])
            assert row[channel, FIELDS.index('known')] == 1
    assert not stored[len(cases.names):].any() and not stored[:, 0].any()
    assert not weights(scratch / 'fold_0' / 'checkpoint_best.pth')['calibration'].any()  # not measured
    trainer = make_trainer(TUNED, 0)
    trainer.load_checkpoint(str(file))
    assert torch.equal(trainer.refiner.calibration, stored)
    trainer.on_train_epoch_start()
    assert not trainer.refiner.calibration.any()


def once(monkeypatch) -> None:
    """The sweep is measured once, whatever is done with it."""
    measured = []

    def known(predictor, cases, *args, **kwargs):
        measured.extend([] if measured else [sweep(predictor, cases)])
        return measured[0]
    monkeypatch.setattr(tune_module, 'sweep', known)


def test_a_write_that_is_cut_off_leaves_the_old_checkpoint(scratch, monkeypatch):
    file = scratch / 'fold_0' / 'checkpoint_final.pth'
    before = file.read_bytes()

    def cut_off(checkpoint, target):
        Path(target).write_bytes(b'half')
        raise OSError('No space left on device')
    monkeypatch.setattr(torch, 'save', cut_off)
    with pytest.raises(SystemExit, match='Error: the results cannot be written .No space left on device'):
        command()
    assert file.read_bytes() == before and not list(file.parent.glob('.*partial'))
    assert not FILES & set(os.listdir(scratch / 'fold_0'))


def test_a_full_disk_is_told_where_torch_does_not_tell_it(scratch, monkeypatch):
    def cut_off(checkpoint, target):
        raise RuntimeError('[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0')
    monkeypatch.setattr(torch, 'save', cut_off)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match='The disk is full'):
        store(scratch / 'fold_0', SamplingSettings())


def test_a_tuning_at_the_end_of_training_that_was_killed_while_it_wrote_is_done_again(scratch, monkeypatch):
    """And one of an earlier training in the same folder is not taken for it."""
    fold = scratch / 'fold_0'
    trainer = make_trainer(TUNED, 0)
    trainer.load_checkpoint(str(fold / 'checkpoint_final.pth'))
    trainer._first_epoch = trainer.current_epoch - 1
    (fold / 'sampling_sweep.json').write_text('{}')
    once(monkeypatch)

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tune_module, 'write_sweep', kill)
        trainer.tune_sampling()
    assert not (fold / 'sampling_sweep.json').exists()
    trainer._first_epoch = trainer.current_epoch  # --c
    choice = trainer.tune_sampling()
    assert report(scratch)['chosen'] == asdict(choice)
    for name in CHECKPOINTS:
        assert stored_settings(weights(fold / name)) == choice


def test_a_training_whose_sweep_cannot_be_written_validates_with_what_its_checkpoint_holds(scratch, monkeypatch):
    file = scratch / 'fold_0' / 'checkpoint_final.pth'
    trainer = make_trainer(TUNED, 0)
    trainer.load_checkpoint(str(file))
    trainer._first_epoch = trainer.current_epoch - 1
    once(monkeypatch)

    def full(*args):
        raise OSError('No space left on device')
    monkeypatch.setattr(tune_module, 'write_sweep', full)
    choice = trainer.tune_sampling()
    assert choice == stored_settings(weights(file)) != SamplingSettings(samples=2)
    said = Path(trainer.log_file).read_text()
    assert 'ended with an error (No space left on device)' in said and 'stay as they are' not in said


def test_too_little_memory_to_tune_is_told_and_training_goes_on(scratch, monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(tune_module, 'sweep', no_memory)
    with pytest.raises(SystemExit, match='Error: There is not enough memory to tune'):
        command()
    trainer = make_trainer(TUNED, 0)
    trainer.load_checkpoint(str(scratch / 'fold_0' / 'checkpoint_final.pth'))
    trainer._first_epoch = trainer.current_epoch
    assert trainer.tune_sampling() is None
    assert 'stay as they are: there is not enough memory to tune them' in log(scratch)
    (scratch / 'plans.json').write_text('')  # as while the training of another fold writes it
    assert trainer.tune_sampling() is None
    assert 'plans.json' in log(scratch).rpartition('stay as they are: ')[2]
    trainer.calibrate_volumes()
    assert 'plans.json' in log(scratch).rpartition('are not calibrated: ')[2]


def test_a_volume_that_does_not_fit_on_the_device_is_measured_in_main_memory(tuned, monkeypatch, caplog):
    """By a device that is another name of the CPU, and too small for a draw."""
    case = validation_cases().load(CASES[0])
    settings, draw = [SamplingSettings(samples_from='stock')], CaseSweep.draw
    with torch.inference_mode():
        expected = CaseSweep(open_model(tuned, 0, CPU), case).energies(settings, range(2))
        opened = CaseSweep(open_model(tuned, 0, CPU), case)
        opened.device = opened.opened_device = SimpleNamespace(type='cuda')

        def too_large(self, *args):
            if self.device.type == 'cuda':
                raise torch.OutOfMemoryError('CUDA out of memory')
            return draw(self, *args)
        monkeypatch.setattr(CaseSweep, 'draw', too_large)
        assert opened.energies(settings, range(2)) == expected and opened.device == CPU
    assert 'does not fit on the device: its arrays are kept in main memory' in caplog.text


def test_a_damaged_checkpoint_is_named_and_the_other_stays_as_it_is(scratch, monkeypatch):
    final, best = (scratch / 'fold_0' / name for name in CHECKPOINTS)
    before = final.read_bytes()
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.raises(SystemExit, match=r'Error: .*checkpoint_best\.pth is truncated or no checkpoint'):
        command()
    assert final.read_bytes() == before


def test_plain_nnunet_prediction_uses_the_choice_and_each_fold_its_own(tuned, tmp_path):
    model = tmp_path / tuned.name
    for fold in (0, 1):
        shutil.copytree(tuned / 'fold_0', model / f'fold_{fold}')
    for name in ('plans.json', 'dataset.json'):
        shutil.copy(tuned / name, model)
    chosen = chosen_in(tuned)
    change(model / 'fold_1' / 'checkpoint_final.pth', replace(chosen, start=0.25))
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    assert predictor.network.settings == chosen
    of_both = VolumePredictor(device=CPU, allow_tqdm=False)
    of_both.initialize_from_trained_model_folder(str(model), (0, 1))
    assert of_both.fold_settings == [chosen, replace(chosen, start=0.25)]


def test_a_chain_that_is_chosen_for_mask_and_samples_is_what_plain_prediction_runs(scratch, monkeypatch):
    make_up(monkeypatch, {1: 0.1})
    monkeypatch.setattr(tune_module, 'choose_measured', lambda rows, plain_dice, images: (
        next(row.settings for row in rows if row.settings.mask_chain == 1), 0.5))
    command()
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(scratch), (0,))
    assert (predictor.network.settings.start, predictor.network.settings.samples_from) == (0.6, 'chain')
    levels = []
    predictor.network.denoiser.register_forward_hook(lambda module, inputs, output: levels.append(float(inputs[2][0])))
    predictor.predict_sliding_window_return_logits(validation_cases().load(CASES[0]).image)
    assert levels == pytest.approx([predictor.network.table.log_snr_at(0.6)] * len(levels)) and levels


def test_a_training_too_short_to_tune_in_keeps_its_settings_and_says_so(stock, scratch_results, small_grid):
    trainer = make_trainer(TUNED, 0)
    trainer.tuning_share = 1e-9
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier training
        Path(trainer.output_folder, name).touch()
    trainer.run_training()
    model = Path(trainer.output_folder_base)
    assert 'The sampling settings stay as they are: 0.0 minutes are too short' in log(model)
    stored = weights(model / 'fold_0' / 'checkpoint_final.pth')
    assert stored_settings(stored) == trainer.sampling and not (FILES & set(os.listdir(model / 'fold_0')))
    trainer.perform_actual_validation()  # where intervals are calibrated all the same, on all validation cases
    stored = weights(model / 'fold_0' / 'checkpoint_final.pth')
    assert int((stored[CALIBRATION][:, 1, -1] > 0).sum()) == len(trainer.do_split()[1]) > 0
    for fold, share, said in (('all', 1, 'fold all was trained on every case'), (0, 0, 'tuning_share is 0')):
        trainer = make_trainer(TUNED, fold)
        trainer.tuning_share = share
        shutil.copytree(model / 'fold_0', model / 'fold_all', dirs_exist_ok=True)
        trainer._first_epoch = -1
        assert trainer.tune_sampling() is None
        assert said in Path(trainer.log_file).read_text()


def test_the_papers_trainer_is_not_tuned(stock):
    plans, dataset = (json.loads((stock.preprocessed / f'{name}.json').read_text()) for name in (PLANS, 'dataset'))
    trainer = PDDDPMTrainerPaper({**plans, 'continue_training': False}, '3d_fullres', 0, dataset, CPU)
    assert trainer.tuning_share == 0
    shutil.rmtree(trainer.output_folder_base)


def test_a_model_with_the_papers_levels_is_refused(scratch, monkeypatch):
    monkeypatch.setattr(VolumePredictor, 'refiner', SimpleNamespace(design=DiffusionDesign(paper_levels=300)))
    with pytest.raises(SystemExit, match=f"Error: .*fold_0 holds a model of {TUNED}, whose settings are the paper's"):
        command()


# raters

@pytest.fixture
def raters(stock, tmp_path) -> Path:
    """Masks of three people who disagree about one side of the phantom, of two cases."""
    folder = tmp_path / 'raters'
    folder.mkdir()
    for case in CASES[:2]:
        image = sitk.ReadImage(str(stock.raw / 'labelsTr' / f'{case}.nii.gz'))
        for i in range(3):
            labels = sitk.GetArrayFromImage(image)
            labels[:, :, :8 + 3 * i] = 0
            mask = sitk.GetImageFromArray(labels)
            mask.CopyInformation(image)
            sitk.WriteImage(mask, str(folder / f'{case}__{i}.nii.gz'))
    return folder


def test_with_raters_the_samples_close_to_them_are_chosen(scratch, raters):
    command()
    to_truth = report(scratch)
    command('-raters', str(raters))
    content = report(scratch)
    for score in ('energy', 'ged_squared_fair'):
        for s, row in rows_of(content, 'samples, first rounds').items():
            values, before = (r['per_case'][score] for r in (row, rows_of(to_truth, 'samples, first rounds')[s]))
            assert values[0] != before[0] and values[1] != before[1] and values[2] == before[2]  # which has no raters
    last = rows_of(content, 'samples')
    chosen, lowest = next(r for r in last.values() if r['chosen']), min(last.values(), key=lambda r: r['energy'])
    assert difference_interval(*(np.array(r['per_case']['energy']) for r in (chosen, lowest)))[0] <= 0
    masks = [{s: row['per_case'] for s, row in rows_of(c, 'mask').items() if s.is_stock or s.mask_blind == 1}
             for c in (to_truth, content)]
    assert [list(m.values()) for m in masks][0] == [list(m.values()) for m in masks][1]  # measured by the truth


def test_raters_masks_come_onto_the_grid_of_the_preprocessed_truth(stock, tuned, tmp_path):
    """The truth itself, given as a rater's mask, is the preprocessed truth, voxel by voxel."""
    for case in CASES:
        shutil.copy(stock.raw / 'labelsTr' / f'{case}.nii.gz', tmp_path / f'{case}__me.nii.gz')
    cases = validation_cases(tmp_path)
    for name in CASES:
        case = cases.load(name)
        assert (case.labels > 0).any()
        np.testing.assert_array_equal(case.raters[0], case.labels.clip(0))


# refusals

def test_what_cannot_be_tuned_is_refused_in_one_sentence(scratch, stock, tmp_path, monkeypatch):
    final = scratch / 'fold_0' / 'checkpoint_final.pth'
    before = final.read_bytes()

    def refused(*flags: str, **kwargs) -> str:
        with pytest.raises(SystemExit) as exit_:
            command(*flags, **kwargs)
        message = str(exit_.value)
        assert message.startswith('Error: ') and '\n' not in message and final.read_bytes() == before
        return message

    for said in (refused(trainer='PDDDPMTrainer_5epochs'), refused(fold='2')):
        assert 'checkpoint_final.pth does not exist: train this fold' in said
        assert said.endswith('or correct DATASET, CONFIG, FOLD, -tr and -p.')  # -f and -chk are other commands'
    assert 'trained by nnUNetTrainerTiny, which is no PDDDPM' in refused(trainer=STOCK)
    assert 'too short to tune' in refused('-budget', '0.0001')
    (scratch / 'fold_0').rename(scratch / 'fold_all')
    final = scratch / 'fold_all' / 'checkpoint_final.pth'
    assert 'fold with validation cases' in refused(fold='all')
    (scratch / 'fold_all').rename(scratch / 'fold_0')
    final = scratch / 'fold_0' / 'checkpoint_final.pth'
    assert 'There is no folder' in refused('-raters', str(tmp_path / 'nobody'))
    (tmp_path / 'others').mkdir()
    shutil.copy(stock.raw / 'labelsTr' / 'phantom_001.nii.gz', tmp_path / 'others' / 'phantom_001__1.nii.gz')
    assert 'no mask of any validation case of fold 0' in refused('-raters', str(tmp_path / 'others'))
    with monkeypatch.context() as patch:
        patch.setattr(os, 'access', lambda path, mode: False)
        assert 'cannot be written to' in refused()

    elsewhere = tmp_path / 'preprocessed' / DATASET
    monkeypatch.setenv('nnUNet_preprocessed', str(elsewhere.parent))
    elsewhere.mkdir(parents=True)
    assert f'{PLANS}.json is missing' in refused()
    for name in (f'{PLANS}.json', 'dataset.json', 'splits_final.json'):
        shutil.copy(stock.preprocessed / name, elsewhere)
    assert 'run nnUNetv2_preprocess' in refused()
    data = json.loads((elsewhere / f'{PLANS}.json').read_text())['configurations']['3d_fullres']['data_identifier']
    (elsewhere / data).mkdir()
    for file in (stock.preprocessed / data).glob('phantom_000*'):
        shutil.copy(file, elsewhere / data)
    assert '2 of 3 validation cases are missing' in refused()
    (elsewhere / 'splits_final.json').write_text(json.dumps([{'train': list(CASES), 'val': []}]))
    assert 'Fold 0 has no validation cases' in refused()


def test_a_budget_has_to_be_positive(capsys):
    with pytest.raises(SystemExit):
        command('-budget', '0')
    assert '-budget must be a number of minutes above 0' in capsys.readouterr().err
