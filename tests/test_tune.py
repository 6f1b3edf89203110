"""nnUNetv2_pdddpm_tune and the tuning at the end of training: the rule, the sweep, what is stored, what is left out."""
from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from conftest import DATASET, DATASET_ID, PLANS, STOCK, Workspace, make_trainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_pdddpm.commands.tune import main
from nnunet_pdddpm.diffusion.drawing import draw_shifts
from nnunet_pdddpm.evaluation.calibration import negative_log_likelihood
from nnunet_pdddpm.evaluation.overlap import iou_matrix
from nnunet_pdddpm.evaluation.raters import ged_squared
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.refiner import MASK, SAMPLES, stored_settings
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper
from nnunet_pdddpm.tuning import sweep as sweep_module
from nnunet_pdddpm.tuning import tune as tune_module
from nnunet_pdddpm.tuning.budget import Cost, cases_in, settings_in
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.choice import (
    LEVEL,
    Row,
    TuningError,
    choose_mask,
    choose_samples,
    difference_interval,
)
from nnunet_pdddpm.tuning.intervals import conformal_width, conformal_widths
from nnunet_pdddpm.tuning.scores import VERY_FAR, Truth
from nnunet_pdddpm.tuning.stored import store
from nnunet_pdddpm.tuning.sweep import CaseSweep, candidates, sweep
from nnunet_pdddpm.tuning.tune import open_model

TUNED = 'PDDDPMTrainerTuned'
FILES = {'sampling_sweep.json', 'sampling_sweep.csv', 'sampling_sweep.png'}
CASES = ('phantom_000', 'phantom_003', 'phantom_006')  # held out in fold 0


# the rule

BASE = np.linspace(0.6, 0.9, 20)
NOISE = np.random.default_rng(0).standard_normal(20) / 50


def row(dice, nll=0.1, t_start=700, steps=1, samples=8, ged=0.3, **of_settings) -> Row:
    settings = SamplingSettings(t_start=t_start, steps=steps, samples=samples, **of_settings)
    return Row(settings, *(np.broadcast_to(values, 20).copy() for values in (dice, nll, ged)))


STOCK_ROW = row(BASE, 0.2, t_start=0, samples=1)


def test_the_interval_of_a_difference_is_that_of_the_mean_of_paired_differences():
    assert difference_interval(BASE + 0.01, BASE) == pytest.approx((0.01, 0.01))
    low, high = difference_interval(BASE + NOISE, BASE)
    error = NOISE.std(ddof=1) / np.sqrt(20)
    assert (low, high) == pytest.approx((NOISE.mean() - 1.96 * error, NOISE.mean() + 1.96 * error), abs=error / 4)
    assert difference_interval(BASE + NOISE, BASE) == (low, high)  # seeded
    undefined = np.where(np.arange(20) == 3, np.nan, BASE)  # a false positive where there is nothing counts as 0
    found_something = np.where(np.arange(20) == 3, 0, BASE)
    assert difference_interval(undefined, found_something)[1] > 0.02
    assert difference_interval(undefined, undefined) == (0, 0)


def test_the_mask_is_accurate_then_likely_then_cheap():
    best = row(BASE + 0.02, 0.15, steps=2)
    as_accurate = row(BASE + 0.015 + NOISE - NOISE.mean(), 0.10, steps=5)
    cheaper_than_that = row(BASE + 0.015 + NOISE - NOISE.mean(), 0.102 + NOISE - NOISE.mean(), steps=3)
    likelier_but_worse = row(BASE + 0.01, 0.01)
    rows = [STOCK_ROW, best, as_accurate, likelier_but_worse]
    assert choose_mask(rows) is as_accurate
    assert choose_mask([*rows, cheaper_than_that]) is cheaper_than_that
    assert choose_mask(list(reversed([*rows, cheaper_than_that]))) is cheaper_than_that
    assert choose_mask([STOCK_ROW, likelier_but_worse, best]) is best


def test_no_mask_below_stocks_dice_is_chosen():
    within_noise_but_below = row(BASE - 0.001 + NOISE - NOISE.mean(), 0.01)
    assert choose_mask([STOCK_ROW, within_noise_but_below]) is STOCK_ROW
    better = row(BASE + 0.004, 0.3)
    assert choose_mask([STOCK_ROW, within_noise_but_below, better]) is better
    as_good = row(BASE, 0.01)
    assert choose_mask([STOCK_ROW, as_good]) is as_good
    assert choose_mask([STOCK_ROW, row(BASE, 0.2)]) is STOCK_ROW  # it costs nothing
    with pytest.raises(TuningError, match='No validation case has foreground'):
        choose_mask([row(np.nan, t_start=0), row(BASE)])


