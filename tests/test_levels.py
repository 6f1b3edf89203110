"""Noise levels: the map between log SNR and what it leaves undecided, how it is measured, and levels drawn by it."""
from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import softplus

from nnunet_pdddpm.diffusion.levels import (
    CLEAN,
    HIGHEST,
    MARGIN,
    LevelTable,
    cosine_abar,
    even_table,
    lowest_log_snr,
    paper_table,
)
from nnunet_pdddpm.diffusion.measuring import BLANK, NODES, LevelMeter, kronecker_sequence, training_levels
from nnunet_pdddpm.diffusion.process import q_sample

fixed = settings(deadline=None, derandomize=True, database=None, max_examples=60)
BY_HAND = LevelTable((-4.0, 0.0, 4.0), (1.0, 0.25, 0.0))
STEEP = LevelTable((-12.0, -9.0, -8.0, -7.0, 4.0), (1.0, 0.99, 0.4, 0.02, 0.0))


@st.composite
def tables(draw) -> LevelTable:
    """Any table that is monotone, with steps of which none is lost to rounding."""
    steps = draw(st.lists(st.tuples(st.floats(0.01, 5), st.floats(0.01, 1)), min_size=1, max_size=20))
    up, down = (np.concatenate([[0], np.cumsum(values)]) for values in zip(*steps, strict=True))
    share = 1 - down / down[-1]
    return LevelTable(tuple(draw(st.floats(-20, 0)) + up), (1.0, *share[1:-1].tolist(), 0.0))


# the table -----------------------------------------------------------------------------------------------------------

def test_a_table_is_linear_between_its_nodes_and_constant_beyond_them():
    assert [BY_HAND.share_at(level) for level in (-9, -4, -2, 0, 2, 4, CLEAN)] == [1, 1, 0.625, 0.25, 0.125, 0, 0]
    assert [BY_HAND.log_snr_at(share) for share in (1, 0.625, 0.25, 0.125, 0)] == [-4, -2, 0, 2, 4]
    assert BY_HAND.chain(0.5, 2) == pytest.approx([-4 / 3, 0, CLEAN])  # u = 0.5, 0.25, 0


@fixed
@given(tables(), st.floats(0, 1))
def test_share_and_log_snr_are_each_others_inverse(table, part):
    assert table.share_at(table.log_snr_at(part)) == pytest.approx(part, abs=1e-9)
    level = table.log_snr[0] + part * (table.log_snr[-1] - table.log_snr[0])
    assert table.log_snr_at(table.share_at(level)) == pytest.approx(level, abs=1e-6)


@fixed
@given(tables(), st.floats(1e-3, 1), st.integers(1, 300))
def test_every_step_of_a_chain_decides_the_same_share(table, start, steps):
    levels = table.chain(start, steps)
    assert len(levels) == steps + 1 and levels[-1] == CLEAN
    assert all(level < lower for level, lower in itertools.pairwise(levels))
    shares = [table.share_at(level) for level in levels]
    assert shares == pytest.approx([start * (steps - i) / steps for i in range(steps + 1)], abs=1e-9)


def test_a_chain_from_0_has_nothing_to_do():
    for steps in (0, 1, 50):
        assert BY_HAND.chain(0, steps) == [CLEAN]


@pytest.mark.parametrize(('start', 'steps', 'message'), [
    (-0.1, 1, 'start is -0.1, it must lie in 0 to 1'), (1.01, 1, 'start is 1.01, it must lie in 0 to 1'),
    (math.nan, 1, 'start is nan'), (0.5, 0, 'steps is 0, but a chain has at least 1'), (1, -3, 'steps is -3')])
def test_a_start_outside_0_to_1_and_less_than_one_step_are_refused(start, steps, message):
    with pytest.raises(ValueError, match=message) as error:
        BY_HAND.chain(start, steps)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('share', [-0.01, 1.01, math.nan])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=f'lies in 0 to 1, got {share}'):
        BY_HAND.log_snr_at(share)


@pytest.mark.parametrize(('log_snr', 'share'), [
    ((0, 0, 1), (1, 0.5, 0)), ((0, 2, 1), (1, 0.5, 0)), ((0, 1, 2), (1, 1, 0)), ((0, 1, 2), (1, 1.5, 0)),
    ((0, 1, 2), (1, -0.5, 0)), ((0, 1, 2), (0, 0.5, 1)), ((0, 1), (1, 0.5, 0)), ((0,), (1,)), ((), ()),
    ((0, 1, math.inf), (1, 0.5, 0)), ((0, math.nan, 2), (1, 0.5, 0)), ((0, 1, 2), (1, math.nan, 0))], ids=str)
