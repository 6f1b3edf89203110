"""The order of cases: what it is fitted on, when it is used, what it promises, and where it is told."""
from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from tiny_model import plans, write_model

from nnunet_pdddpm.commands.predict import main_modelfolder
from nnunet_pdddpm.inference import ranking as ranking_module
from nnunet_pdddpm.inference.dice_regression import (
    ALL_FEATURES,
    CASE,
    DICE,
    EXPECTED_DICE,
    FIELDS,
    MIN_SD,
    RIDGE_PENALTY,
    UNALTERED,
    Bound,
    Estimates,
    LabelModel,
    bootstrap_interval,
    cross_validated,
    lower_quantile,
    rank_correlation,
)
from nnunet_pdddpm.inference.errors import NNUNET_INF_ERROR
from nnunet_pdddpm.inference.intervals import FIELDS as VOLUME_FIELDS
from nnunet_pdddpm.inference.quality import FEATURES, LabelQuality, logit
from nnunet_pdddpm.inference.ranking import FOLDS, NOTHING, PROBABILITIES, REGRESSION, UNMEASURED, Ranking, ranking_of
from nnunet_pdddpm.network.state import QUALITY, QUALITY_FIELDS, QUALITY_ROWS
from nnunet_pdddpm.tuning.calibration import (
    COPIES,
    Measured,
    measure,
    open_for_calibration,
    quality_row,
    store_measured,
)
from nnunet_pdddpm.tuning.cases import Case
from nnunet_pdddpm.tuning.stored import store, store_calibration

CHANNELS = {'cell': 1, 'nucleus': 2}
LABELS = {'background': 0, **CHANNELS}


