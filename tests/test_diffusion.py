"""The diffusion core against Hugging Face diffusers, closed forms and cases worked by hand."""
from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_pdddpm.diffusion.coding import (
    MaskCoding,
    harden,
    logits_to_probabilities,
    one_hot,
    probabilities_to_logits,
    regions_to_channels,
)
from nnunet_pdddpm.diffusion.drawing import draw_shifts
from nnunet_pdddpm.diffusion.process import GaussianProcess, Redrawing, ddim_step, eps_from_x0, q_sample, x0_from_eps
from nnunet_pdddpm.diffusion.sampling import refine, seeded_noise
from nnunet_pdddpm.diffusion.schedule import SCHEDULES, snr, t_at_snr, truncated_levels

DIFFUSERS = {'cosine': {'beta_schedule': 'squaredcos_cap_v2'},
             'linear': {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02}}
SHAPES = [pytest.param((3, 2, 6, 5), id='2D'), pytest.param((2, 3, 4, 3, 5), id='3D')]
CODINGS = [MaskCoding(), MaskCoding(0, 1)]
schedules = pytest.mark.parametrize('schedule', SCHEDULES)
heads = pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
shapes = pytest.mark.parametrize('shape', SHAPES)
predictions = pytest.mark.parametrize('prediction', ['sample', 'epsilon'])


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard_mask(shape, seed=1):
    return (gaussian(shape, seed) > 0).double() * 2 - 1