def test_a_table_that_is_not_monotone_is_refused(log_snr, share):
    with pytest.raises(ValueError, match='noise levels is not monotone: .* Train the model again') as error:
        LevelTable(log_snr, share)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('share', 'ends'), [((0.9, 0.5, 0), '0.9 to 0'), ((1, 0.5, 0.1), '1 to 0.1'),
                                             ((1.5, 0.5, -1), '1.5 to -1')])
def test_a_table_that_does_not_go_from_1_to_0_is_refused(share, ends):
    with pytest.raises(ValueError, match=f'from a share of {ends}, not from 1 to 0') as error:
        LevelTable((0, 1, 2), share)
    assert '\n' not in str(error.value)


def test_the_first_table_is_even_in_log_snr():
    table = even_table(-11, NODES)
    assert len(table.share) == len(table.log_snr) == NODES
    assert (table.log_snr[0], table.log_snr[-1]) == (-11, HIGHEST)
    assert [table.log_snr_at(u) for u in (0.75, 0.5, 0.25)] == pytest.approx([-7.25, -3.5, 0.25])


# the paper's levels --------------------------------------------------------------------------------------------------

@functools.cache
def abar_of_diffusers(steps=1000):
    """Multiplied up in float64: in float32, as it comes, 1 - abar has three digits at the lowest levels."""
    betas = DDPMScheduler(num_train_timesteps=steps, beta_schedule='squaredcos_cap_v2').betas
    return torch.cumprod(1 - betas.double(), 0).numpy()


