"""Metrics on arrays against closed forms, cases worked by hand, and brute force."""
from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from nnunet_pdddpm.evaluation.calibration import (
    Cells,
    area_under_risk_coverage,
    area_under_roc,
    correlation,
    reliability,
)
from nnunet_pdddpm.evaluation.overlap import dice_of_iou, iou_matrix, lesion_f1, mean_of_pairs
from nnunet_pdddpm.evaluation.raters import best_dice, ged_squared, hungarian_matched_iou
from nnunet_pdddpm.evaluation.surfaces import hd95_and_surface_dice, surface_points
from nnunet_pdddpm.evaluation.voxelwise import (
    Calibration,
    class_statistics,
    region_statistics,
    stored_channels,
    stored_shape,
)
from nnunet_pdddpm.geometry import voxel_volume_ml

MASKS = arrays(bool, (3, 4, 5))


def box(shape: tuple[int, ...], *slices: slice) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[slices] = True
    return mask


# overlap

def test_volume_of_a_voxel_counts_a_2d_image_as_one_millimetre_thick():
    assert voxel_volume_ml((10, 20, 30), (2.5, 0.8, 0.5)) == pytest.approx(0.001)
    assert voxel_volume_ml((1, 20, 30), (999, 1, 1)) == pytest.approx(0.001)
    assert voxel_volume_ml((1, 20, 30), (999 * 0.5, 0.25, 0.5)) == pytest.approx(0.000125)
    assert voxel_volume_ml((1, 20, 30), (5, 0.5, 0.5)) == pytest.approx(0.00125)  # a real single slice


def test_iou_matrix_of_hand_worked_masks():
    a, b, empty = (np.array(m, bool) for m in ([1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]))
    assert iou_matrix(np.stack([a, empty]), np.stack([a, b, empty])).tolist() == [[1, 0.5, 0], [0, 0, 1]]


@given(arrays(bool, (3, 30)), arrays(bool, (2, 30)), st.integers(1, 40))
def test_iou_matrix_equals_its_definition_in_chunks_of_any_size(one, other, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('nnunet_pdddpm.evaluation.overlap.PRODUCT_VOXELS', chunk)
        matrix = iou_matrix(one, other)
    for i, j in itertools.product(range(3), range(2)):
        union = (one[i] | other[j]).sum()
        assert matrix[i, j] == pytest.approx((one[i] & other[j]).sum() / union if union else 1)
        if union:
            dice = 2 * (one[i] & other[j]).sum() / (one[i].sum() + other[j].sum())
            assert dice_of_iou(matrix)[i, j] == pytest.approx(dice)


def test_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r'\(4,\) and \(5,\)'):
        iou_matrix(np.ones((1, 4), bool), np.ones((1, 5), bool))


def test_mean_of_pairs_leaves_out_the_diagonal():
    assert mean_of_pairs(np.array([[9, 1, 2], [1, 9, 6], [2, 6, 9]])) == 3
    assert math.isnan(mean_of_pairs(np.array([[9.0]])))


def test_lesion_f1_of_hand_worked_lesions():
    reference, prediction = np.zeros((2, 12, 12), bool), np.zeros((2, 12, 12), bool)
    reference[0, 0:3, 0:3] = reference[0, 6, 6] = reference[0, 10, 0] = True  # three lesions, the third is missed
    prediction[0, 2:4, 2:4] = prediction[0, 6, 6] = True  # found by one voxel, and exactly
    prediction[0, 0, 0] = True  # a second piece in the first lesion counts as right
    prediction[1, 9:11, 9:11] = True  # false positive
    precision, recall = 3 / 4, 2 / 3
    assert lesion_f1(reference, prediction) == pytest.approx(2 * precision * recall / (precision + recall))


def test_lesion_f1_joins_voxels_that_share_a_corner():
    reference = np.zeros((3, 3, 3), bool)
    reference[0, 0, 0] = reference[1, 1, 1] = True
    assert lesion_f1(reference, box((3, 3, 3), slice(0, 1), slice(0, 1), slice(0, 1))) == 1


def test_lesion_f1_of_empty_masks_is_never_one():
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert math.isnan(lesion_f1(empty, empty))
    assert lesion_f1(empty, full) == lesion_f1(full, empty) == 0