def rows(kind: str, cases: int = 40, seed: int = 0) -> np.ndarray:
    """Of two labels: as many cases as they are and two copies of each with artefacts of four families.

    `kind`: 'told' by entropy and overlap with the stock mask, which the probabilities know little of; 'expected' where
    only they know; 'nothing' where none does.
    """
    rng = np.random.default_rng(seed)
    found = np.zeros((3 * cases, 3, len(FIELDS)))
    for channel in CHANNELS.values():
        kinds = np.where(np.arange(3 * cases) % 3 == 0, UNALTERED, 2 + rng.integers(0, 4, 3 * cases))
        truth = rng.normal(1.5, 1, 3 * cases) - (kinds > UNALTERED) * rng.exponential(1, 3 * cases)
        features = rng.normal(0, 1, (3 * cases, len(FEATURES)))
        if kind == 'told':
            features[:, FEATURES.index('expected')] += 0.3 * truth
            features[:, FEATURES.index('entropy')] = 0.4 - 0.1 * truth + rng.normal(0, 0.03, 3 * cases)
            features[:, FEATURES.index('stock')] = truth + rng.normal(0, 0.5, 3 * cases)
        if kind == 'expected':
            features[:, FEATURES.index('expected')] = truth + rng.normal(0, 0.2, 3 * cases)
        found[:, channel] = np.column_stack([kinds, np.arange(3 * cases) // 3, expit(truth), features])
    kinds = found[:, 1, :1]
    found[:, 2, :1] = kinds  # a row is one image
    return found


def test_field_numbers_are_those_of_the_checkpoint():
    assert len(FIELDS) == QUALITY_FIELDS and len(MIN_SD) == len(FEATURES)


def test_it_is_a_ridge_regression_of_the_logit():
    of = rows('told')[:, 1]
    model = LabelModel.fit(of, ALL_FEATURES)
    x = model.regressors(of[:, DICE + 1:])
    ridge = Ridge(RIDGE_PENALTY * len(x)).fit(x, logit(of[:, DICE]))
    estimate, unit = model.estimate(of[:, DICE + 1:])
    np.testing.assert_allclose(estimate, ridge.predict(x))
    centred = x - x.mean(0)
    inverse = np.linalg.inv(centred.T @ centred + RIDGE_PENALTY * len(x) * np.eye(len(FEATURES)))
    np.testing.assert_allclose(unit, [np.sqrt(1 + c @ inverse @ c) for c in centred])
    clean = of[of[:, 0] == UNALTERED, DICE + 1:]
    far = clean.mean(0) + 100 * clean.std(0)
    beyond = clean.mean(0) + 1000 * clean.std(0)
    far[[*EXPECTED_DICE]] = beyond[[*EXPECTED_DICE]] = 0  # which always counts
    assert model.estimate(far[None]) == model.estimate(beyond[None])  # no estimate runs away


def test_no_row_is_estimated_by_its_case_or_its_family():
    of = rows('told')[:, 1:]
    before = cross_validated(of, ALL_FEATURES)
    for which in (of[:, 0, 0] == 3, of[:, 0, 1] == 7):  # of a family of artefacts; of a case
        changed = of.copy()
        changed[which, :, DICE] = 0.5
        after = cross_validated(changed, ALL_FEATURES)
        np.testing.assert_array_equal(after.logits[which], before.logits[which])
        assert (after.logits[~which] != before.logits[~which]).any()


def test_a_label_of_every_fifth_case_is_estimated_as_one_of_every_case():
    of = rows('told', 20)[:, 1:2]
    sparse = of.copy()
    sparse[..., 1] *= 5
    found, expected = (cross_validated(one, ALL_FEATURES).logits for one in (sparse, of))
    np.testing.assert_array_equal(found, expected)


def test_it_is_used_where_it_ranks_better_than_the_probabilities_alone():
    ranking = ranking_of(rows('told'), CHANNELS)
    assert ranking.by == REGRESSION and ranking.key == 'estimated_dice_low'
    of = ranking.scores
    assert of.interval[0] < of.correlation < of.interval[1] and of.correlation > of.probabilities + 0.1
    assert (of.cases, of.copies) == (40, 80)
    new = rows('told', 200, 1)
    judged = [ranking.judge({name: LabelQuality(row[channel, DICE + 1:], None) for name, channel in CHANNELS.items()})
              for row in new]
    true = new[:, 1:, DICE].mean(1)
    plain = expit(new[:, 1:, DICE + 1]).mean(1)
    lows = np.array([one.low for one in judged])
    assert spearmanr(lows, true)[0] > spearmanr(plain, true)[0] + 0.1
    assert spearmanr(lows, true)[0] == pytest.approx(of.correlation, abs=0.1)
    assert 0.85 < (true >= lows).mean() < 0.97 and of.bound.held == pytest.approx(0.9, abs=0.06)
    assert all(one.low < one.estimate for one in judged)
    for i, (name, channel) in enumerate(CHANNELS.items()):
        held = np.mean([row[channel, DICE] >= one.labels[name][1] for row, one in zip(new, judged, strict=True)])
        assert 0.85 < held < 0.97, i


def test_it_is_not_used_where_it_does_not_beat_the_probabilities_alone():
    ranking = ranking_of(rows('expected'), CHANNELS)
    assert ranking.by == PROBABILITIES and 'a regression on more features did not rank better' in ranking.describe()
    assert ranking.scores.correlation == ranking.scores.probabilities > 0.8  # of what nothing is fitted for
    usual = np.zeros(len(FEATURES))
    odd = usual + 5
    odd[0] = 0  # all is other than the probabilities
    of = {name: LabelQuality(usual, None) for name in CHANNELS}
    other = {name: LabelQuality(odd, None) for name in CHANNELS}
    assert ranking.judge(of).estimate == ranking.judge(other).estimate


def test_the_regression_has_to_beat_the_expected_dice_itself(monkeypatch):
    """Not only its fit, which may rank worse in cross-validation."""
    of, rng = rows('expected'), np.random.default_rng(2)
    true = logit(of[:, 1:, DICE])

    def choice(error: float) -> str:
        def estimates(rows, columns):
            sd = error if columns == ALL_FEATURES else 1.5
            return Estimates(true + rng.normal(0, sd, true.shape), np.ones(true.shape))
        monkeypatch.setattr(ranking_module, 'cross_validated', estimates)
        return ranking_of(of, CHANNELS).by
    assert (choice(0.5), choice(0.02)) == (PROBABILITIES, REGRESSION)


def test_the_worst_cases_are_told_apart_where_validation_cases_are_alike():
    of = rows('expected')
    clean = of[:, 1, 0] == UNALTERED
    of[clean, 1:, DICE + 1] = 2.5 + 0.1 * of[clean, 1:, DICE + 2]
    of[clean, 1:, DICE] = expit(of[clean, 1:, DICE + 1])
    ranking = ranking_of(of, CHANNELS)
    assert ranking.by == PROBABILITIES
    lows = []
    for expected in (2.5, 1.0, -1.0, -2.0, -4.0):
        features = np.zeros(len(FEATURES))
        features[[*EXPECTED_DICE]] = expected
        lows.append(ranking.judge({name: LabelQuality(features, None) for name in CHANNELS}).low)
    assert all(one > other + 0.01 for one, other in zip(lows[:-1], lows[1:], strict=True)), lows


def test_where_nothing_ranks_nothing_is_ranked():
    ranking = ranking_of(rows('nothing'), CHANNELS)
    assert ranking.by == NOTHING and ranking.key is None
    assert ranking.describe().startswith('Cases are not ranked: on 40 validation cases and 80 copies of them')


def test_few_cases_give_no_order():
    assert ranking_of(np.zeros((5, 3, len(FIELDS))), CHANNELS).by == UNMEASURED
    few = ranking_of(rows('told', 8), CHANNELS)
    assert few.by == UNMEASURED and 'known of 8 validation cases, 9 are needed' in few.describe()
    assert ranking_of(rows('told', 9), CHANNELS).by != UNMEASURED
    one = rows('told')
    one[:, 2] = 0  # a label that no case has
    assert list(ranking_of(one, CHANNELS).models) == ['cell']
    clean = rows('told')[::3]  # no time for copies
    assert 'on 40 validation cases;' in ranking_of(clean, CHANNELS).describe()


@pytest.mark.parametrize('copies', [0, 4])
def test_how_often_the_bound_held_is_measured_by_other_cases(copies):
    errors, cases = np.arange(20.0 + copies), np.arange(20 + copies) % 20
    kinds = np.where(np.arange(20 + copies) < 20, UNALTERED, 2)
    bound = Bound.from_errors(errors, kinds, cases)
    assert bound.quantile == 1  # of rank 2
    assert bound.held == 1 - 2 / len(errors)  # by the others all but the two smallest; by the copies alone, all
    few = Bound.from_errors(errors[:9], kinds[:9], cases[:9])
    assert few.quantile == 0 and few.held is None


def test_a_case_without_the_label_in_mask_and_truth_has_no_dice(model):
    predictor = open_for_calibration(model, 0, torch.device('cpu'), 'checkpoint_final.pth')
    case = MadeUpCases().load('v0')
    prediction = predictor.predict_volume(case.image, case=case.name, stock=False)
    assert prediction.quality['cell'].features is not None
    logits = prediction.logits.clone()
    logits[1] = -99
    prediction = replace(prediction, logits=logits)  # a mask without cells
    for truth, known in ((np.where(case.labels == 1, 2, case.labels), False), (case.labels, True)):
        row = quality_row(predictor, replace(case, labels=truth), prediction, 0, UNALTERED)
        assert row[1].any() == known and row[1, DICE] == 0


def test_scores_of_hand_worked_numbers():
    assert lower_quantile(np.arange(19.0)) == 1 and lower_quantile(np.arange(9.0)) == 0
    assert lower_quantile(np.arange(8.0)) == -np.inf
    one, other = np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])
    assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other)[0]) == pytest.approx(0.6)
    assert rank_correlation(one, np.ones(4)) == 0
    cases = np.repeat(np.arange(5), 3)
    # never a part of a case
    assert bootstrap_interval(cases, lambda i: float((np.bincount(cases[i]) % 3).sum())) == (0, 0)


