"""The diffusion core against Hugging Face diffusers, closed forms and cases worked by hand."""
from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from torch.nn.functional import softplus

from nnunet_pdddpm.diffusion.coding import (
    MaskCoding,
    harden,
    logits_to_probabilities,
    one_hot,
    probabilities_to_logits,
    regions_to_channels,
)
from nnunet_pdddpm.diffusion.drawing import END, draw_shifts, drawn_logits, drawn_mask
from nnunet_pdddpm.diffusion.levels import CLEAN, LevelTable, even_table
from nnunet_pdddpm.diffusion.process import (
    Ancestral,
    Redrawing,
    ancestral_step,
    eps_from_x0,
    log_likelihood_ratio,
    noise_scale,
    q_sample,
    signal,
    x0_from_eps,
)
from nnunet_pdddpm.diffusion.sampling import refine, seeded_noise
from nnunet_pdddpm.network.settings import SamplingSettings

# levels of diffusers' own schedules, and any others: log SNRs of a schedule of few steps, of all sizes
UNEVEN = [9.0, 4.4, 4.3, 1.0, 0.0, -0.2, -3.0, -3.1, -9.0, -17.0]
DIFFUSERS = {'cosine': {'beta_schedule': 'squaredcos_cap_v2'},
             'linear': {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02},
             'uneven': {'num_train_timesteps': len(UNEVEN)}}
TABLE = even_table(-14.0, 41)
SHAPES = [pytest.param((3, 2, 6, 5), id='2D'), pytest.param((2, 3, 4, 3, 5), id='3D')]
CODINGS = [MaskCoding(), MaskCoding(0, 1)]
schedules = pytest.mark.parametrize('schedule', DIFFUSERS)
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
    if schedule == 'uneven':
        abar = torch.sigmoid(torch.tensor(UNEVEN, dtype=torch.float64))
        options['trained_betas'] = (1 - abar / torch.cat([torch.ones(1), abar[:-1]])).tolist()
    scheduler = kind(**DIFFUSERS[schedule], clip_sample=False, **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    return scheduler


def log_snrs(scheduler):
    """Of its levels, as it counts them."""
    return torch.logit(scheduler.alphas_cumprod).tolist()


def stand_in(x, level):
    """A fixed smooth function of state and log SNR in the place of a network, bounded like a mask."""
    where = torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)
    return torch.tanh(0.7 * x + torch.sin(where) + 0.3 * math.cos(level))


def our_chain(prediction, mask, levels, draw):
    """All states from the start to the clean mask of `refine` with the stand-in, stacked."""
    states = []

    def denoise(x, level):
        return stand_in(x, level) if prediction == 'sample' else x0_from_eps(x, stand_in(x, level), level)

    result = refine(denoise, Ancestral(), mask, levels, draw, lambda level, x, x0: states.append(x))
    return torch.stack([*states, result])


def assert_normal(sample, mean, variance):
    """Mean and variance of independent normal draws, each within five standard errors."""
    n = sample.numel()
    assert abs(float(sample.mean()) - mean) <= 5 * math.sqrt(variance / n)
    assert abs(float(sample.var()) - variance) <= 5 * variance * math.sqrt(2 / n)


# against diffusers ---------------------------------------------------------------------------------------------------