def test_samples_are_close_to_the_truth_then_cheap():
    far = row(BASE + 0.1, ged=0.4, t_start=960)
    closest = row(BASE - 0.1, ged=0.3, steps=3)
    as_close = row(BASE, ged=0.301 + NOISE - NOISE.mean(), t_start=500)
    as_cheap = row(BASE, ged=0.302 + NOISE - NOISE.mean(), t_start=700)
    assert choose_samples([far, closest]) is closest
    assert choose_samples([far, closest, as_cheap]) is as_cheap
    assert choose_samples([as_cheap, as_close, far, closest]) is as_close


# the budget

def test_a_conformal_interval_holds_what_it_promises_for_new_cases_however_errors_are_spread():
    rng = np.random.default_rng(0)
    for draw in (rng.standard_exponential, lambda size: abs(rng.standard_cauchy(size)) / 50):
        held = [(draw(20) <= conformal_width(draw(39))).mean() for _ in range(2000)]
        assert LEVEL - 0.01 < np.mean(held) < LEVEL + 0.03  # expected 38 of 40


def test_a_conformal_interval_needs_enough_errors_and_leaves_out_the_undefined():
    errors = np.arange(1.0, 20) / 10
    assert conformal_width(errors) == 1.9 and conformal_width(errors[1:]) == 0
    assert conformal_width(np.concatenate([errors, errors + 1.9, [np.nan] * 5])) == 3.8  # the 38th of 38
    assert conformal_width(np.arange(1.0, 58) / 10) == 5.6  # the 56th of 57: 0.95 * 58 = 55.1
    errors[0] = VERY_FAR
    assert conformal_width(errors) == 0  # the samples say nothing of the error


def test_intervals_are_of_each_label_where_enough_cases_have_it():
    errors = np.column_stack([np.arange(1.0, 31) / 10, np.arange(1.0, 31) / 4])
    assert conformal_widths(errors) == (3.0, 7.5)
    errors[15:, 1] = np.nan
    assert conformal_widths(errors) == (3.0, conformal_width(errors)) and conformal_width(errors) == 3.5  # 44th of 45
    assert conformal_widths(errors[:9].repeat(5, 1)) == (0,) * 10 and conformal_widths(None) == ()  # nine cases


def grid(levels=(500, 900), samples=8) -> list[SamplingSettings]:
    return [SamplingSettings(t_start=t, steps=k, samples=samples, eta=eta)
            for t, k, eta in itertools.product(levels, (1, 2, 10), (0.0, 1.0)) if k > 1 or eta == 0]


def test_a_budget_leaves_out_cases_of_single_steps_and_many_steps_of_the_others():
    settings, voxels, cost = grid(), [1000] * 20, Cost(0.001, 0.001, 8)
    single = [s for s in settings if s.steps == 1]
    per_step = 20 * 1000 * 0.001 * 8
    everything = cost.of(settings, voxels)
    assert everything == pytest.approx(20 + per_step * 2 * (1 + 2 * (1 + 9)))  # pre-segmentation, shared first steps
    assert settings_in(everything, settings, voxels, cost) == settings
    kept = settings_in(everything - 1, settings, voxels, cost)
    assert {(s.steps, s.eta) for s in settings} - {(s.steps, s.eta) for s in kept} == {(10, 1.0)}
    kept = settings_in(20 + per_step * 2, settings, voxels, cost)
    assert {s.steps for s in kept} == {1} and {s.t_start for s in kept} == {500, 900}
    assert settings_in(20, settings, voxels, cost) == []
    assert cases_in(20 + per_step * 2, [single], voxels, cost) == list(range(20))
    assert len(cases_in(20 + per_step * 2, [single[:1], single[1:]], voxels, cost)) == 18  # pre-segmented twice
    cases = cases_in((20 + per_step * 2) / 2, [single], voxels, cost)
    assert len(cases) == 10 and cases[0] == 0 and cases[-1] == 19
    assert len(cases_in((20 + per_step * 2) / 4, [single], voxels, cost)) == 5
    assert cases_in((20 + per_step * 2) / 4.1, [single], voxels, cost) == []
    assert cases_in(2 * (20 + per_step * 2) / 4.1, [single], [9000, 1000, 1000], cost) == []


# scores

class Labels:
    """What `Truth` asks of a label manager."""
    def __init__(self, regions=None, ignore=None, heads=3):
        self.has_regions, self.foreground_regions = regions is not None, regions
        self.ignore_label, self.num_segmentation_heads = ignore, heads