def scheduler_of(kind, schedule, **options):
    """A diffusers scheduler that multiplies its own betas up in float64: in float32, as it comes, 1 - abar has three
    digits at the lowest levels, which is less than what is compared here."""
    scheduler = kind(**DIFFUSERS[schedule], clip_sample=False, **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    return scheduler


def stand_in(x, t):
    """A fixed smooth function of state and level (ours, 0..T) in the place of a network, bounded like a mask."""
    where = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    return torch.tanh(0.7 * x + torch.sin(where) + 0.3 * math.cos(t / 100))


def our_chain(schedule, prediction, eta, x_pre, levels, draw):
    """All states x_t0, ..., x_0 of `refine` with the stand-in, stacked."""
    abar, states = SCHEDULES[schedule](), []

    def denoise(x, t):
        return stand_in(x, t) if prediction == 'sample' else x0_from_eps(x, stand_in(x, t), t, abar)

    result = refine(denoise, GaussianProcess(abar, eta), x_pre, levels, draw, lambda t, x, x0: states.append(x))
    return torch.stack([*states, result])


def assert_normal(sample, mean, variance):
    """Mean and variance of independent normal draws, each within five standard errors."""
    n = sample.numel()
    assert abs(float(sample.mean()) - mean) <= 5 * math.sqrt(variance / n)
    assert abs(float(sample.var()) - variance) <= 5 * variance * math.sqrt(2 / n)


# against diffusers ---------------------------------------------------------------------------------------------------

@schedules
def test_schedule_is_diffusers_shifted_by_one(schedule):
    abar = SCHEDULES[schedule]()
    assert abar[0] == 1
    torch.testing.assert_close(abar[1:], DDPMScheduler(**DIFFUSERS[schedule]).alphas_cumprod.double(),
                               rtol=0, atol=1e-5)


@schedules
@shapes
@pytest.mark.parametrize('levels', [[1, 500, 1000], [999, 2, 17]])
def test_forward_process_is_diffusers_with_a_level_for_each_item(schedule, shape, levels):
    abar, t = SCHEDULES[schedule](), torch.tensor(levels[:shape[0]])
    x0, eps = hard_mask(shape), gaussian(shape)
    expected = scheduler_of(DDPMScheduler, schedule).add_noise(x0, eps, t - 1)
    torch.testing.assert_close(q_sample(x0, t, eps, abar), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(GaussianProcess(abar).marginal(x0, -x0, t, eps), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(GaussianProcess(abar).start(x0, t, eps), expected, rtol=0, atol=1e-5)


@schedules
@shapes
@predictions
@pytest.mark.parametrize('eta', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('skipped', [0, 34], ids=['whole', 'truncated'])
def test_every_state_of_a_strided_chain_is_diffusers_ddim(schedule, shape, prediction, eta, skipped):
    scheduler = scheduler_of(DDIMScheduler, schedule, set_alpha_to_one=True, prediction_type=prediction,
                             timestep_spacing='leading')
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps[skipped:]
    x_pre, noise = hard_mask(shape), [gaussian(shape, seed) for seed in range(len(timesteps) + 1)]
    x = scheduler.add_noise(x_pre, noise[0], timesteps[:1])
    states = [x]
    for t, z in zip(timesteps, noise[1:], strict=True):
        x = scheduler.step(stand_in(x, int(t) + 1), t, x, eta=eta, variance_noise=z).prev_sample
        states.append(x)
    levels = [*(timesteps + 1).tolist(), 0]
    ours = our_chain(schedule, prediction, eta, x_pre, levels, iter(noise).__next__)
    torch.testing.assert_close(ours, torch.stack(states), rtol=1e-5, atol=1e-5)


@schedules
@shapes
@predictions
@pytest.mark.parametrize('t_start', [30, 300])
def test_every_state_of_an_unstrided_truncated_chain_is_diffusers_ddpm(schedule, shape, prediction, t_start):
    scheduler = scheduler_of(DDPMScheduler, schedule, variance_type='fixed_small', prediction_type=prediction)
    theirs, ours = (torch.Generator().manual_seed(5) for _ in range(2))  # the scheduler draws its noise itself
    x_pre = hard_mask(shape)
    x = scheduler.add_noise(x_pre, torch.randn(shape, generator=theirs, dtype=x_pre.dtype), torch.tensor([t_start - 1]))
    states = [x]
    for t in range(t_start - 1, -1, -1):
        x = scheduler.step(stand_in(x, t + 1), t, x, generator=theirs).prev_sample
        states.append(x)
    chain = our_chain(schedule, prediction, 1.0, x_pre, truncated_levels(t_start, t_start),
                      lambda: torch.randn(shape, generator=ours, dtype=x_pre.dtype))
    torch.testing.assert_close(chain, torch.stack(states), rtol=1e-5, atol=1e-5)


# closed forms --------------------------------------------------------------------------------------------------------

@schedules
@pytest.mark.parametrize('t', [1, 300, 1000])
def test_draws_of_the_forward_process_have_its_mean_and_variance(schedule, t):
    abar = SCHEDULES[schedule]()
    x = q_sample(torch.full((100_000, 1), -1.0), t, gaussian((100_000, 1)), abar)
    assert_normal(x, -float(abar[t].sqrt()), float(1 - abar[t]))


@schedules
@pytest.mark.parametrize('eta', [0.0, 0.3, 1.0])
def test_a_reverse_step_with_the_true_mask_lands_on_the_forward_marginal(schedule, eta):
    abar, x0 = SCHEDULES[schedule](), torch.ones(100_000, 1)
    x = q_sample(x0, 600, gaussian(x0.shape), abar)
    x = ddim_step(x, x0, 600, 250, gaussian(x0.shape, 1), abar, eta)
    assert_normal(x, float(abar[250].sqrt()), float(1 - abar[250]))


@schedules
@shapes
def test_noise_and_clean_mask_determine_each_other(schedule, shape):
    abar, x0, eps = SCHEDULES[schedule](), hard_mask(shape), gaussian(shape)
    t = torch.tensor([1, 400, 900][:shape[0]])
    x = q_sample(x0, t, eps, abar)
    torch.testing.assert_close(eps_from_x0(x, x0, t, abar), eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x0_from_eps(x, eps, t, abar), x0, rtol=1e-5, atol=1e-5)
    assert torch.equal(eps_from_x0(x0, x0 + 1, 0, abar), torch.zeros_like(x0))  # no noise at level 0, and no NaN


@schedules
@shapes
@pytest.mark.parametrize('eta', [0.0, 1.0])
@pytest.mark.parametrize('steps', [1, 2, 3, 7, 40])
def test_an_oracle_recovers_the_truth_bit_for_bit_in_any_number_of_steps(schedule, shape, eta, steps):
    x0, x_pre = hard_mask(shape, 1), hard_mask(shape, 2)
    levels, noises = truncated_levels(40, steps), itertools.count()
    result = refine(lambda x, t: x0, GaussianProcess(SCHEDULES[schedule](), eta), x_pre, levels,
                    lambda: gaussian(shape, next(noises)))
    assert torch.equal(result, x0)


@schedules
def test_deterministic_chain_with_an_oracle_keeps_the_noise_of_its_start(schedule):
    abar, x0, eps, visited = SCHEDULES[schedule](), hard_mask((2, 3, 4, 4)), gaussian((2, 3, 4, 4)), []
    refine(lambda x, t: x0, GaussianProcess(abar), x0, truncated_levels(800, 9), lambda: eps,
           lambda t, x, x0_hat: visited.append((t, x)))
    for t, x in visited:
        torch.testing.assert_close(x, q_sample(x0, t, eps, abar), rtol=1e-5, atol=1e-5)


@schedules
@shapes
def test_every_state_of_a_redrawn_chain_is_diffusers_multistep_consistency_sampling(schedule, shape):
    """With a mask made of the estimate in the place of the consistency model's output."""
    levels = [900, 610, 350, 0]
    scheduler = scheduler_of(LCMScheduler, schedule, prediction_type='sample', timestep_scaling=1e9)
    scheduler.set_timesteps(timesteps=[t - 1 for t in levels[:-1]], original_inference_steps=1000)
    x_pre, drawn_at = hard_mask(shape), []
    x = q_sample(x_pre, levels[0], gaussian(shape, 2), SCHEDULES[schedule]())
    expected, noise = [x], torch.Generator().manual_seed(5)
    for t in levels[:-2]:
        x = scheduler.step(stand_in(x, t).sign(), t - 1, x, generator=noise).prev_sample
        expected.append(x)
    noise, states = torch.Generator().manual_seed(5), []
    noises = itertools.chain([gaussian(shape, 2)],
                             iter(lambda: torch.randn(shape, generator=noise, dtype=torch.float64), None))

    def draw_mask(x0_hat, s):
        drawn_at.append(s)
        return x0_hat.sign()
    result = refine(stand_in, Redrawing(GaussianProcess(SCHEDULES[schedule]()), draw_mask), x_pre, levels,
                    noises.__next__, lambda t, x, x0_hat: states.append(x))
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-6, atol=1e-6)
    assert drawn_at == levels[1:-1] and torch.equal(result, stand_in(states[-1], levels[-2]))


@pytest.mark.parametrize('steps', [2, 3, 10])
def test_redrawing_keeps_the_distribution_of_the_truth_where_few_steps_with_the_mean_do_not(steps):
    """A voxel that is on in 30 % of the truths, and the exact denoiser: sampled from pure noise 30,000 times."""
    abar, shape, share, generator = SCHEDULES['cosine'](), (30_000, 1, 1, 1), 0.3, torch.Generator().manual_seed(0)

    def probability(x, t):  # Bayes' rule with x_t = +-sqrt(abar) + sqrt(1 - abar) eps
        return torch.sigmoid(2 * abar[t].sqrt() / (1 - abar[t]) * x + math.log(share / (1 - share)))

    def bernoulli(p):
        return torch.bernoulli(p, generator=generator) * 2 - 1

    def last_probability(process):
        def noise():
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        result = refine(lambda x, t: 2 * probability(x, t) - 1, process, torch.zeros(shape),
                        truncated_levels(1000, steps), noise)
        return (result + 1) / 2
    process = GaussianProcess(abar)
    redrawn = last_probability(Redrawing(process, lambda x0_hat, s: bernoulli((x0_hat + 1) / 2)))
    five_errors = 5 * math.sqrt(share * (1 - share) / shape[0])
    assert abs(float(redrawn.mean()) - share) < five_errors
    second_moment = float((redrawn ** 2).mean())
    low = truncated_levels(1000, steps)[-2]  # the last estimate is that of a truth at this level
    truths = bernoulli(torch.full(shape, share))
    at_level = probability(q_sample(truths, low, torch.randn(shape, generator=generator), abar), low)
    assert second_moment == pytest.approx(float((at_level ** 2).mean()), abs=five_errors)
    assert steps > 3 or abs(float(last_probability(process).mean()) - share) > five_errors


@shapes
def test_starting_at_level_0_returns_the_presegmentation_bit_for_bit(shape):
    x_pre, process = gaussian(shape).float(), GaussianProcess(SCHEDULES['cosine']())

    def unwanted(*_):
        raise AssertionError('neither the network nor noise is asked for')

    result = refine(unwanted, process, x_pre, truncated_levels(0, 1), unwanted)
    assert torch.equal(result, x_pre) and result is not x_pre
    assert torch.equal(process.start(x_pre, 0, gaussian(shape, 1).float()), x_pre)


@pytest.mark.parametrize('eta', [-0.1, 1.1])
def test_stochasticity_outside_0_to_1_is_refused(eta):
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match=f'eta is {eta}'):
        ddim_step(x, x, 5, 3, x, SCHEDULES['cosine'](), eta)


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_refine_tells_every_level_and_draws_once_for_the_start_and_every_step_but_the_last(steps):
    levels, told, draws = truncated_levels(100, steps), [], []

    def draw():
        draws.append(1)
        return torch.zeros(1, 2, 3, 3)

    refine(lambda x, t: x + t, GaussianProcess(SCHEDULES['cosine'](), 1.0), torch.ones(1, 2, 3, 3), levels, draw,
           lambda t, x, x0_hat: told.append((t, torch.equal(x0_hat, x + t))))
    assert told == [(t, True) for t in levels[:-1]]  # each with the state and the estimate of that level
    assert len(draws) == steps


def test_seeded_noise_is_standard_normal_and_only_depends_on_seed_and_sample():
    def draws(seed, sample):
        draw = seeded_noise((2, 50, 50), seed, sample, torch.device('cpu'))
        return torch.stack([draw(), draw()])

    first = draws(3, 0)
    assert torch.equal(first, draws(3, 0))
    everything = torch.cat([first, draws(3, 1), draws(4, 0)])
    assert len(everything.flatten(1).unique(dim=0)) == 6  # nothing is drawn twice
    assert_normal(everything, 0, 1)


# levels --------------------------------------------------------------------------------------------------------------

@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 1000).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t))))
def test_levels_fall_evenly_from_the_start_to_0(chain):
    t_start, steps = chain
    levels = truncated_levels(t_start, steps)
    assert len(levels) == steps + 1
    assert levels[0] == t_start and levels[-1] == 0
    gaps = [a - b for a, b in itertools.pairwise(levels)]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(1, 1000).flatmap(lambda t: st.tuples(st.just(t), st.integers(-9, 0) | st.integers(t + 1, 2000))))
