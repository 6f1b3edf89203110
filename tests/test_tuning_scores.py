"""What tuning scores masks and samples by, and the temperature that it fits."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunet_pdddpm.evaluation.overlap import iou_matrix
from nnunet_pdddpm.evaluation.parts import octants, volumes_of_parts
from nnunet_pdddpm.evaluation.raters import fair_ged_squared
from nnunet_pdddpm.evaluation.scores import kernel_score
from nnunet_pdddpm.evaluation.voxelwise import class_statistics
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.temperature import GRID, fit_temperature, likelihoods

CPU = torch.device('cpu')


class Labels:
    """What `Truth` asks of a label manager."""
    def __init__(self, regions=None, ignore=None, heads=3):
        self.has_regions, self.foreground_regions = regions is not None, regions
        self.ignore_label, self.num_segmentation_heads = ignore, heads


def test_dice_is_over_labels_that_are_there_and_the_ignore_label_counts_nowhere():
    truth = np.array([[[0, 0, 1, 1, -1, 3, 3, 0]]])
    probabilities = np.array([[0.9, 0.2, 0.3, 0.1, 0.8, 0.1, 0, 1], [0.1, 0.8, 0.6, 0.9, 0.1, 0.9, 1, 0],
                              [0, 0, 0.1, 0, 0.1, 0, 0, 0]], np.float32)
    scored = Truth(truth, Labels(ignore=3), CPU).score(torch.from_numpy(probabilities)[:, None, None])
    valid = [0, 1, 2, 3, 4, 7]
    nll = class_statistics(probabilities[:, valid], np.array([0, 0, 1, 1, 0, 0])).negative_log_likelihood
    assert scored == pytest.approx((2 * 2 / (2 + 3), nll), rel=1e-5)  # label 2 is nowhere: left out
    nothing = Truth(np.zeros((1, 1, 8)), Labels(), CPU)
    assert np.isnan(nothing.score(torch.eye(3)[0].reshape(3, 1, 1, 1).expand(3, 1, 1, 8))[0])


def test_regions_overlap_and_their_nll_is_binary():
    truth = np.array([[[0, 1, 2, 2]]])
    p = np.array([[0.1, 0.7, 0.9, 0.4], [0.2, 0.6, 0.8, 0.9]], np.float32)
    dice, nll = Truth(truth, Labels([(1, 2), 2], heads=2), CPU).score(torch.from_numpy(p)[:, None, None])
    assert dice == pytest.approx(np.mean([2 * 2 / (3 + 2), 2 * 2 / (2 + 3)]))
    assert nll == pytest.approx(-np.log([0.9, 0.7, 0.9, 0.4, 0.8, 0.4, 0.8, 0.9]).mean(), rel=1e-5)


@pytest.mark.parametrize('regions', [None, [(1, 2), 2]])
@pytest.mark.parametrize('number', [0, 3])
def test_the_energy_of_samples_is_that_of_the_evaluations_functions(regions, number):
    """Of the masks that are drawn, without what is to be ignored; to the truth without raters."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (1 + number, 2, 6, 7))
    labels[0, :, 0] = 3  # to be ignored
    truth = Truth(labels[0], Labels(regions, 3, 2 if regions else 3), CPU, labels[1:])
    p = torch.from_numpy(rng.random((5, 2 if regions else 3, 2, 6, 7)))
    p = p if regions else p / p.sum(1, keepdim=True)
    stock, p = p[0], p[1:]
    stock[:, :, :, -2:] = torch.tensor([0.0, 0.0] if regions else [1.0, 0.0, 0.0]).reshape(-1, 1, 1, 1)  # no foreground
    shifts = torch.tensor([[0.3, -0.5], [0.3, -0.5]] if regions else [[0, 0.2], [-0.4, 0], [0.8, -0.1]])
    parts = torch.from_numpy(rng.integers(0, 2, (2, 6, 7)))
    logits = (torch.logit(p) if regions else p.log()) + shifts[:, parts]
    drawn = (logits > 0).numpy() if regions else logits.argmax(1).numpy()[:, None] == [[[[1]]], [[[2]]]]
    given = labels[1:] if number else labels[:1]
    others = np.stack([np.isin(given, of) for of in (regions or (1, 2))], 1)
    index, eight = octants((stock.amax(0) if regions else 1 - stock[0]).numpy() > 0.1)
    valid = np.index_exp[..., 1:, :]
    energy, ged = [], []
    for label in (0, 1):
        one, other = drawn[:, label][valid], others[:, label][valid]
        expected = 1 + float((stock if regions else stock[1:])[label][valid].sum())
        of_parts = np.stack([volumes_of_parts(m, index[valid], eight) for m in (*one, *other)]) / expected
        apart = np.linalg.norm(of_parts[:, None] - of_parts, axis=-1)
        d = 1 - iou_matrix(np.stack([*one, *other]), np.stack([*one, *other])) + apart / (1 + apart)
        energy.append(kernel_score(d[:4, 4:], d[:4, :4]))
        ged.append(fair_ged_squared(iou_matrix(one, other), iou_matrix(one, one), iou_matrix(other, other)))
    truth.set_parts(stock)
    assert truth.energy([truth.drawn(sample, shifts, parts) for sample in p]) == pytest.approx(
        (np.mean(energy), np.mean(ged)))