def test_flags_say_what_no_validation_case_had():
    of = rows('told')
    of[:, :, DICE + 1 + FEATURES.index('components')] = np.log1p(1 + np.arange(len(of)) % 2)[:, None]
    ranking = ranking_of(of, CHANNELS)
    usual = of[0, 1, DICE + 1:].copy()
    usual[:] = of[::3, 1, DICE + 1:].mean(0)
    assert not ranking.judge(dict.fromkeys(CHANNELS, LabelQuality(usual, None))).flags
    odd = usual.copy()
    for name, value in (('components', np.log1p(7)), ('stock', logit(0.01)), ('brightness', 9), ('roughness', -9)):
        odd[FEATURES.index(name)] = value
    flags = ranking.judge({'cell': LabelQuality(odd, None), 'nucleus': LabelQuality(None, None)}).flags
    assert flags[1:4] == ['cell: 7 components, validation cases have 1 to 2',
                         'cell: other intensities than in validation', 'cell: the image is smoother than in validation']
    assert flags[0].startswith('cell: mask and stock mask overlap with Dice 0.01, in validation at least')
    assert flags[-1] == 'nucleus: neither in the mask nor in a sample, but every validation case has it'
    of[3, 2] = 0  # one that lacks it
    judged = ranking_of(of, CHANNELS).judge({'cell': LabelQuality(usual, None), 'nucleus': LabelQuality(None, None)})
    assert not judged.flags


