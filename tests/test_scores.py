"""Scores of samples, and parts of grids: closed forms, and that right samples rank before too narrow ones."""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_pdddpm.evaluation.overlap import iou_matrix
from nnunet_pdddpm.evaluation.parts import components, measure, nearest_component, octants, volumes_of_parts
from nnunet_pdddpm.evaluation.raters import fair_ged_squared, ged_squared
from nnunet_pdddpm.evaluation.scores import fair_crps, fair_energy_score, kernel_score, spread_and_correlation

VALUES = st.floats(-5, 5)
LEVELS = 120
"""Thresholds that a nested mask of the toy distribution can have; a third of them is cut off for the narrow sampler."""


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def assert_expectation(values: list[float], expected: float) -> None:
    mean, error = mean_and_error(values)
    assert abs(mean - expected) < 4 * error, (mean, expected, error)


def assert_lower(better: list[float], worse: list[float], margin: float) -> None:
    """The scores of the same cases differ in mean by more than chance, and by more than this share of the better."""
    difference, error = mean_and_error(np.subtract(worse, better).tolist())
    assert difference > 4 * error and difference > margin * np.mean(better), (difference, error, np.mean(better))


# closed forms

def test_crps_of_hand_worked_values():
    assert fair_crps(np.array([1.0, 3.0]), np.array([2.0])) == pytest.approx(1 - 2 / 2)
    assert fair_crps(np.array([1.0, 3.0, 5.0]), np.array([1.0])) == pytest.approx(2 - (2 + 4 + 2) / 3 / 2)
    assert fair_crps(np.array([1.0, 3.0]), np.array([2.0, 6.0])) == pytest.approx((1 + 4) / 2 - 1)
    assert fair_crps(np.array([4]), np.array([1, 6])) == pytest.approx(2.5)  # without spread: the absolute error


def test_energy_score_of_hand_worked_values():
    samples, truth = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[3.0, 0.0]])
    assert fair_energy_score(samples, truth) == pytest.approx((3 + 4) / 2 - 5 / 2)
    assert fair_energy_score(samples[:1], truth) == pytest.approx(3)


@given(st.lists(VALUES, min_size=1, max_size=6), st.lists(VALUES, min_size=1, max_size=4))
def test_energy_score_of_one_value_is_the_crps_by_its_definition(samples, observations):
    pairs = list(itertools.permutations(samples, 2))
    expected = np.mean([abs(x - y) for x in samples for y in observations]) - (
        np.mean([abs(x - y) for x, y in pairs]) / 2 if pairs else 0)
    x, y = np.array(samples), np.array(observations)
    assert fair_crps(x, y) == pytest.approx(expected, abs=1e-9)
    assert fair_energy_score(x[:, None], y[:, None]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize('n', [2, 16])
@pytest.mark.parametrize('observation', [0.2, 1.3])
def test_crps_of_draws_has_the_expectation_of_their_distribution(n, observation):
    """Whatever the number of draws; closed forms as in Gneiting and Raftery 2007, section 4.2, and by integration."""
    rng, y = np.random.default_rng(n), observation
    density, below = math.exp(-y ** 2 / 2) / math.sqrt(2 * math.pi), (1 + math.erf(y / math.sqrt(2))) / 2
    normal = y * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi)
    uniform = (y ** 2 + (1 - y) ** 2) / 2 - 1 / 6 if y < 1 else y - 1 / 2 - 1 / 6
    for expected, draws in ((normal, rng.normal(size=(6000, n))), (uniform, rng.random((6000, n)))):
        assert_expectation([fair_crps(x, np.array([y])) for x in draws], expected)


@pytest.mark.parametrize('n', [2, 16])
def test_energy_score_of_normal_draws_has_the_expectation_of_their_distribution(n):
    """At the mean of a normal distribution in 3D: E|X| - E|X - X'| / 2 with E|X| = 2 sqrt(2 / pi)."""
    draws = np.random.default_rng(n).normal(size=(4000, n, 3))
    expected = 2 * math.sqrt(2 / math.pi) * (1 - math.sqrt(2) / 2)
    assert_expectation([fair_energy_score(x, np.zeros((1, 3))) for x in draws], expected)


def ged_of(one: np.ndarray, other: np.ndarray, of: Callable[..., float] = fair_ged_squared) -> float:
    return of(iou_matrix(one, other), iou_matrix(one, one), iou_matrix(other, other))