def test_a_label_that_the_stock_model_does_not_expect_does_not_outweigh_all_other_cases():
    labels = np.zeros((1, 30, 30), int)
    labels[0, 5:25, 5:25] = 1
    truth = Truth(labels, Labels(heads=2), CPU)
    truth.set_parts(torch.tensor([1.0, 0.0]).reshape(2, 1, 1, 1).expand(2, 1, 30, 30))
    nothing = torch.zeros(900, dtype=torch.uint8)
    assert 1.9 < truth.energy([nothing, nothing])[0] <= 2


NUM_MASKS = 30


@pytest.fixture(scope='module')
def nested() -> tuple[list[Truth], list[Tensor]]:
    """Discs of NUM_MASKS sizes, each as the truth and as a sample; the stock model knows how often each voxel is in."""
    y, x = np.mgrid[:24, :24] - 11.5
    discs = np.hypot(y, x)[None] < np.linspace(3, 11, NUM_MASKS)[:, None, None]
    p = torch.from_numpy(discs.mean(0))[None]
    truths = [Truth(disc[None].astype(int), Labels(heads=2), CPU) for disc in discs]
    for truth in truths:
        truth.set_parts(torch.stack([1 - p, p]))
    return truths, [truth.truth for truth in truths]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def exact(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, NUM_MASKS, n)


def narrow(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(NUM_MASKS // 6, NUM_MASKS - NUM_MASKS // 6, n)


def energies(nested, draw: Callable[..., np.ndarray], n: int, cases: int) -> np.ndarray:
    """(cases, 2) of `Truth.energy`; the truths are the same for every sampler."""
    truths, masks = nested
    of_truth, rng = np.random.default_rng(1), np.random.default_rng(2)
    return np.array([truths[exact(of_truth, 1)[0]].energy([masks[i] for i in draw(rng, n)]) for _ in range(cases)])


def test_the_energys_expectation_does_not_depend_on_the_number_of_samples(nested):
    """It is that of independent draws: half of the mean distance between two of them."""
    truths, masks = nested
    distances = np.array([[truth.energy([mask]) for truth in truths] for mask in masks])  # of a single sample
    expected = distances.mean((0, 1)) / 2
    for n, cases in ((2, 1500), (8, 250)):
        for value, expectation in zip(energies(nested, exact, n, cases).T, expected, strict=True):
            mean, error = mean_and_error(value)
            assert abs(mean - expectation) < 4 * error and 4 * error < 0.25 * expectation, n


def wide(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.where(rng.random(n) < 0.5, 0, NUM_MASKS - 1)


@pytest.mark.parametrize(('n', 'cases'), [(2, 1500), (4, 700)])
def test_independent_exact_samples_have_the_lowest_energy_however_few_they_are(nested, n, cases):
    right = energies(nested, exact, n, cases)
    for wrong in (narrow, wide):
        for difference in (energies(nested, wrong, n, cases) - right).T:
            mean, error = mean_and_error(difference)
            assert mean > 4 * error


# temperature

@pytest.mark.parametrize('regions', [None, [(1, 2), 2]])
@pytest.mark.parametrize('temperature', [0.7, 2.0])
def test_a_known_temperature_is_recovered(regions, temperature):
    """Labels are drawn from the probabilities; the network is too sure or not sure enough by a factor."""
    generator = torch.Generator().manual_seed(0)
    of_cases = []
    for _ in range(3):
        right = 2 * torch.randn((2 if regions else 3, 10, 40, 40), generator=generator)
        if regions:  # the second lies within the first
            outer = torch.rand(right[0].shape, generator=generator) < right[0].sigmoid()
            inner = torch.rand(right[0].shape, generator=generator) < right[1].sigmoid()
            labels = torch.where(outer, torch.where(inner, 2, 1), 0)
            right[1] = torch.logit(right[0].sigmoid() * right[1].sigmoid())
        else:
            gumbel = -(-torch.rand(right.shape, generator=generator).log()).log()
            labels = (right + gumbel).argmax(0)
        truth = Truth(labels.numpy(), Labels(regions, 3, 2 if regions else 3), CPU)
        of_cases.append(likelihoods(right * temperature, truth, regions is not None))
    assert fit_temperature(of_cases) == pytest.approx(temperature, rel=0.04)
    ignored = likelihoods(right, Truth(np.full(labels.shape, 3), Labels(regions, 3, 2 if regions else 3), CPU),
                          regions is not None)
    assert fit_temperature([*of_cases, ignored]) == fit_temperature(of_cases) and fit_temperature([ignored]) == 1
    assert fit_temperature([np.arange(len(GRID))]) == 0.5 and fit_temperature([-np.arange(len(GRID))]) == 8