def test_dice_is_over_labels_that_are_there_and_the_ignore_label_counts_nowhere():
    truth = np.array([[[0, 0, 1, 1, -1, 3, 3, 0]]])
    probabilities = np.array([[0.9, 0.2, 0.3, 0.1, 0.8, 0.1, 0, 1], [0.1, 0.8, 0.6, 0.9, 0.1, 0.9, 1, 0],
                              [0, 0, 0.1, 0, 0.1, 0, 0, 0]], np.float32)
    scored = Truth(truth, Labels(ignore=3), torch.device('cpu')).score(torch.from_numpy(probabilities)[:, None, None])
    valid = [0, 1, 2, 3, 4, 7]
    nll = negative_log_likelihood(probabilities[:, valid], np.array([0, 0, 1, 1, 0, 0]))
    assert scored == pytest.approx((2 * 2 / (2 + 3), nll), rel=1e-5)  # label 2 is nowhere: left out
    nothing = Truth(np.zeros((1, 1, 8)), Labels(), torch.device('cpu'))
    assert np.isnan(nothing.score(torch.eye(3)[0].reshape(3, 1, 1, 1).expand(3, 1, 1, 8))[0])


def test_regions_overlap_and_their_nll_is_binary():
    truth = np.array([[[0, 1, 2, 2]]])
    p = np.array([[0.1, 0.7, 0.9, 0.4], [0.2, 0.6, 0.8, 0.9]], np.float32)
    dice, nll = Truth(truth, Labels([(1, 2), 2], heads=2), torch.device('cpu')).score(
        torch.from_numpy(p)[:, None, None])
    assert dice == pytest.approx(np.mean([2 * 2 / (3 + 2), 2 * 2 / (2 + 3)]))
    assert nll == pytest.approx(-np.log([0.9, 0.7, 0.9, 0.4, 0.8, 0.4, 0.8, 0.9]).mean(), rel=1e-5)


@pytest.mark.parametrize('regions', [None, [(1, 2), 2]])
@pytest.mark.parametrize('number', [0, 3])
def test_the_distance_of_samples_is_that_of_the_evaluation(regions, number):
    """Of the masks that are drawn, without what is to be ignored; to the truth without raters."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (1 + number, 2, 6, 7))
    labels[0, :, 0] = 3  # to be ignored
    truth = Truth(labels[0], Labels(regions, 3, 2 if regions else 3), torch.device('cpu'), labels[1:])
    p = torch.from_numpy(rng.random((4, 2 if regions else 3, 2, 6, 7)))
    p = p if regions else p / p.sum(1, keepdim=True)
    shifts = torch.tensor([0.3, 0.3] if regions else [0, -0.4, 0.8])
    logits = (torch.logit(p) if regions else p.log()) + shifts.reshape(-1, 1, 1, 1)
    samples = (logits > 0).numpy() if regions else logits.argmax(1).numpy()[:, None] == [[[[1]]], [[[2]]]]
    given = labels[1:] if number else labels[:1]
    others = np.stack([np.isin(given, of) for of in (regions or (1, 2))], 1)
    samples, others = samples[..., 1:, :], others[..., 1:, :]
    expected = np.mean([ged_squared(iou_matrix(one, other), iou_matrix(one, one), iou_matrix(other, other))
                        for one, other in ((samples[:, label], others[:, label]) for label in (0, 1))])
    assert truth.ged([truth.drawn(sample, shifts) for sample in p]) == pytest.approx(expected)


def test_samples_of_the_truths_distribution_have_the_lowest_mean_distance_to_it():
    """Drawn by thresholds as in prediction: a disc with a margin of the truth's width, a narrower, and a wider one."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    inside = torch.from_numpy(12 - np.hypot(y - 16, x - 16))[None]  # pixels within a circle
    truths = [Truth((inside + shift > 0).numpy().astype(int), Labels(heads=2), torch.device('cpu'))
              for shift in rng.logistic(0, 1, 200)]
    ged = {}
    for width in (0.3, 1, 2.5):
        p = torch.sigmoid(inside / width)
        samples = [truths[0].drawn(torch.stack([1 - p, p]), draw_shifts(2, False, i, 8, 0)) for i in range(8)]
        ged[width] = np.mean([truth.ged(samples) for truth in truths])
    assert ged[1] < min(ged[0.3], ged[2.5]) - 0.01