@schedules
@shapes
def test_forward_process_is_diffusers_with_a_level_for_each_item(schedule, shape):
    scheduler = scheduler_of(DDPMScheduler, schedule)
    levels = torch.tensor(log_snrs(scheduler))
    x0, eps = hard_mask(shape), gaussian(shape)
    for t in ([0, len(levels) // 2, len(levels) - 1], [1, 0, len(levels) // 3]):
        t = torch.tensor(t[:shape[0]])
        expected = scheduler.add_noise(x0, eps, t)
        torch.testing.assert_close(q_sample(x0, levels[t], eps), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(Ancestral().marginal(x0, levels[t], eps), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(Ancestral().start(x0, levels[t], eps), expected, rtol=0, atol=1e-5)


@schedules
@shapes
@predictions
@pytest.mark.parametrize('skipped', [0, 2 / 3], ids=['whole', 'truncated'])
def test_every_state_of_a_strided_chain_is_diffusers_ddim_with_eta_1(schedule, shape, prediction, skipped):
    scheduler = scheduler_of(DDIMScheduler, schedule, set_alpha_to_one=True, prediction_type=prediction,
                             timestep_spacing='leading')
    scheduler.set_timesteps(5 if schedule == 'uneven' else 50)
    timesteps, levels = scheduler.timesteps, log_snrs(scheduler)
    timesteps = timesteps[int(skipped * len(timesteps)):]
    mask, noise = hard_mask(shape), [gaussian(shape, seed) for seed in range(len(timesteps) + 1)]
    x = scheduler.add_noise(mask, noise[0], timesteps[:1])
    states = [x]
    for t, z in zip(timesteps, noise[1:], strict=True):
        x = scheduler.step(stand_in(x, levels[t]), t, x, eta=1.0, variance_noise=z).prev_sample
        states.append(x)
    ours = our_chain(prediction, mask, [*(levels[t] for t in timesteps), CLEAN], iter(noise).__next__)
    torch.testing.assert_close(ours, torch.stack(states), rtol=1e-5, atol=1e-5)


@schedules
@shapes
@predictions
@pytest.mark.parametrize('part', [0.03, 0.3, 1])
def test_every_state_of_an_unstrided_truncated_chain_is_diffusers_ddpm(schedule, shape, prediction, part):
    scheduler = scheduler_of(DDPMScheduler, schedule, variance_type='fixed_small', prediction_type=prediction)
    theirs, ours = (torch.Generator().manual_seed(5) for _ in range(2))  # the scheduler draws its noise itself
    levels = log_snrs(scheduler)
    levels = levels[:math.ceil(part * len(levels))]
    mask = hard_mask(shape)
    x = scheduler.add_noise(mask, torch.randn(shape, generator=theirs, dtype=mask.dtype),
                            torch.tensor([len(levels) - 1]))
    states = [x]
    for t in range(len(levels) - 1, -1, -1):
        x = scheduler.step(stand_in(x, levels[t]), t, x, generator=theirs).prev_sample
        states.append(x)
    chain = our_chain(prediction, mask, [*levels[::-1], CLEAN],
                      lambda: torch.randn(shape, generator=ours, dtype=mask.dtype))
    torch.testing.assert_close(chain, torch.stack(states), rtol=1e-5, atol=1e-5)


@shapes
def test_a_step_between_any_two_levels_is_diffusers_ddpm_of_a_schedule_of_these_two(shape):
    x, x0_hat = gaussian(shape), torch.tanh(gaussian(shape, 1))
    levels = np.random.default_rng(0).uniform(-17, 9, (50, 2))
    for level, lower in np.sort(levels, 1):
        abar, abar_lower = 1 / (1 + np.exp(-np.array([level, lower])))
        scheduler = DDPMScheduler(trained_betas=[1 - abar_lower, 1 - abar / abar_lower], num_train_timesteps=2,
                                  clip_sample=False, prediction_type='sample')
        scheduler.alphas_cumprod = torch.tensor([abar_lower, abar])
        theirs, ours = (torch.Generator().manual_seed(5) for _ in range(2))
        expected = scheduler.step(x0_hat, 1, x, generator=theirs).prev_sample
        noise = torch.randn(shape, generator=ours, dtype=x.dtype)
        torch.testing.assert_close(ancestral_step(x, x0_hat, level, lower, noise), expected, rtol=1e-5, atol=1e-5)


@schedules
@shapes
def test_every_state_of_a_redrawn_chain_is_diffusers_multistep_consistency_sampling(schedule, shape):
    """With a mask made of the estimate in the place of the consistency model's output."""
    scheduler = scheduler_of(LCMScheduler, schedule, prediction_type='sample', timestep_scaling=1e9,
                             original_inference_steps=10)
    log_snr = log_snrs(scheduler)
    timesteps = [int(part * len(log_snr)) for part in (0.9, 0.6, 0.3)]
    levels = [*(log_snr[t] for t in timesteps), CLEAN]
    scheduler.set_timesteps(timesteps=timesteps)
    mask, drawn_at = hard_mask(shape), []
    x = q_sample(mask, levels[0], gaussian(shape, 2))
    expected, noise = [x], torch.Generator().manual_seed(5)
    for t in timesteps[:-1]:
        x = scheduler.step(stand_in(x, log_snr[t]).sign(), t, x, generator=noise).prev_sample
        expected.append(x)
    noise, states = torch.Generator().manual_seed(5), []
    noises = itertools.chain([gaussian(shape, 2)],
                             iter(lambda: torch.randn(shape, generator=noise, dtype=torch.float64), None))

    def draw_mask(x0_hat, lower):
        drawn_at.append(lower)
        return x0_hat.sign()
    result = refine(stand_in, Redrawing(draw_mask), mask, levels, noises.__next__,
                    lambda level, x, x0_hat: states.append(x))
    torch.testing.assert_close(torch.stack(states), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert drawn_at == levels[1:-1] and torch.equal(result, stand_in(states[-1], levels[-2]))


# closed forms --------------------------------------------------------------------------------------------------------

def test_signal_and_noise_have_the_ratio_that_the_level_says():
    levels = torch.linspace(-30, 30, 61, dtype=torch.float64)
    torch.testing.assert_close(2 * (signal(levels) / noise_scale(levels)).log(), levels)
    torch.testing.assert_close(signal(levels) ** 2 + noise_scale(levels) ** 2, torch.ones_like(levels))
    assert (float(signal(CLEAN)), float(noise_scale(CLEAN))) == (1, 0)


@pytest.mark.parametrize(('low', 'high'), [(-1.0, 1.0), (0.0, 1.0)])
@heads
def test_the_evidence_of_a_voxel_makes_the_posterior_of_independent_voxels(regions, low, high):
    """Bayes' rule written out: prior times likelihood of every possible voxel, with torch's normal distribution."""
    generator = torch.Generator().manual_seed(0)
    prior = torch.rand((2, 3, 5, 4), generator=generator)
    prior = prior if regions else prior / prior.sum(1, keepdim=True)
    x, levels = 2 * torch.randn(prior.shape, generator=generator), torch.tensor([-4.0, 1.5])
    a, s = (of(levels).float().reshape(2, 1, 1, 1) for of in (signal, noise_scale))
    likelihood = {value: torch.distributions.Normal(a * value, s).log_prob(x) for value in (low, high)}
    found = probabilities_to_logits(prior, regions) + log_likelihood_ratio(x, levels, low, high)
    if regions:
        on, off = prior.log() + likelihood[high], (1 - prior).log() + likelihood[low]
        expected = torch.stack([off, on]).softmax(0)[1]
    else:  # class c: its channel is on, all others are off
        of_classes = likelihood[high] + likelihood[low].sum(1, keepdim=True) - likelihood[low]
        expected = (prior.log() + of_classes).softmax(1)
    torch.testing.assert_close(logits_to_probabilities(found, regions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('level', [-14.0, -0.5, 4.0])
def test_draws_of_the_forward_process_have_its_mean_and_variance(level):
    x = q_sample(torch.full((100_000, 1), -1.0), level, gaussian((100_000, 1)))
    assert_normal(x, -float(signal(level)), 1 / (1 + math.exp(level)))


@pytest.mark.parametrize(('level', 'lower'), [(-14, -3), (-0.5, -0.4), (-6, 4), (3, 9)])
def test_a_reverse_step_with_the_true_mask_lands_on_the_forward_marginal(level, lower):
    x0 = torch.ones(100_000, 1)
    x = q_sample(x0, level, gaussian(x0.shape))
    x = ancestral_step(x, x0, level, lower, gaussian(x0.shape, 1))
    assert_normal(x, float(signal(lower)), 1 / (1 + math.exp(lower)))


@shapes
def test_noise_and_clean_mask_determine_each_other(shape):
    x0, eps = hard_mask(shape), gaussian(shape)
    levels = torch.tensor([-8.0, 0.3, 4.0][:shape[0]])
    x = q_sample(x0, levels, eps)
    torch.testing.assert_close(eps_from_x0(x, x0, levels), eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x0_from_eps(x, eps, levels), x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('level', [-17.0, 0.0, 9.0])
def test_the_last_step_gives_the_estimate_itself(level):
    x, x0_hat, noise = (gaussian((2, 3, 4, 4), seed).float() for seed in range(3))
    assert torch.equal(Ancestral().step(x, x0_hat, level, CLEAN, torch.zeros_like(x)), x0_hat)
    assert torch.equal(Redrawing(torch.sign).step(x, x0_hat, level, CLEAN, noise), x0_hat)


@shapes
@pytest.mark.parametrize('process', [Ancestral(), Redrawing(lambda x0_hat, lower: -x0_hat)], ids=['DDPM', 'redraw'])
@pytest.mark.parametrize('steps', [1, 2, 3, 7, 40])
def test_an_oracle_recovers_the_truth_bit_for_bit_in_any_number_of_steps(shape, process, steps):
    x0, noises = hard_mask(shape, 1), itertools.count()
    result = refine(lambda x, level: x0, process, hard_mask(shape, 2), TABLE.chain(0.7, steps),
                    lambda: gaussian(shape, next(noises)))
    assert torch.equal(result, x0)


# a voxel that is on in 30 % of the truths, and its exact denoiser

SHARE = 0.3


def log_odds(x, level):
    """Bayes' rule with x = +-signal + noise."""
    return 2 * signal(level) / noise_scale(level) ** 2 * x + math.log(SHARE / (1 - SHARE))


def probability(x, level):
    return torch.sigmoid(log_odds(x, level))


@functools.cache
def table_of_the_voxel():
    """What each log SNR leaves undecided of it, by numerical integration."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    nodes, weights = torch.tensor(nodes), torch.tensor(weights / weights.sum())
    levels = torch.linspace(-14, 4, 60, dtype=torch.float64).tolist()
    left = []
    for level in levels:
        on, off = (softplus(-truth * log_odds(truth * signal(level) + noise_scale(level) * nodes, level))
                   for truth in (1, -1))
        left.append(float((weights * (SHARE * on + (1 - SHARE) * off)).sum()))
    share = (np.array(left) - left[-1]) / (left[0] - left[-1])
    return LevelTable(tuple(levels), (1.0, *share[1:-1].tolist(), 0.0))


@pytest.mark.parametrize('steps', [2, 3, 10])
def test_redrawing_keeps_the_distribution_of_the_truth_where_few_steps_with_the_mean_do_not(steps):
    """Sampled from pure noise 30,000 times."""
    shape, generator = (30_000, 1, 1, 1), torch.Generator().manual_seed(0)
    levels = table_of_the_voxel().chain(1, steps)

    def bernoulli(p):
        return torch.bernoulli(p, generator=generator) * 2 - 1

    def last_probability(process):
        def noise():
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        result = refine(lambda x, level: 2 * probability(x, level) - 1, process, torch.zeros(shape), levels, noise)
        return (result + 1) / 2
    redrawn = last_probability(Redrawing(lambda x0_hat, lower: bernoulli((x0_hat + 1) / 2)))
    five_errors = 5 * math.sqrt(SHARE * (1 - SHARE) / shape[0])
    assert abs(float(redrawn.mean()) - SHARE) < five_errors
    truths = bernoulli(torch.full(shape, SHARE))  # the last estimate is that of a truth at the last level with noise
    at_level = probability(q_sample(truths, levels[-2], torch.randn(shape, generator=generator)), levels[-2])
    assert float((redrawn ** 2).mean()) == pytest.approx(float((at_level ** 2).mean()), abs=five_errors)
    assert steps > 3 or abs(float(last_probability(Ancestral()).mean()) - SHARE) > five_errors


@shapes
def test_starting_with_nothing_undecided_returns_the_mask_bit_for_bit(shape):
    mask = gaussian(shape).float()

    def unwanted(*_):
        raise AssertionError('neither the network nor noise is asked for')

    result = refine(unwanted, Ancestral(), mask, TABLE.chain(0, 1), unwanted)
    assert torch.equal(result, mask) and result is not mask
    assert torch.equal(Ancestral().start(mask, CLEAN, gaussian(shape, 1).float()), mask)


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_refine_tells_every_level_and_draws_once_for_the_start_and_every_step_but_the_last(steps):
    levels, told, draws = TABLE.chain(0.6, steps), [], []

    def draw():
        draws.append(1)
        return torch.zeros(1, 2, 3, 3)

    refine(lambda x, level: x + level, Ancestral(), torch.ones(1, 2, 3, 3), levels, draw,
           lambda level, x, x0_hat: told.append((level, torch.equal(x0_hat, x + level))))
    assert told == [(level, True) for level in levels[:-1]]  # each with the state and the estimate of that level
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

SEEDS, SAMPLES = 600, 8
OF_CLASSES = {2: torch.tensor([0.7, 0.3]), 3: torch.tensor([0.6, 0.3, 0.1]),
              25: torch.arange(1.0, 26) / torch.arange(1.0, 26).sum()}
OF_REGIONS = torch.tensor([0.9, 0.45, 0.2])
CASES = [pytest.param(p, False, id=f'{channels} classes') for channels, p in OF_CLASSES.items()] + \
    [pytest.param(OF_REGIONS, True, id='regions')]


def shares(p, regions, samples, parts=1, dependence=1.0, stage=END, seeds=SEEDS):
    """(seeds, C, J): in what share of a prediction's samples each channel is on at a voxel of each part that has the
    probabilities p (C,)."""
    probabilities, part = p[:, None].expand(-1, parts), torch.arange(parts)
    return torch.stack([sum(drawn_mask(probabilities, regions, draw_shifts(len(p), regions, sample, samples, seed,
                                                                           stage, parts, dependence), part)
                            for sample in range(samples)) / samples for seed in range(seeds)])


def assert_drawn_with(found, p, samples=1):
    """The mean over the seeds is p, within five standard errors of so many independent samples a seed."""
    error = (p * (1 - p) / len(found) / samples).sqrt()
    assert ((found.mean(0) - p).abs() < 5 * error).all()


@pytest.mark.parametrize('stage', [END, 1, 4])
@pytest.mark.parametrize(('p', 'regions'), CASES)
def test_labels_are_drawn_with_their_probability_and_no_worse_than_independently(p, regions, stage):
    found = shares(p, regions, SAMPLES, stage=stage)[..., 0]
    variance = p * (1 - p) / SAMPLES
    assert_drawn_with(found, p, SAMPLES)
    squares = (found - p).square().mean(0)
    assert float(squares.sum() / variance.sum()) < (0.9 if len(p) < 25 or regions else 1.05)
    assert (squares < 1.5 * variance).all()  # the smallest label, too
    if regions or len(p) == 2:  # a threshold in each eighth: the share is one of the two nearest eighths
        assert ((found - p).abs() < 1 / SAMPLES).all()


@pytest.mark.parametrize('samples', [1, 2, 3])
@pytest.mark.parametrize(('p', 'regions'), CASES)
def test_few_samples_are_draws_too(p, regions, samples):
    assert_drawn_with(shares(p, regions, samples)[..., 0], p)


@pytest.mark.parametrize(('p', 'regions'), CASES)
def test_the_central_draw_of_a_single_sample_is_the_likeliest_mask(p, regions):
    probabilities = p[:, None].float()
    for seed in range(5):
        shifts = draw_shifts(len(p), regions, 0, 1, seed, 2, 3, 0.5, central=True)
        likeliest = (probabilities > 0.5).float() if regions else harden(probabilities.log()[None], False)[0]
        assert torch.equal(drawn_mask(probabilities, regions, shifts[:, :1]), likeliest)


@pytest.mark.parametrize('dependence', [0.0, 0.5, 1.0])
@pytest.mark.parametrize(('p', 'regions'), [CASES[1], CASES[-1]])
def test_labels_have_their_probability_in_every_part_however_the_parts_depend_on_each_other(p, regions, dependence):
    found = shares(p, regions, 2, 3, dependence)
    assert_drawn_with(found, p[:, None])


def uniforms(channels, regions, parts, dependence, samples=1, seeds=2000):
    """(draws, parts), of two classes or regions the thresholds u, else those of the Gumbel variables of a class."""
    shifts = torch.stack([draw_shifts(channels, regions, sample, samples, seed, END, parts, dependence)
                          for seed in range(seeds) for sample in range(samples)]).double()
    return torch.sigmoid(-shifts[:, -1]) if regions or channels == 2 else torch.exp(-torch.exp(-shifts[:, 1]))


@pytest.mark.parametrize('samples', [1, 4])
@pytest.mark.parametrize(('channels', 'regions'), [(2, False), (3, True), (4, False)])
@pytest.mark.parametrize('dependence', [0.0, 0.3, 0.8])
def test_parts_depend_on_each_other_by_a_gaussian_copula(channels, regions, dependence, samples):
    u = uniforms(channels, regions, 3, dependence, samples, 2000 // samples)
    normal = torch.special.ndtri(u)
    assert_normal(normal, 0, 1)
    correlation = torch.corrcoef(normal.T)
    error = 1 / math.sqrt(len(u))
    assert (correlation - dependence)[~torch.eye(3, dtype=torch.bool)].abs().max() < 5 * error
    if dependence == 0:  # of independent thresholds nothing else hangs together either
        both = ((u[:, 0] < 0.1) & (u[:, 1] < 0.1)).double().mean()
        assert abs(float(both) - 0.01) < 5 * math.sqrt(0.01 / len(u))


@pytest.mark.parametrize(('channels', 'regions'), [(2, False), (3, True), (4, False)])
def test_with_full_dependence_all_parts_are_drawn_as_one_volume(channels, regions):
    for sample in range(3):
        shifts = draw_shifts(channels, regions, sample, 3, 7, parts=5)
        assert shifts.shape == (channels, 5) and shifts.dtype == torch.float32
        assert torch.equal(shifts, draw_shifts(channels, regions, sample, 3, 7).expand(-1, 5))


def test_over_the_cases_of_a_cohort_every_label_has_its_probability():
    """24 labels, of which each voxel has one with 0.3, 8 samples, one seed: only the cases' names differ."""
    labels, cohort = 24, 250
    p = torch.full((1 + labels, labels), 1e-6)
    p[0], p[1:] = 0.7, p[1:] + 0.3 * torch.eye(labels)
    found = torch.zeros(cohort, labels)
    for number in range(cohort):
        seed = SamplingSettings(seed=1).for_case(f'case_{number:03d}').seed
        for sample in range(SAMPLES):
            mask = drawn_mask(p, False, draw_shifts(1 + labels, False, sample, SAMPLES, seed))
            found[number] += mask[1:].diagonal() / SAMPLES
    error = math.sqrt(0.3 * 0.7 / SAMPLES / cohort)  # of independent samples
    assert ((found.mean(0) - 0.3).abs() < 5 * error).all()
    other = {SamplingSettings(seed=seed).for_case(name).seed for seed in (1, 2) for name in ('case_000', 'case_001')}
    assert len(other) == 4


@pytest.mark.parametrize(('parts', 'of_range'), [(1, 7 / 8), (20, 0.82)])
def test_the_range_of_eight_exact_samples_is_no_interval_of_95_percent(parts, of_range):
    """Of the total of independent objects, the size of each as random as its threshold."""
    inside, generator = {'range': 0, 'quantiles': 0}, torch.Generator().manual_seed(0)
    for seed in range(600):
        u = torch.cat([torch.sigmoid(-draw_shifts(2, False, i, SAMPLES, seed, END, parts, 0.0)[1:].double())
                       for i in range(SAMPLES)]).sum(1)
        truth = torch.rand(parts, generator=generator, dtype=torch.float64).sum()
        inside['range'] += int(u.min() <= truth <= u.max())
        inside['quantiles'] += int(u.quantile(0.025) <= truth <= u.quantile(0.975))
    assert abs(inside['range'] / 600 - of_range) < 0.06
    assert inside['quantiles'] / 600 < 0.89


@pytest.mark.parametrize('dependence', [0.0, 1.0])
def test_every_eighth_of_the_thresholds_has_one_of_eight_samples_in_every_part(dependence):
    for seed in range(20):
        u = torch.cat([torch.sigmoid(-draw_shifts(2, False, i, 8, seed, END, 3, dependence)[1:].double())
                       for i in range(8)])
        assert torch.equal((8 * u).floor().sort(0).values, torch.arange(8.0).double()[:, None].expand(8, 3))
        offsets = (8 * u) % 1  # one for all samples
        torch.testing.assert_close(offsets, offsets[:1].expand(8, 3), rtol=0, atol=1e-5)


def test_samples_seeds_and_stages_draw_otherwise_and_the_same_ones_alike():
    arguments = [(sample, 3, seed, stage) for sample in range(3) for seed in range(3) for stage in range(3)]
    for channels, regions in ((2, False), (3, True), (4, False)):
        drawn = [draw_shifts(channels, regions, *of, parts=2, dependence=0.5) for of in arguments]
        assert all(torch.equal(shifts, draw_shifts(channels, regions, *of, parts=2, dependence=0.5))
                   for shifts, of in zip(drawn, arguments, strict=True))
        assert len({tuple(shifts.flatten().tolist()) for shifts in drawn}) == len(arguments)


@pytest.mark.parametrize('dependence', [0.0, 0.4, 1.0])
def test_nested_regions_stay_nested(dependence):
    generator = torch.Generator().manual_seed(0)
    inner, middle, outer = torch.rand((3, 200), generator=generator).sort(0).values
    p, parts = torch.stack([outer, middle, inner]), torch.randint(0, 4, (200,), generator=generator)
    for sample in range(8):
        mask = drawn_mask(p, True, draw_shifts(3, True, sample, 8, 1, END, 4, dependence), parts)
        assert (mask[0] >= mask[1]).all() and (mask[1] >= mask[2]).all()
        assert 0 < mask.mean() < 1


@pytest.mark.parametrize(('channels', 'regions'), [(2, False), (3, True), (1, True)])
def test_masks_of_two_classes_or_regions_are_drawn_by_one_threshold_for_all_voxels_of_a_part(channels, regions):
    p = torch.rand(300, generator=torch.Generator().manual_seed(0)).clamp(1e-3, 1 - 1e-3)
    probabilities = p.expand(channels, -1) if regions else torch.stack([1 - p, p])
    parts = torch.arange(300) % 3
    shifts = draw_shifts(channels, regions, 2, 8, seed=3, parts=3, dependence=0.2)
    mask = drawn_mask(probabilities, regions, shifts, parts)
    assert mask.shape == probabilities.shape and set(mask.unique().tolist()) <= {0, 1}
    thresholds = torch.sigmoid(-shifts[-1])
    assert torch.equal(mask[-1] == 1, p > thresholds[parts])
    for part in range(3):
        alone = drawn_mask(probabilities[:, parts == part], regions, shifts[:, [part]])
        assert torch.equal(mask[:, parts == part], alone)
    assert len(thresholds.unique()) == 3


@heads
def test_a_drawn_mask_is_what_nnunet_makes_of_the_drawn_logits_and_sure_voxels_stay(regions):
    p = torch.rand((3, 6, 7), generator=torch.Generator().manual_seed(0))
    p = p if regions else p / p.sum(0)
    p[:, 0] = torch.tensor([0.0, 1, 0])[:, None]
    before = p.clone()
    parts = (torch.arange(42) % 5).reshape(6, 7)
    masks = []
    for sample in range(8):
        shifts = draw_shifts(3, regions, sample, 8, 3, 1, 5, 0.3)
        logits = drawn_logits(p, regions, shifts, parts)
        assert logits.dtype == torch.float32
        added = logits - probabilities_to_logits(p[None], regions)[0]
        torch.testing.assert_close(added[:, 1:], shifts[:, parts][:, 1:], rtol=0, atol=1e-5)
        masks.append(drawn_mask(p, regions, shifts, parts))
        assert torch.equal(masks[-1], harden(logits[None], regions)[0])
        assert torch.equal(masks[-1][:, 0], p[:, 0])
    assert torch.equal(p, before)
    assert len(torch.stack(masks).flatten(1).unique(dim=0)) == 8


@heads
def test_no_draw_gives_a_part_a_label_that_its_voxels_cannot_have(regions):
    p = torch.tensor([1e-12, 1, 1e-12])[:, None]
    extreme = torch.tensor([20.0, 20 if regions else -3, 20])[:, None]  # as one draw in a billion has them
    assert drawn_mask(p, regions, extreme)[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize('dependence', [-0.1, 1.1, math.nan])
def test_a_dependence_outside_0_to_1_is_refused(dependence):
    with pytest.raises(ValueError, match=f'dependence is {dependence}, it must lie in 0 to 1'):
        draw_shifts(2, False, 0, 1, 0, dependence=dependence)