def test_a_label_that_a_healthy_validation_case_lacks_is_no_label_of_every_case():
    """Of a case with no label at all there is no row of Dice: its volumes tell."""
    of, volumes = rows('told'), np.ones((len(rows('told')) // 3, 3, len(VOLUME_FIELDS)))
    of[of[:, 1, CASE] == of[0, 1, CASE]] = 0

    def flags():
        usual = of[3::3, 1, DICE + 1:].mean(0)
        return ranking_of(of, CHANNELS, volumes).judge(
            {'cell': LabelQuality(usual, None), 'nucleus': LabelQuality(None, None)}).flags
    assert flags() == ['nucleus: neither in the mask nor in a sample, but every validation case has it']
    volumes[0] = 0, 0, 1  # true volume and that of the mask, which are known
    assert not flags()
    volumes[0] = 0  # nothing is known of it
    assert len(flags()) == 1


def test_several_models_are_sorted_by_how_far_they_agree():
    ranking = Ranking(FOLDS)
    assert ranking.key == 'folds_dice' and 'not measured' in ranking.describe()
    assert ranking.judge({'cell': LabelQuality(None, 0.5)}).estimate is None


# through the files ---------------------------------------------------------------------------------------------------

DESCRIPTION = {'channel_names': {'0': 'T1'}, 'file_ending': '.nii.gz', 'numTraining': 1, 'labels': LABELS}
FLAGS = ('-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar', '--report')


@dataclass
class MadeUpCases:
    """Validation cases of noise."""
    names: list[str] = field(default_factory=lambda: [f'v{i}' for i in range(9)])
    said: list[str] = field(default_factory=list)

    def load(self, name: str) -> Case:
        rng = np.random.default_rng(int(name[1:]))
        image = torch.from_numpy(rng.normal(size=(1, 8, 18, 20)).astype(np.float32))
        return Case(image, rng.integers(0, 3, (8, 18, 20)), [], {}, name)

    def true_volumes(self, name: str) -> None:
        return None

    def log(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp('model') / 'D' / 'M', plans('SimpleITKIO', 3, 1), DESCRIPTION)


def checkpoint(model: Path) -> Path:
    return model / 'fold_0' / 'checkpoint_final.pth'


def predict(model: Path, folder: Path, *flags: str) -> tuple[dict, str]:
    """Rows of the summary by case, and the text of the report."""
    images = folder.parent / 'images'
    images.mkdir(exist_ok=True)
    for i, case in enumerate('abc'):
        pixels = np.random.default_rng(i).normal(100, 40, (8, 18, 20)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(pixels), str(images / f'{case}_0000.nii.gz'))
    main_modelfolder(['-m', str(model), '-i', str(images), '-o', str(folder), *FLAGS, *flags])
    summary = json.loads((folder / 'pdddpm_summary.json').read_text())
    return {row['case']: row for row in summary['cases']}, (folder / 'report.html').read_text()


def shown(page: str) -> list[str]:
    return re.findall(r'<h2[^>]*>(.*?)</h2>', page)


def test_an_order_is_measured_stored_and_told(model, tmp_path, capsys):
    cases, said = MadeUpCases(), []
    predictor = open_for_calibration(model, 0, torch.device('cpu'), 'checkpoint_final.pth')
    measured = measure(predictor, cases, cases.names)
    assert len(measured.volumes) == 9 and not measured.volumes.any()
    parts = [measure(predictor, cases, cases.names, first, 2) for first in (0, 1)]  # as two GPUs do
    def as_they_are(*of_all: Measured) -> list[list[list[float]]]:
        found = [row for of in of_all for row in of.quality.tolist() if row[1][0] == UNALTERED]
        return sorted(found, key=lambda row: row[1][1])
    assert as_they_are(measured) == as_they_are(*parts) and len(as_they_are(measured)) == 9
    store_measured(checkpoint(model), measured, CHANNELS, said.append)
    stored = torch.load(checkpoint(model), weights_only=False)['network_weights'][QUALITY]
    assert stored.shape == (QUALITY_ROWS, 3, QUALITY_FIELDS) and torch.equal(stored[:27], measured.quality)
    assert not stored[27:].any() and len(measured.quality) == 9 * (1 + COPIES)
    assert set(stored[:27, :, 0].amax(1).tolist()) == set(range(1, 11))  # all families
    few = measure(predictor, MadeUpCases(cases.names[:8]), cases.names[:8])
    assert len(few.quality) == 8  # too few for an order: no copies
    capsys.readouterr()
    rows_, page = predict(model, tmp_path / 'out')
    assert said[-1] in capsys.readouterr().out and said[-1] in page
    assert {row['order']['statement'] for row in rows_.values()} == {said[-1]}


def test_copies_of_which_the_networks_make_no_numbers_are_left_out(model, monkeypatch):
    cases = MadeUpCases()
    predictor = open_for_calibration(model, 0, torch.device('cpu'), 'checkpoint_final.pth')
    as_they_are, predict_volume = [cases.load(name).image for name in cases.names], predictor.predict_volume

    def overflowing(image: torch.Tensor, **kwargs):
        if not any(torch.equal(image, of) for of in as_they_are):
            raise RuntimeError(f'{NNUNET_INF_ERROR}. Aborting.')
        return predict_volume(image, **kwargs)
    monkeypatch.setattr(predictor, 'predict_volume', overflowing)
    assert len(measure(predictor, cases, cases.names).quality) == 9


def test_a_validation_case_of_which_the_networks_make_no_numbers_is_left_out_and_named(model, monkeypatch):
    cases = MadeUpCases(['v0', 'v1', 'v2'])
    predictor = open_for_calibration(model, 0, torch.device('cpu'), 'checkpoint_final.pth')
    of_all, predict_volume = measure(predictor, cases, cases.names), predictor.predict_volume

    def failing(error: str):
        def predict_one(image: torch.Tensor, case: str, **kwargs):
            if case == 'v1':
                raise RuntimeError(error)
            return predict_volume(image, case=case, **kwargs)
        return predict_one
    monkeypatch.setattr(predictor, 'predict_volume', failing(f'{NNUNET_INF_ERROR}. Aborting.'))
    measured = measure(predictor, cases, cases.names)
    assert torch.equal(measured.quality, of_all.quality[[0, 2]]) and len(measured.volumes) == 3
    assert cases.said == ['Nothing is measured on v1: the networks give NaN or infinite values for it.']
    monkeypatch.setattr(predictor, 'predict_volume', failing('of the program'))
    with pytest.raises(RuntimeError, match='of the program'):
        measure(predictor, cases, cases.names)

    def spoiled(image: torch.Tensor, case: str, **kwargs):
        prediction = predict_volume(image, case=case, **kwargs)
        if case == 'v1':
            with torch.inference_mode():
                prediction.logits[0, 0, 0, 0] = torch.nan  # of the denoiser, in half precision
        return prediction
    monkeypatch.setattr(predictor, 'predict_volume', spoiled)
    assert torch.equal(measure(predictor, cases, cases.names).quality, measured.quality)


def test_the_report_is_sorted_by_the_lower_bound_and_shows_flags(model, tmp_path):
    """The order is by a feature of which the expected Dice knows nothing."""
    of = rows('nothing')
    of[:, :, DICE + 1 + FEATURES.index('certainty')] = logit(of[:, :, DICE]) / 10 + 0.3
    store_calibration(checkpoint(model), [], torch.zeros(0, 3, 3), torch.tensor(of))
    found, page = predict(model, tmp_path / 'out')
    lows = {case: row['estimated_dice_low'] for case, row in found.items()}
    assert len(set(lows.values())) == 3 and shown(page) == sorted(lows, key=lambda case: lows[case])
    assert all(row['order']['by'] == 'estimated_dice_low' for row in found.values())
    assert 'a regression on what the prediction says' in page and 'those to review first at the top' in page
    for case, row in found.items():
        assert 0 <= row['estimated_dice_low'] < row['estimated_dice'] <= 1
        assert f'(at least {row["estimated_dice_low"]:.2f})' in page
        assert row['flags'] and all(flag in page for flag in row['flags']), case
        assert 'cell, nucleus: volume without a calibrated interval' in row['flags'][-1]
    lines = list(csv.DictReader((tmp_path / 'out' / 'pdddpm_summary.csv').open()))
    for line in lines:
        row = found[line['case']]
        assert line['case_flags'] == '; '.join(row['flags'])
        assert float(line['case_estimated_dice_low']) == row['estimated_dice_low']
        low = row['labels'][line['label']]['estimated_dice_low']
        assert line['estimated_dice_low'] == ('' if low is None else str(low))


def test_what_does_not_rank_is_sorted_by_name_and_other_samples_have_no_order(model, tmp_path):
    store_calibration(checkpoint(model), [], torch.zeros(0, 3, 3), torch.tensor(rows('nothing')))
    found, page = predict(model, tmp_path / 'out')
    assert shown(page) == ['a', 'b', 'c'] and 'not ranked: sorted by name' in page and 'Cases are not ranked' in page
    found, page = predict(model, tmp_path / 'other', '-samples', '3')
    assert {row['order']['by'] for row in found.values()} == {'estimated_dice'}
    assert 'masks and samples are not made as in validation' in page
    assert {row['estimated_dice_low'] for row in found.values()} == {None}


def test_other_settings_forget_the_quality_of_validation_cases(model, tmp_path):
    file = checkpoint(model)
    store_calibration(file, [], torch.zeros(0, 3, 3), torch.tensor(rows('told')))
    predictor = open_for_calibration(model, 0, torch.device('cpu'), file.name)
    assert predictor.list_of_parameters[0][QUALITY].any()
    store(file.parent, predictor.fold_settings[0])
    assert not torch.load(file, weights_only=False)['network_weights'][QUALITY].any()
    assert not open_for_calibration(model, 0, torch.device('cpu'), file.name).refiner.quality.any()
    found, page = predict(model, tmp_path / 'out')
    assert 'the model holds no Dice of validation cases' in page
    assert shown(page) == sorted(found, key=lambda case: found[case]['estimated_dice'])