# surfaces

def brute_surface(mask: np.ndarray) -> np.ndarray:
    """Voxels that have a face neighbour outside of the mask or of the image."""
    return np.array([p for p in np.argwhere(mask)
                     if any(not all(0 <= q[a] < mask.shape[a] for a in range(mask.ndim)) or not mask[tuple(q)]
                            for axis in range(mask.ndim) for q in (p + d for d in (
                                np.eye(mask.ndim, dtype=int)[axis], -np.eye(mask.ndim, dtype=int)[axis])))])


@settings(deadline=None, max_examples=60)
@given(arrays(bool, (4, 6, 5), elements=st.sampled_from([True, True, False])),
       arrays(bool, (4, 6, 5), elements=st.sampled_from([True, False, False])),
       st.tuples(*[st.floats(0.3, 5)] * 3), st.floats(0, 4))
def test_surface_metrics_equal_brute_force_with_anisotropic_spacing(reference, prediction, spacing, tolerance):
    assume(reference.any() and prediction.any())
    all_pairs = cdist(*(brute_surface(mask) * np.array(spacing) for mask in (reference, prediction)))
    directed = all_pairs.min(1), all_pairs.min(0)
    assume(all(np.abs(d - tolerance).min() > 1e-3 for d in directed))
    within = sum((d <= tolerance).sum() for d in directed) / sum(map(len, directed))
    hd95, surface_dice = hd95_and_surface_dice(reference, prediction, spacing, tolerance)
    assert hd95 == pytest.approx(max(np.percentile(d, 95) for d in directed), abs=1e-9)
    assert surface_dice == pytest.approx(within)


def test_surface_metrics_of_a_shifted_box_are_the_shift():
    reference, prediction = (box((10, 20, 20), slice(2, 8), slice(y, y + 8), slice(4, 12)) for y in (3, 5))
    shift = 2 * 0.7
    hd95, at_shift = hd95_and_surface_dice(reference, prediction, (3, 0.7, 1.2), shift)
    assert hd95 == pytest.approx(shift)
    assert at_shift == 1
    below = hd95_and_surface_dice(reference, prediction, (3, 0.7, 1.2), shift - 0.01)[1]
    assert 0 < below < 1
    assert hd95_and_surface_dice(reference, reference, (3, 0.7, 1.2), 0) == (0, 1)


def test_surface_dice_forgives_the_rounding_of_a_spacing_kept_in_float32():
    reference, prediction = (box((5, 5, 5), slice(z, z + 2), slice(1, 4), slice(1, 4)) for z in (1, 2))
    spacing = tuple(float(np.float32(s)) for s in (1.1, 1, 1))
    assert spacing[0] > 1.1
    assert hd95_and_surface_dice(reference, prediction, spacing, 1.1)[1] == 1


def test_a_single_slice_has_a_contour():
    reference, prediction = (box((1, 30, 30), slice(0, 1), slice(y, y + 9), slice(5, 20)) for y in (6, 9))
    flat = hd95_and_surface_dice(reference[0], prediction[0], (0.5, 0.5), 1)
    assert hd95_and_surface_dice(reference, prediction, (999, 0.5, 0.5), 1) == flat
    assert len(surface_points(reference[0])) == 2 * 9 + 2 * 13
    assert flat[0] == pytest.approx(1.5)


def test_empty_masks_have_no_surface_and_never_score_well():
    empty, full = np.zeros((3, 4, 5), bool), np.ones((3, 4, 5), bool)
    diagonal = math.sqrt(9 ** 2 + 4 ** 2 + 10 ** 2)
    assert all(map(math.isnan, hd95_and_surface_dice(empty, empty, (3, 1, 2), 1)))
    for pair in ((empty, full), (full, empty)):
        assert hd95_and_surface_dice(*pair, (3, 1, 2), 1) == (pytest.approx(diagonal), 0)


# calibration

def test_likelihood_and_brier_score_of_hand_worked_voxels():
    probabilities = np.array([[0.7, 0.2, 0.0], [0.2, 0.5, 0.0], [0.1, 0.3, 1.0]])
    found = class_statistics(probabilities, np.array([0, 1, 0]))
    expected = -(math.log(0.7) + math.log(0.5) + math.log(1e-6)) / 3
    assert found.negative_log_likelihood == pytest.approx(expected)
    assert found.brier == pytest.approx(((0.09 + 0.04 + 0.01) + (0.04 + 0.25 + 0.09) + 2) / 3)
    assert found.confidence == pytest.approx([0.7, 0.5, 1.0])
    assert found.correct.tolist() == [True, True, False]