@pytest.mark.parametrize('regions', [None, [(1, 2), 2]])
def test_errors_of_volumes_are_in_standard_deviations_of_the_samples(regions):
    manager = Labels(regions, 3, heads=2 if regions else 3)
    truth = Truth(np.array([[[1, 1, 1, 1, 0, 0, 0]]]), manager, torch.device('cpu'))

    def mask(ones: int, twos: int) -> torch.Tensor:
        labels = torch.tensor([1] * ones + [2] * twos + [0] * (7 - ones - twos))
        return torch.stack([labels > 0, labels == 2]) if regions else labels
    assert truth.volume_errors([mask(1, 0), mask(3, 0)])[0] == pytest.approx((4 - 2) / np.sqrt(2))
    assert np.isnan(truth.volume_errors([mask(1, 0), mask(3, 0)])[1])
    assert truth.volume_errors([mask(4, 0), mask(4, 0)])[0] == 0
    errors = truth.volume_errors([mask(3, 1), mask(3, 1)])
    assert errors[1] == VERY_FAR and errors[0] == (0 if regions else VERY_FAR)
    partly = Truth(np.array([[[1, 1, 1, 1, 0, 0, 0, 3]]]), manager, torch.device('cpu'))  # a voxel to be ignored
    assert np.isnan(partly.volume_errors([mask(1, 0), mask(3, 0)])).all()


# the sweep and what is stored

@pytest.fixture(scope='module')
def small_grid():
    """Two start levels and up to two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, 'SIGNAL_TO_NOISE', (0.25, 0.004))
        patch.setattr(sweep_module, 'STEPS', (1, 2))
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
    monkeypatch.setattr(sweep_module, 'SIGNAL_TO_NOISE', (0.004,))
    monkeypatch.setenv('nnUNet_results', str(results))
    fold = results / DATASET / tuned.name / 'fold_0'
    for name in FILES:
        (fold / name).unlink()
    for file in fold.glob('checkpoint_*.pth'):
        checkpoint = torch.load(file, weights_only=False)
        for prefix, settings in ((MASK, SamplingSettings()), (SAMPLES, SamplingSettings(samples=2))):
            for name in ('t_start', 'steps', 'samples', 'blend', 'eta', 'redraw'):
                checkpoint['network_weights'][prefix + name].fill_(getattr(settings, name))
        torch.save(checkpoint, file)
    return fold.parent


def command(*flags: str, fold: str = '0', trainer: str = TUNED) -> None:
    main([str(DATASET_ID), '3d_fullres', fold, '-tr', trainer, '-p', PLANS, '-device', 'cpu', '--disable_progress_bar',
          *flags])


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=False)['network_weights']


def report(model: Path) -> dict:
    return json.loads((model / 'fold_0' / 'sampling_sweep.json').read_text())


def log(model: Path) -> str:
    return ''.join(file.read_text() for file in (model / 'fold_0').glob('training_log*'))


def settings_of(row: dict) -> SamplingSettings:
    return SamplingSettings(**{name: row[name] for name in SamplingSettings.__dataclass_fields__})


def test_training_ends_with_tuned_settings_in_both_checkpoints_and_in_the_network(tuned):
    assert FILES <= {file.name for file in (tuned / 'fold_0').iterdir()}
    chosen = {of: SamplingSettings(**report(tuned)['chosen'][of]) for of in ('mask', 'samples')}
    for name in ('checkpoint_final.pth', 'checkpoint_best.pth'):
        stored = weights(tuned / 'fold_0' / name)
        assert stored_settings(stored, MASK) == chosen['mask'] and stored_settings(stored, SAMPLES) == chosen['samples']
    assert chosen['samples'].t_start in (703, 960)
    assert asdict(chosen['mask']) == json.loads((tuned / 'network.json').read_text())  # nnU-Net goes on to validate it
    assert log(tuned).count('Sampling settings: t_start=') == 1
    assert not list((tuned / 'fold_0').glob('.*partial'))

    trainer = make_trainer(TUNED, 0)  # --val, and --c after a validation that was cut off
    trainer.load_checkpoint(str(tuned / 'fold_0' / 'checkpoint_final.pth'))
    assert trainer.refiner.settings == chosen['mask']
    before = (tuned / 'fold_0' / 'sampling_sweep.json').stat().st_mtime_ns
    trainer.run_training()
    assert (tuned / 'fold_0' / 'sampling_sweep.json').stat().st_mtime_ns == before
    assert 'they were tuned when training ended' in log(tuned)
    assert stored_settings(weights(tuned / 'fold_0' / 'checkpoint_final.pth'), MASK) == chosen['mask']


def test_the_report_says_what_was_measured(tuned):
    content = report(tuned)
    assert content['cases'] == list(CASES) and content['left_out'] == {'settings': [], 'cases': []}
    rows = {settings_of(r): r for r in content['rows']}
    single, further = ({s for s in rows if (s.steps == 2) == two} for two in (False, True))
    stock = next(r for s, r in rows.items() if s.is_stock)
    # the mask from one of the levels, if a step of the samples from any reached stock's Dice
    reached = any(rows[s]['dice'] >= stock['dice'] for s in single if s.steps == 1 and s.samples == 2)
    assert len(single) == 1 + 4 * (1 + 2 + reached)  # stock; blends x (direct; samples x levels; mask)
    assert {s.t_start for s in single} == {0, 703, 960, 1000} and {s.blend for s in rows} == {0, 0.25, 0.5, 0.75}
    for number, tried in ((1, reached), (2, True)):  # two steps: with either eta, and redrawing
        of = {s for s in further if s.samples == number}
        assert len(of) == 4 * 3 * tried and len({s.t_start for s in of}) == tried
    mask = rows[SamplingSettings(**content['chosen']['mask'])]
    assert mask['dice'] >= stock['dice'] and stock['network_calls'] == 0
    assert f'Dice {mask["dice"]:.4f} against stock {stock["dice"]:.4f} on 3 cases' in content['in_one_line']
    assert content['in_one_line'] in log(tuned)
    with open(tuned / 'fold_0' / 'sampling_sweep.csv', newline='') as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) and 'mask' in ''.join(line['chosen'] for line in table)
    assert float(table[0]['dice']) == pytest.approx(content['rows'][0]['dice'], rel=1e-4)
    samples = rows[SamplingSettings(**content['chosen']['samples'])]
    assert np.shape(samples['per_case']['volume_errors']) == (3, 2) and stock['per_case']['volume_errors'] is None
    assert content['chosen']['interval_sd'] == [0, 0, 0] and 'Intervals of volumes are not calibrated' in log(tuned)
    picture = (tuned / 'fold_0' / 'sampling_sweep.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 10_000


def test_rows_are_what_each_setting_gives_alone(tuned):
    """Sharing and blending change nothing; stock is nnU-Net's own prediction with mirroring."""
    predictor = open_model(tuned, 0, torch.device('cpu'))
    cases = ValidationCases(make_trainer(TUNED, 0))
    case = cases.load(CASES[1])
    content = report(tuned)
    labels = case.labels.clip(0).astype(int)
    image, unpad = pad_nd_image(case.image, predictor.configuration_manager.patch_size, 'constant', {'value': 0}, True)
    box = (slice(None), *unpad[1:])
    with torch.inference_mode():
        volume = Volume(predictor, image, torch.device('cpu'))
        volume.start_fold()
        stock = volume.add_stock(torch.zeros(volume.shape), 1.0)[box]
        for r in content['rows']:
            s = settings_of(r)
            if not (s.is_stock or (s.t_start == 960 and s.blend in (0, 0.25))):
                continue
            p = stock
            if not s.is_stock:
                mean = sum(volume.sample(s, i, s.samples) for i in range(s.samples))[box] / s.samples
                p = (1 - s.blend) * mean + s.blend * stock
            mask = p.argmax(0).numpy()
            dice = [2 * ((mask == c) & (labels == c)).sum() / ((mask == c).sum() + (labels == c).sum())
                    for c in (1, 2) if ((mask == c) | (labels == c)).any()]
            assert r['per_case']['dice'][1] == pytest.approx(np.mean(dice), abs=1e-5), s
            nll = negative_log_likelihood(p.flatten(1).numpy(), labels.flatten())
            assert r['per_case']['nll'][1] == pytest.approx(nll, rel=1e-4), s