def test_less_than_one_step_or_more_than_levels_are_refused_with_both_values(chain):
    t_start, steps = chain
    with pytest.raises(ValueError, match=rf'steps is {steps}\b.*t_start = {t_start}\b'):
        truncated_levels(t_start, steps)


def test_a_negative_start_is_refused():
    with pytest.raises(ValueError, match='t_start is -1'):
        truncated_levels(-1, 1)


@schedules
def test_signal_to_noise_falls_with_the_level(schedule):
    abar = SCHEDULES[schedule]()
    ratios = [snr(abar, t) for t in range(1001)]
    assert ratios[0] == math.inf
    assert all(a > b for a, b in itertools.pairwise(ratios))
    assert ratios[500] == pytest.approx(float(abar[500] / (1 - abar[500])))


@schedules
def test_level_at_a_signal_to_noise_ratio_is_the_inverse_of_the_ratio_at_a_level(schedule):
    abar = SCHEDULES[schedule]()
    wrong = {t: found for t in range(1001) if (found := t_at_snr(abar, snr(abar, t))) != t}  # at 0 it is infinite
    assert not wrong, f'{len(wrong)} levels are not found again: {wrong}'


@schedules
def test_a_ratio_between_two_levels_gives_the_noisier_and_one_below_all_gives_the_last(schedule):
    abar = SCHEDULES[schedule]()
    assert t_at_snr(abar, (snr(abar, 299) + snr(abar, 300)) / 2) == 300
    assert t_at_snr(abar, snr(abar, 1000) / 2) == 1000
    with pytest.raises(ValueError, match='got 0'):
        t_at_snr(abar, 0)


