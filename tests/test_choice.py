"""The rules by which tuning chooses a mask, samples, and as many cases as a budget allows."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.budget import cases_within_budget
from nnunet_pdddpm.tuning.choice import (
    MaskRow,
    SampleRow,
    TuningError,
    choose_mask,
    choose_measured,
    choose_samples,
    difference_interval,
)

BASE = np.linspace(0.6, 0.9, 20)
NOISE = np.random.default_rng(0).standard_normal(20) / 50
WITHOUT_MEAN = NOISE - NOISE.mean()


def of_cases(values) -> np.ndarray:
    return np.broadcast_to(values, 20).copy()


def mask(dice, nll=0.1, steps=1, **settings) -> MaskRow:
    """The mean of the samples unless settings say otherwise."""
    return MaskRow(SamplingSettings(steps=steps, **{'mask_blind': 0.0, **settings}), of_cases(dice), of_cases(nll))


def samples(energy, **settings) -> SampleRow:
    return SampleRow(SamplingSettings(**settings), of_cases(energy), of_cases(0.3))


STOCK_ROW = mask(BASE, 0.2, mask_stock=1.0)


def test_the_interval_of_a_difference_is_that_of_the_mean_of_paired_differences():
    assert difference_interval(BASE + 0.01, BASE) == pytest.approx((0.01, 0.01))
    low, high = difference_interval(BASE + NOISE, BASE)
    assert (low, high) == pytest.approx(stats.ttest_1samp(NOISE, 0).confidence_interval(0.95))
    undefined = np.where(np.arange(20) == 3, np.nan, BASE)  # a false positive where there is nothing counts as 0
    found_something = np.where(np.arange(20) == 3, 0, BASE)
    assert difference_interval(undefined, found_something)[1] > 0.02
    assert difference_interval(undefined, undefined) == (0, 0)
    assert difference_interval(BASE[:1], BASE[:1]) == (-np.inf, np.inf)
    nothing = np.full(15, np.nan)  # cases without foreground tell nothing
    assert difference_interval(np.append(BASE + NOISE, nothing), np.append(BASE, nothing)) == pytest.approx((low, high))
    # people's masks of one image are not independent
    many = difference_interval(np.repeat(BASE + NOISE, 10), np.repeat(BASE, 10), np.repeat(np.arange(20), 10).tolist())
    assert many == pytest.approx((low, high))
    assert difference_interval(BASE + NOISE, BASE, [7] * 20) == (-np.inf, np.inf)


def test_the_mask_is_accurate_then_likely_then_cheap():
    best = mask(BASE + 0.02, 0.15, steps=2)
    as_accurate = mask(BASE + 0.015 + WITHOUT_MEAN, 0.10, steps=5)
    cheaper_than_that = mask(BASE + 0.015 + WITHOUT_MEAN, 0.102 + WITHOUT_MEAN, steps=3)
    likelier_but_worse = mask(BASE + 0.01, 0.01)
    rows = [STOCK_ROW, best, as_accurate, likelier_but_worse]
    assert choose_mask(rows) is as_accurate
    assert choose_mask([*rows, cheaper_than_that]) is cheaper_than_that
    assert choose_mask(list(reversed([*rows, cheaper_than_that]))) is cheaper_than_that
    assert choose_mask([STOCK_ROW, likelier_but_worse, best]) is best


def test_no_mask_below_stocks_dice_is_chosen():
    within_noise_but_below = mask(BASE - 0.001 + WITHOUT_MEAN, 0.01)
    assert choose_mask([STOCK_ROW, within_noise_but_below]) is STOCK_ROW
    better = mask(BASE + 0.004, 0.3)
    assert choose_mask([STOCK_ROW, within_noise_but_below, better]) is better
    as_good = mask(BASE, 0.01)
    assert choose_mask([STOCK_ROW, as_good]) is as_good
    assert choose_mask([STOCK_ROW, mask(BASE, 0.2)]) is STOCK_ROW  # it costs less
    with pytest.raises(TuningError, match='No validation case has foreground'):
        choose_mask([mask(np.nan, mask_stock=1.0), mask(BASE)])


def test_network_calls_are_those_of_plain_prediction():
    calls = [mask(BASE, steps=3, mask_samples=2, **weights).calls for weights in (
        {'mask_stock': 1.0}, {'mask_blind': 1.0}, {'mask_stock': 0.5, 'mask_blind': 0.5}, {'mask_stock': 0.5}, {},
        {'mask_blind': 0.5})]
    assert calls == [1, 1, 2, 1 + 2 * 3, 1 + 2 * 3, 2 + 2 * 3]
    assert [samples(0.1, samples_from=of, steps=3).calls for of in ('stock', 'blind', 'chain')] == [0, 0, 3]


def test_samples_have_the_lowest_energy_then_they_are_cheap():
    thresholds = samples(0.196 + WITHOUT_MEAN, samples_from='stock', temperature=1.0)
    best, as_close = samples(0.19, start=0.8, steps=3), samples(0.195 + WITHOUT_MEAN, start=0.6, steps=2)
    as_cheap = samples(0.194 + WITHOUT_MEAN, start=0.4, steps=2)
    assert choose_samples([best, thresholds, as_close]) is thresholds  # a chain is no better, as far as can be told
    far = replace(thresholds, energy=of_cases(0.25))
    assert choose_samples([best, far]) is best
    assert choose_samples([far, as_close, best]) is as_close
    assert choose_samples([far, as_close, as_cheap, best]) is as_cheap


def test_a_budget_leaves_out_cases_but_not_below_five():
    assert cases_within_budget(20, 0.001, [1000] * 20) == list(range(20))
    half = cases_within_budget(19.9 / 2, 0.001, [1000] * 20)
    assert len(half) == 9 and half[0] == 0 and half[-1] == 19
    assert len(cases_within_budget(5, 0.001, [1000] * 20)) == 5
    assert cases_within_budget(4.9, 0.001, [1000] * 20) == []
    assert cases_within_budget(11, 0.001, [9000, 1000, 1000]) == [0, 1, 2]
    assert cases_within_budget(10.9, 0.001, [9000, 1000, 1000]) == []


def test_a_mask_that_plain_prediction_makes_worse_than_stocks_is_not_taken():
    def mask(stock: float, blind: float, dice: float, nll: float) -> MaskRow:
        settings = SamplingSettings(mask_stock=stock, mask_blind=blind)
        return MaskRow(settings, np.full(6, dice), np.full(6, nll))
    stock, blind, blend, samples = rows = [mask(1, 0, 0.80, 0.3), mask(0, 1, 0.81, 0.2), mask(0.5, 0.5, 0.82, 0.1),
                                           mask(0, 0, 0.83, 0.1)]
    of_plain = {samples.settings: 0.79, blend.settings: 0.805}
    asked = []

    def plain(settings: SamplingSettings) -> np.ndarray:
        asked.append(settings)
        return np.full(6, of_plain[settings])
    assert choose_measured(rows, plain) == (blend.settings, pytest.approx(0.805))
    assert asked == [samples.settings, blend.settings]
    of_plain[blend.settings] = 0.7
    assert choose_measured(rows, plain) == (blind.settings, pytest.approx(0.81))  # the same in plain prediction
    assert choose_measured([stock, samples], plain) == (stock.settings, pytest.approx(0.80))