def test_what_is_measured_twice_without_a_chain_has_the_same_scores(tuned):
    """The first estimate is shared between chains, and a result without a chain is no chain's first estimate."""
    case = CaseSweep(open_model(tuned, 0, torch.device('cpu')), ValidationCases(make_trainer(TUNED, 0)).load(CASES[1]))
    one, other = (SamplingSettings(t_start=1000, steps=0, samples=1, blend=0.0, eta=eta) for eta in (0.0, 1.0))
    with torch.inference_mode():
        case.measure([one, other])
    assert case.scores[one]['nll'] == case.scores[other]['nll'] and case.scores[one]['ged'] == case.scores[other]['ged']


def test_the_first_step_is_computed_once_for_all_chains_from_the_same_start(tuned, monkeypatch):
    predictor = open_model(tuned, 0, torch.device('cpu'))
    cases = ValidationCases(make_trainer(TUNED, 0))
    cases.names = cases.names[:1]
    passes = []
    monkeypatch.setattr(Volume, 'denoise', lambda volume, x, t, mirrored: passes.append(t) or torch.zeros_like(x))
    monkeypatch.setattr(sweep_module, 'mean', lambda values: 0.0)  # so every level is as good as stock for the mask
    sweep(predictor, cases)
    single = 2 * 2 + 1  # from two levels two samples; the direct one
    assert passes[:single].count(703) == passes[:single].count(960) == 2
    # a draw for the mask and two samples, from one level each: the first step, and the second one of k=2, three ways
    assert len(passes) == single + 3 * (1 + 3)