def test_level_300_with_masks_of_0_and_1_is_level_509_with_masks_of_plus_and_minus_1():
    """The paper starts at 300 with masks of 0 and 1: half the amplitude of -1/+1, so a quarter of the power."""
    masks = torch.tensor([0.0, 1.0])
    power = [float(coding.encode(masks).var(correction=0)) for coding in CODINGS]
    assert power == [1, 0.25]
    abar = SCHEDULES['cosine']()
    assert abs(t_at_snr(abar, power[1] * snr(abar, 300)) - 509) <= 3


# coding --------------------------------------------------------------------------------------------------------------

@shapes
@pytest.mark.parametrize('coding', CODINGS, ids=['-1/+1', '0/1'])
def test_decoding_inverts_encoding(coding, shape):
    p = torch.sigmoid(gaussian(shape)).float()
    torch.testing.assert_close(coding.decode(coding.encode(p)), p, rtol=0, atol=1e-6)
    hard = (p > 0.5).float()
    assert torch.equal(coding.encode(hard), torch.where(p > 0.5, coding.high, coding.low))
    assert torch.equal(coding.decode(coding.encode(hard)), hard)
    beyond = torch.tensor([coding.low - 3, coding.high + 3])
    assert coding.decode(beyond).tolist() == [0, 1]