@pytest.mark.parametrize('steps', [1000, 50])
def test_the_cosine_schedule_is_diffusers_shifted_by_one(steps):
    abar = cosine_abar(steps)
    assert abar[0] == 1 and len(abar) == steps + 1
    np.testing.assert_allclose(abar[1:], abar_of_diffusers(steps), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize('t_start', [300, 30])
def test_a_chain_of_all_the_papers_steps_takes_every_level_of_diffusers_cosine_schedule(t_start):
    abar = abar_of_diffusers()[t_start - 1::-1]  # index t - 1, t = T'..1
    levels = np.log(abar / (1 - abar))
    table = paper_table(t_start)
    np.testing.assert_allclose(table.log_snr[:-1], levels, rtol=0, atol=1e-5)
    np.testing.assert_allclose(table.chain(1, t_start)[:-1], levels, rtol=0, atol=1e-5)
    assert table.chain(1, t_start)[-1] == CLEAN
    np.testing.assert_allclose(table.chain(0.5, 3)[:-1], levels[[t_start // 2, t_start * 2 // 3, t_start * 5 // 6]],
                               rtol=0, atol=1e-5)


# what can be told apart: masks of m voxels that are all on or all off, and the exact denoiser of them -----------------

GAUSS_NODES, GAUSS_WEIGHTS = np.polynomial.hermite_e.hermegauss(101)


def exact_share(log_snr: float, values: int) -> float:
    """Cross-entropy over log 2 of the exact posterior of a sign that `values` values share, seen at a log SNR.

    The log-odds of the true sign are N(2 g, 4 g) with g = values exp(log SNR); their loss is log(1 + exp(-odds)).
    """
    g = values * math.exp(log_snr)
    loss = np.logaddexp(0, -2 * (g + math.sqrt(g) * GAUSS_NODES))
    return float((GAUSS_WEIGHTS * loss).sum() / GAUSS_WEIGHTS.sum() / math.log(2))


def exact_cross_entropies(log_snr, values, generator):
    """(B,) cross-entropy of the exact posterior for a noisy mask drawn at each level (B,)."""
    sign = torch.randint(0, 2, (len(log_snr), 1), generator=generator) * 2.0 - 1
    noise = torch.randn((len(log_snr), values), generator=generator)
    x = q_sample(sign.expand(-1, values), log_snr, noise)
    odds = 2 * (torch.sigmoid(log_snr).sqrt() / torch.sigmoid(-log_snr)) * x.sum(1)
    return softplus(-sign[:, 0] * odds)


@pytest.mark.parametrize(('voxels', 'channels', 'lowest'), [(64 * 64, 2, -14), (128 ** 3, 2, -20)])
def test_near_the_lowest_level_nothing_is_told_apart_and_a_margin_above_about_half(voxels, channels, lowest):
    level = lowest_log_snr(voxels, channels)
    assert level == pytest.approx(lowest, abs=0.5)
    assert exact_share(level + BLANK, voxels * channels) > 0.94
    assert 0.4 < exact_share(level + MARGIN, voxels * channels) < 0.6


@pytest.mark.parametrize('voxels', [10, 100, 1000, 4096])
def test_the_table_is_that_of_an_exact_denoiser(voxels):
    """Of patches of 64 x 64, of which m voxels are open, at most all. Measured three times on 2000 batches of 4;
    compared at 200 log SNRs."""
    lowest = lowest_log_snr(64 * 64, 1)
    where = np.linspace(lowest, HIGHEST, 200)
    expected = np.array([exact_share(level, voxels) for level in where])
    measured = []
    for seed in range(3):
        meter, generator = LevelMeter(lowest), torch.Generator().manual_seed(seed)
        for i in range(2000):
            log_snr = training_levels(meter.table(), kronecker_sequence(4 * i, 4, 0.3 * seed))
            of_patch = exact_cross_entropies(log_snr, voxels, generator) * voxels / 64 ** 2
            meter.update(meter.sums(log_snr, of_patch))
        table = meter.table()
        measured.append([table.share_at(level) for level in where])
        assert np.square(measured[-1] - expected).mean() ** 0.5 < 0.04
    np.testing.assert_allclose(np.mean(measured, 0), expected, rtol=0, atol=0.05)


# the meter -----------------------------------------------------------------------------------------------------------

def filled(seed=0, batches=300):
    """A meter that has seen something, and what it could see next."""
    meter, generator = LevelMeter(-10.0), torch.Generator().manual_seed(seed)
    for _ in range(batches):
        meter.update(meter.sums(*observations(generator)))
    return meter, generator


def observations(generator, number=4):
    log_snr = torch.rand(number, generator=generator) * 14 - 10
    return log_snr, exact_cross_entropies(log_snr, 30, generator)


def state(meter):
    return meter.cross_entropy, meter.count


def test_the_table_is_even_until_half_of_the_nodes_have_been_met():
    meter = LevelMeter(-10.0)
    nodes = meter.log_snr
    assert meter.table() == even_table(-10, NODES)
    meter.update(meter.sums(nodes[:NODES // 2], 2 - torch.arange(NODES // 2) / NODES))
    assert meter.table() == even_table(-10, NODES)
    meter.update(meter.sums(nodes[-1:], torch.zeros(1)))
    assert meter.table() != even_table(-10, NODES)


@pytest.mark.parametrize('slope', [0, 1])
def test_the_table_is_even_where_noise_makes_nothing_harder(slope):
    meter = LevelMeter(-10.0)
    meter.update(meter.sums(meter.log_snr, 0.5 + slope * torch.linspace(0, 1, NODES)))
    assert meter.table() == even_table(-10, NODES)


def test_the_unit_of_the_cross_entropy_and_what_is_left_at_the_end_do_not_matter():
    """Patches of which most is background have a small mean, and a truth with noise of its own is never sure."""
    meter, _ = filled()
    share = np.array(meter.table().share)
    meter.cross_entropy = meter.cross_entropy * 1e-4 + 0.02
    np.testing.assert_allclose(meter.table().share, share, atol=1e-4)


def test_a_node_that_few_patches_met_weighs_little():
    meter = LevelMeter(-10.0)
    meter.restore(torch.tensor([exact_share(float(level), 30) for level in meter.log_snr]), torch.full((NODES,), 800.0))
    share = np.array(meter.table().share)
    meter.count[20], meter.cross_entropy[20] = 1, 3  # one patch, by far the hardest
    np.testing.assert_allclose(meter.table().share, share, atol=0.05)


@settings(fixed, max_examples=100)
@given(st.lists(st.tuples(st.floats(0, 1e4, width=32), st.integers(0, 10_000)), min_size=NODES, max_size=NODES))
def test_whatever_is_measured_gives_a_table_that_survives_float32(measured):
    meter = LevelMeter(-14.0)
    values, count = torch.tensor(measured).T
    meter.restore(values * (count > 0), count)
    table = meter.table()  # is checked where it is made
    log_snr, share = (torch.tensor(nodes).double().tolist() for nodes in (table.log_snr, table.share))
    assert LevelTable(tuple(log_snr), tuple(share)) == table or table == even_table(-14, NODES)
    assert (table.log_snr[0], table.log_snr[-1]) == (-14, HIGHEST)


def test_a_stored_state_goes_on_exactly():
    meter, generator = filled()
    kept = [values.clone() for values in state(meter)]
    resumed = LevelMeter(-10.0)
    resumed.restore(*kept)
    for _ in range(50):
        log_snr, values = observations(generator)
        for one in (meter, resumed):
            one.update(one.sums(log_snr, values))
    assert all(map(torch.equal, state(meter), state(resumed)))
    assert meter.table() == resumed.table()
    fresh, _ = filled()
    assert all(map(torch.equal, state(fresh), kept))  # what was stored is not written into


def test_sums_of_two_ranks_added_are_those_of_both_together():
    one, other = (filled()[0] for _ in range(2))
    first, second = (observations(torch.Generator().manual_seed(seed), 40) for seed in (1, 2))
    added = one.sums(*first) + one.sums(*second)
    together = one.sums(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
    torch.testing.assert_close(added, together)
    assert added[1].sum() == 80
    one.update(added)
    other.update(together)
    np.testing.assert_allclose(one.table().share, other.table().share, atol=1e-6)


def test_a_cross_entropy_that_is_not_finite_is_left_out():
    meter, generator = filled()
    log_snr, values = observations(generator, 6)
    broken = values.clone()
    broken[[1, 3, 4]] = torch.tensor([math.nan, math.inf, -math.inf])
    assert torch.equal(meter.sums(log_snr, broken), meter.sums(log_snr[[0, 2, 5]], values[[0, 2, 5]]))
    before = [values.clone() for values in state(meter)]
    meter.update(meter.sums(log_snr, torch.full((6,), math.nan)))
    assert all(map(torch.equal, state(meter), before))


def test_patches_count_at_the_nearest_node_and_beyond_the_ends_at_these():
    meter = LevelMeter(-16.0)  # nodes half apart
    sums = meter.sums(torch.tensor([-30.0, -16.2, -15.8, -15.7, 3.8, 9.0]), torch.arange(1.0, 7.0))
    expected = torch.zeros(2, NODES)
    expected[:, 0], expected[:, 1], expected[:, -1] = (torch.tensor(v) for v in ((6.0, 3), (4.0, 1), (11.0, 2)))
    assert torch.equal(sums, expected)


def test_a_running_mean_goes_back_10_to_500_patches_and_a_quarter_of_those_seen_between():
    def after(*values):
        meter = LevelMeter(-10.0)
        for value in values:
            meter.update(meter.sums(torch.tensor([-10.0]), torch.tensor([float(value)])))
        return float(meter.cross_entropy[0])
    assert after(3) == 3 and after(3, 5, 1) == pytest.approx(3)  # the plain mean of the first ten
    assert after(*[1] * 10, *[0] * 10) == pytest.approx(0.9 ** 10)
    # 1 of 4 (1 - 4/c) for c from 201 to 400: about (200 / 400)^4
    assert after(*[1] * 200, *[0] * 200) == pytest.approx(0.5 ** 4, rel=0.05)
    assert after(*[1] * 2000, *[0] * 1000) == pytest.approx(math.exp(-2), rel=0.01)


# training levels -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('table', [STEEP, BY_HAND, even_table(-14, NODES)], ids=['steep', 'by hand', 'even'])
def test_training_levels_are_even_in_the_share_but_for_15_percent_that_are_even_in_log_snr(table):
    n = 20_000
    levels = training_levels(table, (torch.arange(n) + 0.5) / n)
    assert levels.dtype == torch.float32
    assert (levels.diff() >= 0).all()
    lowest, highest = table.log_snr[0], table.log_snr[-1]
    assert lowest <= levels[0] and levels[-1] <= highest
    for a, b in itertools.pairwise(np.linspace(1, 0, 11)):  # tenths of the share
        low, high = table.log_snr_at(a), table.log_snr_at(b)
        found = ((levels >= low) & (levels < high)).float().mean()
        expected = 0.85 * 0.1 + 0.15 * (high - low) / (highest - lowest)
        assert float(found) == pytest.approx(expected, abs=3 / n)
    tenths = torch.histc(levels, 10, lowest, highest) / n
    assert tenths.min() >= 0.015 - 3 / n


def test_a_position_of_0_is_pure_noise():
    assert training_levels(STEEP, torch.zeros(1)).tolist() == [-12]


@fixed
@given(st.integers(0, 1_000_000), st.integers(1, 200), st.floats(0, 1, exclude_max=True))
def test_positions_fill_the_interval_evenly_from_any_number_on(first, number, offset):
    """Of a golden ratio's multiples no gap is twice as long as it would be if all were alike."""
    found = kronecker_sequence(first, number, offset)
    assert found.shape == (number,) and found.min() >= 0 and found.max() < 1
    ordered = found.sort().values
    gaps = torch.cat([ordered, ordered[:1] + 1]).diff() * number
    assert gaps.max() < 2 and (number == 1 or gaps.min() > 0.35)


def test_positions_go_on_from_batch_to_batch():
    batches = [kronecker_sequence(first, 4, 0.7) for first in range(0, 40, 4)]
    assert torch.equal(torch.cat(batches), kronecker_sequence(0, 40, 0.7))
    assert not torch.equal(kronecker_sequence(0, 40, 0.7), kronecker_sequence(0, 40, 0.2))