def test_memory_is_bounded_at_the_price_of_sharing_less(tuned, monkeypatch):
    monkeypatch.setattr(sweep_module, 'SIGNAL_TO_NOISE', (0.004,))
    predictor, cases = open_model(tuned, 0, torch.device('cpu')), ValidationCases(make_trainer(TUNED, 0))
    cases.names = cases.names[:1]
    shared = sweep(predictor, cases)
    monkeypatch.setattr(sweep_module, 'MEMORY', 1)
    alone = sweep(predictor, cases)
    assert shared.rows.keys() == alone.rows.keys()
    for s in shared.rows:
        np.testing.assert_array_equal(shared.rows[s].dice, alone.rows[s].dice)
        np.testing.assert_array_equal(shared.rows[s].nll, alone.rows[s].nll)


def test_candidates_stay_within_what_the_model_was_trained_on(tuned):
    predictor = open_model(tuned, 0, torch.device('cpu'))
    predictor.refiner.t_max.fill_(800)
    for prefix in (MASK, SAMPLES):
        for mirrored in (True, False):
            tried = candidates(predictor.refiner, prefix, mirrored)
            assert {s.t_start for s in tried} == {703, 800}
            assert {s.samples for s in tried if s.steps} == {1 if prefix == MASK and mirrored else 2}
            assert (0 in {s.steps for s in tried}) == (prefix == MASK)


def test_the_command_changes_the_settings_and_nothing_else(scratch, monkeypatch):
    fold = scratch / 'fold_0'
    names = ('checkpoint_final.pth', 'checkpoint_best.pth')
    before = {name: torch.load(fold / name, weights_only=False) for name in names}
    command()
    chosen = report(scratch)['chosen']
    for name in names:
        after = torch.load(fold / name, weights_only=False)
        assert after.keys() == before[name].keys()
        assert after['logging'] == before[name]['logging'] and after['current_epoch'] == before[name]['current_epoch']
        changed = [key for key, value in after['network_weights'].items()
                   if not torch.equal(value, before[name]['network_weights'][key])]
        assert changed and all(key.removeprefix(SAMPLES) in SamplingSettings.__dataclass_fields__ for key in changed)
        moved = before[name]['optimizer_state']['denoiser_before_averaging']
        for key, value in after['optimizer_state']['denoiser_before_averaging'].items():
            assert torch.equal(value, moved[key])
        assert stored_settings(after['network_weights'], MASK) == SamplingSettings(**chosen['mask'])
        assert stored_settings(after['network_weights'], SAMPLES) == SamplingSettings(**chosen['samples'])
    make_trainer(TUNED, 0).load_checkpoint(str(fold / names[0]))  # --c goes on from it


def test_widths_of_intervals_go_into_the_final_checkpoint_and_the_network_and_end_with_further_training(
        scratch, monkeypatch):
    monkeypatch.setattr(tune_module, 'conformal_widths', lambda errors: tuple(np.arange(1.0, 1 + len(errors.T))))
    trainer = make_trainer(TUNED, 0)
    trainer.load_checkpoint(str(scratch / 'fold_0' / 'checkpoint_final.pth'))
    trainer._first_epoch = trainer.current_epoch - 1
    trainer.on_train_end()
    assert trainer.refiner.interval_sd.tolist() == [0, 1, 2]
    assert weights(scratch / 'fold_0' / 'checkpoint_final.pth')['interval_sd'].tolist() == [0, 1, 2]
    assert weights(scratch / 'fold_0' / 'checkpoint_best.pth')['interval_sd'].tolist() == [0, 0, 0]  # not measured
    assert report(scratch)['in_one_line'].endswith('intervals of volumes 1.00, 2.00 sd to both sides')
    trainer.on_train_epoch_start()
    assert trainer.refiner.interval_sd.tolist() == [0, 0, 0]


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


def test_a_full_disk_is_told_where_torch_does_not_tell_it(scratch, monkeypatch):
    def cut_off(checkpoint, target):
        raise RuntimeError('[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0')
    monkeypatch.setattr(torch, 'save', cut_off)
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match='The disk is full'):
        store(scratch / 'fold_0', SamplingSettings(), SamplingSettings(), (0.0, 0.0, 0.0))


def test_a_tuning_at_the_end_of_training_that_was_killed_while_it_wrote_is_done_again(scratch, monkeypatch):
    """And one of an earlier training in the same folder is not taken for it."""
    fold = scratch / 'fold_0'
    trainer = make_trainer(TUNED, 0)
    trainer.load_checkpoint(str(fold / 'checkpoint_final.pth'))
    trainer._first_epoch = trainer.current_epoch - 1
    (fold / 'sampling_sweep.json').write_text('{}')
    measured = []

    def once(predictor, cases, *args, **kwargs):
        measured.extend([] if measured else [sweep(predictor, cases)])
        return measured[0]
    monkeypatch.setattr(tune_module, 'sweep', once)

    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tune_module, 'write', kill)
        trainer.tune_sampling()
    assert not (fold / 'sampling_sweep.json').exists()
    trainer._first_epoch = trainer.current_epoch  # --c
    choice = trainer.tune_sampling()
    assert report(scratch)['chosen'] == {**asdict(choice), 'interval_sd': list(choice.interval_sd)}
    for name in ('checkpoint_final.pth', 'checkpoint_best.pth'):
        assert stored_settings(weights(fold / name), MASK) == choice.mask


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