@pytest.mark.parametrize('extra', [[], [1]], ids=['2D', '3D'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.int16])  # nnU-Net's targets come as either
def test_label_maps_become_channels(extra, dtype):
    labels = torch.tensor([[0, 2], [1, 1]], dtype=dtype).reshape(1, 1, 2, *extra, 2)
    hot = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [1, 1]], [[0, 1], [0, 0]]]).reshape(1, 3, 2, *extra, 2)
    overlapping = torch.tensor([[[0.0, 1], [1, 1]], [[0, 1], [0, 0]]]).reshape(1, 2, 2, *extra, 2)
    assert torch.equal(one_hot(labels, 3), hot)
    assert torch.equal(regions_to_channels(labels, [(1, 2), (2,)]), overlapping)


@pytest.mark.parametrize('label', [-1, 3])
def test_a_label_outside_the_declared_set_ends_training(label):
    with pytest.raises(RuntimeError, match='out of bounds'):
        one_hot(torch.tensor([[[0, label]]]), 3)


def test_a_label_map_of_two_channels_is_refused():
    with pytest.raises(ValueError, match='got 2'):
        one_hot(torch.zeros(1, 2, 3, 3), 4)


@shapes
@heads
def test_probabilities_survive_the_way_through_logits(shape, regions):
    p = logits_to_probabilities(gaussian(shape) * 3, regions)
    logits = probabilities_to_logits(p, regions)
    torch.testing.assert_close(logits_to_probabilities(logits, regions), p, rtol=0, atol=1e-5)