@given(st.integers(2, 6))
def test_uniform_probabilities_have_the_closed_forms(classes):
    uniform, truth = np.full((classes, 50), 1 / classes, np.float32), np.arange(50) % classes
    found = class_statistics(uniform, truth)
    assert found.negative_log_likelihood == pytest.approx(math.log(classes), rel=1e-5)
    assert found.brier == pytest.approx(1 - 1 / classes, rel=1e-5)
    assert found.entropy == pytest.approx(np.ones(50), rel=1e-5)


def test_entropy_of_certain_voxels_is_zero():
    entropy = class_statistics(np.array([[1.0, 0.0], [0.0, 1.0]]), np.zeros(2, int)).entropy
    assert entropy == pytest.approx(np.zeros(2), abs=1e-4)


def test_regions_are_two_class_problems_of_their_own():
    found = list(region_statistics(np.array([[0.9, 0.2], [0.6, 0.0]]), np.array([[1, 0], [0, 0]], bool)))
    np.testing.assert_allclose([of.true_probability for of in found], [[0.9, 0.8], [0.4, 1.0]], rtol=1e-6)
    assert [of.correct.tolist() for of in found] == [[True, True], [False, True]]
    together = Calibration()
    for of in found:
        together.add(of.inside(np.array([False, True])))
    assert together.voxels == 2 and together.bins.count.sum() == 2
    assert together.metrics == pytest.approx({
        'nll': -math.log(0.8) / 2, 'brier': (0.04 + 0.04) / 2, 'ece': 0.1, 'adaptive_ece': 0.1}, abs=1e-6)
    assert found[0].entropy[1] == pytest.approx(-(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8)), abs=1e-4)


@pytest.mark.parametrize('dtype', [np.float16, np.float32])
def test_memory_for_probabilities_does_not_grow_with_the_number_of_classes(tmp_path, dtype):
    shape, peaks = (20, 40, 50), {}
    truth = np.random.default_rng(0).integers(0, 3, shape).astype(np.uint8)
    for classes in (3, 60):
        p = np.random.default_rng(1).dirichlet(np.ones(classes), shape).transpose(3, 0, 1, 2).astype(dtype, order='C')
        np.savez_compressed(tmp_path / f'{classes}.npz', probabilities=p)
        assert stored_shape(tmp_path / f'{classes}.npz') == p.shape
        tracemalloc.start()
        found = class_statistics(stored_channels(tmp_path / f'{classes}.npz'), truth)
        peaks[classes] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        p = p.astype(np.float32)
        np.testing.assert_array_equal(found.true_probability, np.take_along_axis(p, truth[None].astype(int), 0)[0])
        np.testing.assert_array_equal(found.correct, p.argmax(0) == truth)
    assert peaks[60] < 1.1 * peaks[3] + 2 ** 16


def test_memory_for_probabilities_does_not_grow_with_the_number_of_regions():
    shape, peaks = (20, 40, 50), {}
    for regions in (3, 60):
        probabilities = (np.random.default_rng(i).random(shape, np.float32) for i in range(regions))
        truths = (np.random.default_rng(i + 1).random(shape) < 0.5 for i in range(regions))
        found = Calibration()
        tracemalloc.start()
        for of in region_statistics(probabilities, truths):
            found.add(of.inside(np.ones(shape, bool)))
        peaks[regions] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.voxels == regions * np.prod(shape)
        assert found.metrics['brier'] == pytest.approx(2 / 3, abs=0.01)  # of uniform ones that know nothing
    assert peaks[60] < 1.1 * peaks[3] + 2 ** 16


def adaptive(confidence, correct, bins):
    """The error by its definition, for a number of voxels that the bins divide and no two of equal confidence."""
    order = np.argsort(confidence)
    parts = (np.array_split(of[order], bins) for of in (correct, confidence))
    return sum(abs(c.sum() - p.sum()) for c, p in zip(*parts, strict=True)) / len(order)