def test_a_damaged_checkpoint_is_named_and_the_other_stays_as_it_is(scratch):
    final, best = (scratch / 'fold_0' / f'checkpoint_{which}.pth' for which in ('final', 'best'))
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
    file = model / 'fold_1' / 'checkpoint_final.pth'
    checkpoint = torch.load(file, weights_only=False)
    checkpoint['network_weights']['t_start'].fill_(333)
    torch.save(checkpoint, file)
    predictor = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    chosen = SamplingSettings(**report(tuned)['chosen']['mask'])
    assert predictor.network.settings == chosen != SamplingSettings()
    of_both = VolumePredictor(device=torch.device('cpu'), allow_tqdm=False)
    of_both.initialize_from_trained_model_folder(str(model), (0, 1))
    assert [settings.mask.t_start for settings in of_both.fold_settings] == [chosen.t_start, 333]


def test_more_steps_are_tried_as_long_as_they_are_better(scratch, monkeypatch):
    predictor, cases = open_model(scratch, 0, torch.device('cpu')), ValidationCases(make_trainer(TUNED, 0))
    ged = {1: 0.5, 2: 0.4, 3: 0.45, 5: 0.1, 10: 0.1}
    measured = []

    class Known:
        def __init__(self, predictor, case):
            self.scores = {sweep_module.stock_settings(predictor.refiner): {'dice': 0.5, 'nll': 0.1, 'ged': 0.5}}

        def measure(self, settings):
            measured.append(settings)
            for s in settings:
                for b in sweep_module.blended(s):
                    self.scores[b] = {'dice': 0.6 if s.steps == 2 else 0.55, 'nll': 0.1,
                                      'ged': ged.get(s.steps, 1) - 0.01 * s.redraw}
    monkeypatch.setattr(sweep_module, 'CaseSweep', Known)
    monkeypatch.setattr(sweep_module, 'STEPS', tuple(ged))
    found = sweep(predictor, cases)
    assert {s.steps for s in found.for_samples} == {1, 2, 3} and not found.settings_left_out
    ways = {steps: {(s.eta, s.redraw) for s in found.for_samples if s.steps == steps} for steps in (2, 3)}
    assert ways == {2: {(0, False), (1, False), (0, True)}, 3: {(0, True)}}  # from three on the one best at two
    assert {s.steps for s in found.for_mask if not s.is_stock} == {0, 1, 2, 3}
    ged[2] = 0.6
    measured.clear()
    found = sweep(predictor, cases)
    assert {s.steps for s in found.for_samples} == {1, 2} and {s.steps for s in found.for_mask} == {0, 1, 2, 3}
    assert len(measured) == 3 * 3  # single steps, two, and three for the mask alone: on three cases
    assert {s.samples for s in measured[-1]} == {1}
    predictor.refiner.t_max.fill_(900)  # the only level is then the direct refinement's, too
    found = sweep(predictor, cases)
    assert {s.t_start for s in found.for_mask} == {0, 900} and {s.steps for s in found.for_mask} == {0, 1, 2, 3}


def test_a_budget_is_kept_by_leaving_out(scratch, monkeypatch):
    """By a clock that only passes over the volume move: to pre-segment a case takes as long as 8 of the denoiser."""
    predictor, cases = open_model(scratch, 0, torch.device('cpu')), ValidationCases(make_trainer(TUNED, 0))
    now = [0.0]

    class Clocked(sweep_module.SweepVolume):
        def start_fold(self):
            now[0] += 8
            return super().start_fold()

        def denoise(self, x, t, mirrored):
            known = self.kept
            result = super().denoise(x, t, mirrored)
            now[0] += len(mirrored) * (known is None or result is not known[3])
            return result
    monkeypatch.setattr(sweep_module, 'SweepVolume', Clocked)
    monkeypatch.setattr(sweep_module, 'mean', lambda values: 0.0)  # so every level is as good as stock for the mask
    monkeypatch.setattr(cases, 'voxels', lambda name: 1000)  # as the clock has it: all cases take the same time
    single_steps = 3 * (8 + 2 + 2)  # under two mirrorings: the direct one, two samples
    # pre-segmentation; a draw for the mask and two samples, three ways
    second_steps = 3 * (8 + (2 + 2 * 3) + (2 + 2 * 3))
    found = sweep(predictor, cases, single_steps + second_steps + 1, lambda: now[0])
    assert now[0] == single_steps + second_steps
    assert not found.settings_left_out and not found.cases_left_out
    now[0] = 0
    found = sweep(predictor, cases, single_steps + second_steps / 3, lambda: now[0])
    assert {s.steps for s in found.settings_left_out} == {1, 2}  # single steps for the mask
    assert found.cases == list(CASES) and now[0] == single_steps
    now[0] = 0
    found = sweep(predictor, cases, single_steps + 3 * (8 + 2) + 1, lambda: now[0])  # enough time for them
    assert {s.steps for s in found.settings_left_out} == {2} and found.cases == list(CASES)
    assert {s.steps for s in found.for_mask if not s.is_stock} == {0, 1}
    with pytest.raises(TuningError, match='too short to tune the sampling settings: single steps on 3 cases'):
        sweep(predictor, cases, 3 * 8, lambda: now[0])