def test_fair_ged_of_hand_worked_masks():
    a, b = np.array([[1, 1, 0, 0]], bool), np.array([[0, 1, 1, 0]], bool)  # d = 2 / 3
    both = np.concatenate([a, b])
    assert ged_of(a, b) == pytest.approx(2 * 2 / 3)
    assert ged_of(both, a) == pytest.approx(2 * 1 / 3 - 2 / 3)
    assert ged_of(both, both) == pytest.approx(2 * 1 / 3 - 2 * 2 / 3)
    assert ged_of(a, both) == pytest.approx(2 * 1 / 3 - 2 / 3)
    assert ged_of(np.zeros((2, 4), bool), np.zeros((3, 4), bool)) == 0  # agreement that there is nothing


@pytest.mark.parametrize(('n', 'm'), [(2, 1), (16, 1), (2, 3), (16, 3)])
def test_fair_ged_of_two_masks_has_the_expectation_of_their_distribution(n, m):
    """Samples are the first mask with probability q, raters with p: 2 d (q - p)^2, and E d(Y, Y') more of one rater."""
    d, p = 2 / 3, 0.3
    masks, rng = np.array([[1, 1, 0, 0], [0, 1, 1, 0]], bool), np.random.default_rng(n + m)
    for q in (p, 0.6):
        values = [ged_of(masks[(rng.random(n) < q).astype(int)], masks[(rng.random(m) < p).astype(int)])
                  for _ in range(2500)]
        assert_expectation(values, 2 * d * (q - p) ** 2 + (2 * d * p * (1 - p) if m == 1 else 0))


@settings(deadline=None)
@given(arrays(bool, (3, 12)), arrays(bool, (4, 12)))
def test_fair_ged_differs_from_that_of_the_literature_by_the_pairs_of_a_mask_with_itself(samples, raters):
    within = [(1 - iou_matrix(masks, masks)).sum() * (1 / (n * (n - 1)) - 1 / n ** 2)
              for masks, n in ((samples, 3), (raters, 4))]
    assert ged_of(samples, raters) == pytest.approx(ged_of(samples, raters, ged_squared) - sum(within))


@pytest.mark.parametrize('call', [
    lambda: fair_crps(np.zeros(0), np.zeros(1)), lambda: fair_crps(np.zeros(2), np.zeros(0)),
    lambda: fair_crps(np.zeros((2, 1)), np.zeros(2)), lambda: fair_energy_score(np.zeros(2), np.zeros((1, 1))),
    lambda: fair_energy_score(np.zeros((2, 3)), np.zeros((1, 2))),
    lambda: kernel_score(np.zeros((2, 1)), np.zeros((3, 3))), lambda: kernel_score(np.zeros((0, 1)), np.zeros((0, 0))),
    lambda: fair_ged_squared(np.ones((2, 1)), np.ones((2, 2)), np.ones((2, 2))),
    lambda: spread_and_correlation([]), lambda: spread_and_correlation([(np.zeros((1, 2)), np.zeros((1, 2)))]),
    lambda: spread_and_correlation([(np.zeros((2, d)), np.zeros((1, d))) for d in (1, 2)]),
    lambda: volumes_of_parts(np.ones((2, 2), bool), np.zeros((2, 3), int), 1),
    lambda: volumes_of_parts(np.ones(2, bool), np.array([0, 2]), 2)])
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(call):
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value).endswith('.') and '\n' not in str(error.value)


# ranking

def discs() -> np.ndarray:
    """(LEVELS, 40, 40) nested masks, of radius 5 to 18."""
    y, x = np.mgrid[:40, :40] - 19.5
    return np.hypot(y, x) < np.linspace(5, 18, LEVELS)[:, None, None]


@pytest.fixture(scope='module')
def toy() -> dict[str, np.ndarray]:
    """IoU between all masks of the toy distribution, and their volumes by octant; all have the same centre."""
    masks = discs()
    return {'iou': iou_matrix(masks, masks),
            'volumes': np.stack([volumes_of_parts(mask, *octants(masks[0])) for mask in masks]) / 1000}


def exact(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, LEVELS, n)