def cells(confidence, correct):
    found = Cells()
    found.add(confidence, correct)
    return found


@pytest.mark.parametrize('sharpness', [1, 8])
def test_adaptive_error_by_cells_is_that_of_voxels_in_order(sharpness):
    """Also where nearly all are nearly sure."""
    rng = np.random.default_rng(0)
    confidence = (1 - 0.5 * rng.random(150_000) ** sharpness).astype(np.float32)
    correct = rng.random(150_000) < confidence ** 3
    found = cells(confidence, correct).adaptive_calibration_error()
    assert found == pytest.approx(adaptive(confidence, correct, 15), rel=1e-3)
    parts = Cells()
    for part in np.array_split(np.arange(150_000), 7):
        parts.add(confidence[part], correct[part])
    assert parts.adaptive_calibration_error() == pytest.approx(found, rel=1e-9)


def test_expected_calibration_error_of_hand_worked_bins():
    confidence = np.array([0.55, 0.6, 0.9, 0.95, 1.0])
    correct = np.array([True, False, True, True, False])
    bins = reliability(confidence, correct, bins=2)
    assert bins.count.tolist() == [0, 5]
    assert bins.expected_calibration_error == pytest.approx(abs(3 / 5 - confidence.mean()))
    five = reliability(confidence, correct, bins=5)  # ]0.4, 0.6], ]0.8, 1]
    assert five.count.tolist() == [0, 0, 2, 0, 3]
    assert five.expected_calibration_error == pytest.approx((abs(1 - 1.15) + abs(2 - 2.85)) / 5)
    assert cells(confidence, correct).adaptive_calibration_error(5) == pytest.approx(
        sum(abs(c - p) for c, p in zip(correct, confidence, strict=True)) / 5)


def test_bins_of_two_cases_add_up_to_those_of_both(rng=np.random.default_rng(1)):
    confidence, correct = rng.uniform(0.5, 1, 200), rng.random(200) < 0.7
    together = reliability(confidence, correct)
    added = reliability(confidence[:60], correct[:60]) + reliability(confidence[60:], correct[60:])
    assert added.expected_calibration_error == pytest.approx(together.expected_calibration_error)


@pytest.mark.parametrize('gap', [0.0, 0.2])
def test_calibration_errors_find_the_gap_between_confidence_and_accuracy(gap):
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5 + gap, 1, 200_000)
    correct = rng.random(200_000) < confidence - gap
    assert reliability(confidence, correct).expected_calibration_error == pytest.approx(gap, abs=0.01)
    assert cells(confidence, correct).adaptive_calibration_error() == pytest.approx(gap, abs=0.01)


@given(st.permutations(range(12)), st.integers(1, 20))
def test_adaptive_error_does_not_depend_on_the_order_of_voxels_of_equal_confidence(order, bins):
    confidence = np.repeat([0.6, 0.8, 0.9], 4)
    correct = np.array([1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0], bool)
    shuffled = cells(confidence[list(order)], correct[list(order)]).adaptive_calibration_error(bins)
    assert shuffled == pytest.approx(cells(confidence, correct).adaptive_calibration_error(bins))


def test_risk_coverage_of_hand_worked_voxels():
    wrong = np.array([False, False, True, True])
    best, worst = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.4, 0.3, 0.2, 0.1])
    assert area_under_risk_coverage(best, wrong) == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)
    assert area_under_risk_coverage(worst, wrong) == pytest.approx((1 + 1 + 2 / 3 + 2 / 4) / 4)
    assert area_under_risk_coverage(np.zeros(4), wrong) == pytest.approx(0.5)  # no information: the error rate
    assert area_under_roc(best, wrong) == 1
    assert area_under_roc(worst, wrong) == 0
    assert area_under_roc(np.zeros(4), wrong) == 0.5