def test_what_a_budget_left_out_is_in_log_and_report(scratch, monkeypatch):
    monkeypatch.setattr(sweep_module, 'cases_in', lambda *_: [0, 2])
    monkeypatch.setattr(sweep_module, 'settings_in', lambda *_: [])
    command('-budget', '10')
    assert 'k=2 eta=0, k=2 eta=1, k=2 redraw and 1 of 3 cases' in log(scratch).split('for want of time: settings')[1]
    content = report(scratch)
    assert content['cases'] == [CASES[0], CASES[2]] and content['left_out']['cases'] == [CASES[1]]
    assert {s['steps'] for s in content['left_out']['settings']} - {1} == {2}
    assert {r['steps'] for r in content['rows']} == {0, 1}


def test_a_training_too_short_to_tune_in_keeps_its_settings_and_says_so(stock, scratch_results, small_grid,
                                                                        monkeypatch):
    trainer = make_trainer(TUNED, 0)
    trainer.tuning_share = 1e-9
    trainer.run_training()
    model = Path(trainer.output_folder_base)
    assert 'The sampling settings stay as they are: 0.0 minutes are too short' in log(model)
    stored = weights(model / 'fold_0' / 'checkpoint_final.pth')
    assert stored_settings(stored, MASK) == trainer.sampling and not (FILES & set(os.listdir(model / 'fold_0')))
    for fold, share, said in (('all', 1, 'fold all was trained on every case'), (0, 0, 'tuning_share is 0')):
        trainer = make_trainer(TUNED, fold)
        trainer.tuning_share = share
        shutil.copytree(model / 'fold_0', model / 'fold_all', dirs_exist_ok=True)
        trainer._first_epoch = -1
        assert trainer.tune_sampling() is None
        assert said in Path(trainer.log_file).read_text()


def test_the_papers_trainer_is_not_tuned(stock):
    plans, dataset = (json.loads((stock.preprocessed / f'{name}.json').read_text()) for name in (PLANS, 'dataset'))
    trainer = PDDDPMTrainerPaper({**plans, 'continue_training': False}, '3d_fullres', 0, dataset, torch.device('cpu'))
    assert trainer.tuning_share == 0
    shutil.rmtree(trainer.output_folder_base)


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
    to_truth = {settings_of(r): r['per_case']['ged_squared'] for r in report(scratch)['rows']}
    command('-raters', str(raters))
    content = report(scratch)
    ged = {settings_of(r): r['per_case']['ged_squared'] for r in content['rows'] if r['for_samples']}
    assert len(ged) == 4 and len({tuple(values) for values in ged.values()}) > 1
    chosen, lowest = ged[SamplingSettings(**content['chosen']['samples'])], min(ged.values(), key=np.mean)
    assert difference_interval(np.array(chosen), np.array(lowest))[0] <= 0
    assert f'GED² {np.mean(chosen):.3f}' in content['in_one_line']
    for settings, values in ged.items():
        assert values[:2] != to_truth[settings][:2] and values[2] == to_truth[settings][2]  # which has no raters


def test_raters_masks_come_onto_the_grid_of_the_preprocessed_truth(stock, tuned, tmp_path):
    """The truth itself, given as a rater's mask, is the preprocessed truth, voxel by voxel."""
    for case in CASES:
        shutil.copy(stock.raw / 'labelsTr' / f'{case}.nii.gz', tmp_path / f'{case}__me.nii.gz')
    cases = ValidationCases(make_trainer(TUNED, 0), tmp_path)
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

    assert 'There is no trained model' in refused(trainer='PDDDPMTrainer_5epochs')
    assert 'fold_2/checkpoint_final.pth does not exist' in refused(fold='2')
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