@heads
def test_logits_of_hard_masks_are_finite_and_bounded(regions):
    hard = torch.tensor([[1.0, 0.0]]).reshape(1, 2, 1, 1)
    logits = probabilities_to_logits(hard, regions)
    assert torch.isfinite(logits).all() and logits.abs().max() <= 13.9
    torch.testing.assert_close(logits_to_probabilities(logits, regions), hard, rtol=0, atol=1e-5)


def test_hardened_logits_are_the_mask_nnunet_makes_of_them():
    logits = torch.tensor([[-1.0, 0.0, 2.0, -0.1], [-2.0, -0.1, 3.0, -0.2]]).reshape(1, 2, 2, 2)
    classes = torch.tensor([[1.0, 1, 0, 1], [0, 0, 1, 0]]).reshape(1, 2, 2, 2)  # the larger, though all are negative
    regions = torch.tensor([[0.0, 0, 1, 0], [0, 0, 1, 0]]).reshape(1, 2, 2, 2)  # sigmoid(0) is not above 0.5
    assert torch.equal(harden(logits, regions=False), classes)
    assert torch.equal(harden(logits, regions=True), regions)
    ties = torch.randint(0, 3, (2, 5, 4, 6), generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(harden(ties, regions=False), one_hot(ties.argmax(1, keepdim=True), 5))


# drawing -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('channels', 'regions'), [(2, False), (3, True), (1, True)])
def test_drawn_masks_of_two_classes_or_regions_are_thresholds_each_quantile_once(channels, regions):
    p = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(1e-3, 1 - 1e-3)
    logits = torch.logit(p).expand(channels, -1) if regions else torch.stack([torch.log(1 - p), torch.log(p)])
    thresholds = []
    for sample in range(8):
        shifted = logits + draw_shifts(channels, regions, sample, 8, seed=3)[:, None]
        mask = shifted[0] > 0 if regions else shifted.argmax(0) == 1
        thresholds += [u for u in ((i + 0.5) / 8 for i in range(8)) if torch.equal(mask, p > u)]
    assert sorted(thresholds) == [(i + 0.5) / 8 for i in range(8)] and thresholds != sorted(thresholds)


def test_drawn_classes_have_the_probabilities_they_are_drawn_from():
    p = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    n = 2000
    counts = torch.zeros(3, 3, dtype=torch.float64)
    for sample in range(n):
        classes = (p.log() + draw_shifts(3, False, sample, n, seed=0)).argmax(1)
        counts[range(3), classes] += 1
    torch.testing.assert_close(counts / n, p, rtol=0, atol=4 * math.sqrt(0.25 / n))


@pytest.mark.parametrize('samples', [1, 2, 3])
@pytest.mark.parametrize('p', [torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.3, 0.2])], ids=['2 classes', '3 classes'])
def test_between_steps_masks_are_draws_also_of_few_samples(samples, p):
    shifts = torch.stack([draw_shifts(len(p), False, i, samples, seed, level=480)
                          for seed in range(1500) for i in range(samples)])
    shares = torch.bincount((p.log() + shifts).argmax(1), minlength=len(p)) / len(shifts)
    assert (shares - p).abs().max() < 5 * (0.25 / 1500) ** 0.5
    at_two_levels = (draw_shifts(len(p), False, 0, samples, 7, level) for level in (480, 240))
    assert not torch.equal(*at_two_levels)


@pytest.mark.parametrize(('channels', 'regions'), [(2, False), (4, False), (3, True)])
def test_a_single_sample_is_the_likeliest_mask_and_seeds_give_other_orders(channels, regions):
    shifts = draw_shifts(channels, regions, 0, 1, seed=5)
    torch.testing.assert_close(shifts, shifts[:1].expand(channels))
    if regions:
        torch.testing.assert_close(shifts, torch.zeros(channels), atol=1e-6, rtol=0)
    orders = {tuple(torch.cat([draw_shifts(channels, regions, i, 6, seed) for i in range(6)]).tolist())
              for seed in range(5)}
    assert len(orders) == 5