def narrow(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(LEVELS // 6, LEVELS - LEVELS // 6, n)


def spread_evenly(rng: np.random.Generator, n: int) -> np.ndarray:
    """The middles of n parts of the thresholds: right on average, but not drawn independently."""
    return ((np.arange(n) + 0.5) / n * LEVELS).astype(int)


def narrow_and_even(rng: np.random.Generator, n: int) -> np.ndarray:
    return LEVELS // 6 + spread_evenly(rng, n) * 2 // 3


def scores_of(sampler: Callable[..., np.ndarray], toy: dict[str, np.ndarray], n: int, raters: int = 1,
              cases: int = 4000) -> dict[str, list[float]]:
    """Scores of each case; the raters' masks are the same for every sampler."""
    truths, rng = np.random.default_rng(1), np.random.default_rng(2)
    scores: dict[str, list[float]] = {name: [] for name in ('fair', 'literature', 'crps', 'energy')}
    for _ in range(cases):
        s, y = sampler(rng, n), exact(truths, raters)
        iou = [toy['iou'][np.ix_(*pair)] for pair in ((s, y), (s, s), (y, y))]
        volumes, true = toy['volumes'][s], toy['volumes'][y]
        for name, value in (('fair', fair_ged_squared(*iou)), ('literature', ged_squared(*iou)),
                            ('crps', fair_crps(volumes.sum(1), true.sum(1))),
                            ('energy', fair_energy_score(volumes, true))):
            scores[name].append(value)
    return scores


@pytest.mark.parametrize(('n', 'raters'), [(2, 1), (4, 1), (16, 1), (4, 3)])
def test_an_exact_independent_sampler_is_never_ranked_behind_one_that_is_too_narrow(toy, n, raters):
    right, too_narrow = (scores_of(sampler, toy, n, raters) for sampler in (exact, narrow))
    for score in ('fair', 'crps', 'energy'):
        assert_lower(right[score], too_narrow[score], margin=0.03)


def test_the_ged_of_the_literature_ranks_few_exact_samples_behind_too_narrow_ones(toy):
    right, too_narrow = (scores_of(sampler, toy, 2) for sampler in (exact, narrow))
    assert_lower(too_narrow['literature'], right['literature'], margin=0.02)


def test_samples_that_are_spread_evenly_score_better_than_independent_ones(toy):
    """What docs/reference/metrics.md warns of: fair scores are for independent draws; others may even be too narrow."""
    independent, *even = (scores_of(sampler, toy, 4) for sampler in (exact, spread_evenly, narrow_and_even))
    for score, flattered in itertools.product(('fair', 'crps', 'energy'), even):
        assert_lower(flattered[score], independent[score], margin=0.1)


def moved(offsets: np.ndarray) -> np.ndarray:
    """(n, 24, 24) squares of side 8 whose position differs."""
    masks = np.zeros((len(offsets), 24, 24), bool)
    for mask, (y, x) in zip(masks, offsets, strict=True):
        mask[y:y + 8, x:x + 8] = True
    return masks


def lesions(there: np.ndarray) -> np.ndarray:
    """(n, 9, 9) masks of up to four lesions; `there` (n, 4) bool."""
    masks = np.zeros((len(there), 9, 9), bool)
    for i, (y, x) in enumerate(itertools.product((1, 5), repeat=2)):
        masks[:, y:y + 3, x:x + 3] = there[:, i, None, None]
    return masks


@pytest.mark.parametrize(('figure', 'draw', 'draw_narrow'), [
    ('octants', lambda rng, n: moved(rng.integers(4, 13, (n, 2))), lambda rng, n: moved(rng.integers(6, 11, (n, 2)))),
    ('parts', lambda rng, n: lesions(rng.random((n, 4)) < 0.7), lambda rng, n: lesions(rng.random((n, 4)) < 0.85)),
    ('parts', lambda rng, n: lesions(rng.random((n, 4)) < 0.5), lambda rng, n: lesions(rng.random((n, 4)) < 0.25))])
def test_it_is_not_ranked_behind_by_parts_that_each_truth_has_for_itself(figure, draw, draw_narrow):
    truths, scores = np.random.default_rng(1), ([], [])
    streams = np.random.default_rng(2), np.random.default_rng(3)
    for _ in range(1500):
        truth = draw(truths, 1)
        for sampler, rng, values in zip((draw, draw_narrow), streams, scores, strict=True):
            s, y = (getattr(of, figure) for of in measure(sampler(rng, 4), truth, (1, 1), 1.0))
            values.append(fair_energy_score(s, y))
    assert_lower(*scores, margin=0.02)


# spread and correlation

@pytest.mark.parametrize(('n', 'raters'), [(2, 1), (8, 1), (4, 3)])
def test_sd_ratio_is_one_for_an_exact_sampler_and_lower_for_a_narrow_one(toy, n, raters):
    rng, volumes = np.random.default_rng(n), toy['volumes']
    found = {}
    for sampler in (exact, narrow):
        cases = [(volumes[sampler(rng, n)], volumes[exact(rng, raters)]) for _ in range(4000)]
        found[sampler] = spread_and_correlation(cases)
        whole = spread_and_correlation([tuple(of.sum(1, keepdims=True) for of in case) for case in cases])
        assert whole['sd_ratio'] == pytest.approx(found[sampler]['sd_ratio'])  # octants of a disc are all alike
        assert math.isnan(whole['correlation']) and math.isnan(whole['correlation_reference'])
        assert found[sampler]['correlation'] == pytest.approx(1, abs=0.02)
    assert found[exact]['sd_ratio'] == pytest.approx(1, abs=0.03)
    assert found[narrow]['sd_ratio'] < 0.8


def test_correlation_of_samples_and_of_residuals_is_that_of_their_distributions():
    rng = np.random.default_rng(0)

    def draw(n: int, shared: float, where: np.ndarray) -> np.ndarray:
        return where + math.sqrt(shared) * rng.normal(size=(n, 1)) + math.sqrt(1 - shared) * rng.normal(size=(n, 3))
    cases = [(draw(5, 0.2, where), draw(2, 0.7, where)) for where in rng.normal(0, 30, (4000, 3))]
    found = spread_and_correlation(cases)
    assert found['correlation'] == pytest.approx(0.2, abs=0.02)
    assert found['correlation_reference'] == pytest.approx((0.7 + 0.2 / 5) / (1 + 1 / 5), abs=0.02)
    assert found['sd_ratio'] == pytest.approx(1, abs=0.02)


def test_spread_and_correlation_of_hand_worked_cases():
    cases = [(np.array([[0.0, 0.0, 1.0], [2.0, 4.0, 1.0]]), np.array([[4.0, 2.0, 1.0]])),
             (np.array([[1.0, 5.0, 0.0], [1.0, 7.0, 0.0], [1.0, 6.0, 0.0]]),
              np.array([[2.0, 6.0, 0.0], [1.0, 9.0, 0.0]]))]
    found = spread_and_correlation(cases)  # variances 2, 8 times 3 / 2, and 0, 1 times 4 / 3
    assert found['sd_ratio'] == pytest.approx(math.sqrt((15 + 4 / 3) / (9 + 1 / 2 + 9 / 2)))
    assert found['correlation'] == pytest.approx(6 / math.sqrt(3 * (12 + 4 / 3)))
    assert found['correlation_reference'] == pytest.approx(0)


def test_nothing_that_varies_has_no_ratio_and_no_correlation():
    assert all(map(math.isnan, spread_and_correlation([(np.full((3, 2), 0.1), np.full((1, 2), 0.1))]).values()))
    certain = spread_and_correlation([(np.ones((3, 2)), np.zeros((1, 2)))])
    assert certain['sd_ratio'] == 0 and certain['correlation_reference'] == pytest.approx(1)


# parts

def test_octants_split_at_the_centre_of_the_masks_box():
    mask = np.zeros((6, 1, 5), bool)
    mask[1, 0, 2] = mask[4, 0, 4] = True  # box 1 to 5, 2 to 5: centres 3 and 3.5
    index, number = octants(mask)
    assert number == 8  # as of a volume with more than one slice along the middle axis
    assert index[:, 0].tolist() == [[2, 2, 2, 6, 6]] * 3 + [[3, 3, 3, 7, 7]] * 3
    assert volumes_of_parts(mask, index, number).tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
    assert octants(mask[:, 0])[1] == 4 and octants(np.ones((4, 4, 4), bool))[1] == 8
    empty, number = octants(np.zeros((3, 4, 5), bool))
    assert number == 8 and not empty.any()


def test_voxels_belong_to_the_nearest_component_in_millimetres():
    mask = np.zeros((1, 5, 9), bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[0, 0, 8] = mask[0, 4, 0] = True  # the first two share a corner
    index, number = nearest_component(mask, (1, 1, 1))
    assert number == 3
    assert index[0, 0].tolist() == [0] * 5 + [1] * 4  # at x = 4 the nearest is (1, 1)
    assert index[0, 3, 0] == 2
    assert index[0, 2, 8] == 1 and nearest_component(mask, (1, 10, 1))[0][0, 2, 8] == 0  # 20 mm against 12
    alone, one = nearest_component(np.zeros((2, 3), bool), (1, 1))
    assert one == 1 and not alone.any()


@settings(deadline=None, max_examples=50)
@given(arrays(bool, (2, 4, 5, 6), elements=st.sampled_from([True, False, False, False])),
       arrays(bool, (2, 4, 5, 6), elements=st.sampled_from([True, False, False, False])))
def test_figures_are_those_of_the_whole_grid_and_sum_to_the_volume(samples, observed):
    union = observed.any(0)
    for masks, of in zip((samples, observed), measure(samples, observed, (2, 1, 1), 0.5), strict=True):
        assert of.volume == pytest.approx(of.octants.sum(1))
        assert of.octants.sum(1) == pytest.approx(masks.sum((1, 2, 3)) * 0.5)
        assert of.parts.sum(1) == pytest.approx(masks.sum((1, 2, 3)) * 0.5)
        assert of.octants == pytest.approx(np.stack([volumes_of_parts(m, *octants(union)) for m in masks]) * 0.5)
        assert of.parts.shape == (2, max(1, components(union)[1]))
        assert of.components.tolist() == [components(m)[1] for m in masks]