@given(arrays(bool, 6), st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_risk_coverage_with_ties_is_the_mean_over_all_orders_of_them(wrong, uncertainty):
    key = np.array(uncertainty)
    orders = [o for o in itertools.permutations(range(6)) if (np.diff(key[list(o)]) >= 0).all()]
    areas = [np.mean(np.cumsum(wrong[list(o)]) / np.arange(1, 7)) for o in orders]
    assert area_under_risk_coverage(key, wrong) == pytest.approx(np.mean(areas))


def test_auroc_is_the_chance_that_an_error_is_less_certain():
    rng = np.random.default_rng(3)
    uncertainty, wrong = rng.integers(0, 6, 80) / 5, rng.random(80) < 0.3
    bad, good = uncertainty[wrong][:, None], uncertainty[~wrong][None]
    assert area_under_roc(uncertainty, wrong) == pytest.approx(((bad > good) + 0.5 * (bad == good)).mean())
    assert math.isnan(area_under_roc(uncertainty, np.zeros(80, bool)))
    assert math.isnan(area_under_roc(uncertainty, np.ones(80, bool)))


def test_correlation_leaves_out_undefined_cases_and_needs_three():
    x = np.array([0.1, 0.4, np.nan, 0.9, 0.5])
    y = np.array([0.2, 0.5, 0.3, 3.0, np.nan])
    of = correlation(x, y)
    assert of['n'] == 3 and of['spearman'] == pytest.approx(1)
    assert of['pearson'] == pytest.approx(np.corrcoef([0.1, 0.4, 0.9], [0.2, 0.5, 3.0])[0, 1])
    assert math.isnan(correlation(x[:3], y[:3])['spearman'])
    assert math.isnan(correlation(np.ones(5), np.arange(5.0))['pearson'])


# samples and raters

def ged_of(samples: np.ndarray, raters: np.ndarray) -> float:
    return ged_squared(iou_matrix(samples, raters), iou_matrix(samples, samples), iou_matrix(raters, raters))


def test_ged_of_hand_worked_masks():
    a, b = np.array([[1, 1, 0, 0]], bool), np.array([[0, 1, 1, 0]], bool)  # d = 2 / 3
    both = np.concatenate([a, b])
    assert ged_of(a, b) == pytest.approx(2 * 2 / 3)
    assert ged_of(both, a) == pytest.approx(2 * 1 / 3 - 1 / 3)
    assert ged_of(both, both) == pytest.approx(0)
    assert ged_of(np.zeros((2, 4), bool), np.zeros((3, 4), bool)) == 0  # agreement that there is nothing
    assert ged_of(np.zeros((1, 4), bool), a) == 2


@settings(deadline=None)
@given(arrays(bool, (3, 12)), arrays(bool, (4, 12)))
def test_ged_is_symmetric_and_not_negative_and_ignores_repeated_sets(samples, raters):
    value = ged_of(samples, raters)
    assert value >= -1e-9
    assert ged_of(raters, samples) == pytest.approx(value)
    assert ged_of(np.tile(samples, (2, 1)), raters) == pytest.approx(value)
    assert ged_of(samples, samples) == pytest.approx(0)


def test_ged_on_one_rater_rewards_spread():
    """What docs/reference/metrics.md warns of: equally good samples score better when they differ."""
    rater = np.array([[1] * 8 + [0] * 4], bool)
    larger, smaller = np.array([[1] * 10 + [0] * 2], bool), np.array([[0] + [1] * 7 + [0] * 3 + [1]], bool)
    agreeing, differing = np.concatenate([larger, larger]), np.concatenate([larger, smaller])
    assert iou_matrix(smaller, rater) < iou_matrix(larger, rater)
    assert ged_of(differing, rater) < ged_of(agreeing, rater)


@settings(deadline=None)
@given(arrays(float, (3, 4), elements=st.floats(0, 1)), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_hungarian_matching_equals_the_best_assignment_of_repeated_sets(matrix, samples, raters):
    cross = matrix[:samples, :raters]
    common = math.lcm(samples, raters)
    rows, columns = np.repeat(range(samples), common // samples), np.repeat(range(raters), common // raters)
    if common <= 6:
        best = max(np.mean([cross[rows[i], columns[j]] for i, j in enumerate(order)])
                   for order in itertools.permutations(range(common)))
        assert hungarian_matched_iou(cross) == pytest.approx(best)
    assert cross.min() - 1e-9 <= hungarian_matched_iou(cross) <= cross.max() + 1e-9


def test_best_dice_per_rater_takes_the_best_sample_of_each():
    cross = np.array([[0.5, 0.0], [0.25, 1.0]])
    assert best_dice(cross) == pytest.approx([2 / 3, 1])
