"""The denoiser and the refiner on tiny networks that nnU-Net's own builder makes."""
from __future__ import annotations

import functools
import math
import os
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_pdddpm.diffusion.coding import MaskCoding, harden
from nnunet_pdddpm.diffusion.drawing import draw_shifts, drawn_mask
from nnunet_pdddpm.diffusion.levels import LevelTable
from nnunet_pdddpm.diffusion.process import Ancestral, log_likelihood_ratio, q_sample
from nnunet_pdddpm.diffusion.sampling import NoiseCache, refine, seeded_noise
from nnunet_pdddpm.network.checkpoint import CheckpointError
from nnunet_pdddpm.network.denoiser import Denoiser
from nnunet_pdddpm.network.refiner import BlindNetwork, DiffusionDesign, NoisyBatch, Refiner
from nnunet_pdddpm.network.settings import (
    CHOICES,
    ENVIRONMENT_PREFIX,
    RANGES,
    SamplingSettings,
    as_numbers,
    environment_ignored,
    environment_overrides,
    from_numbers,
)
from nnunet_pdddpm.network.settings import (
    KINDS as SETTING_KINDS,
)
from nnunet_pdddpm.network.settings import override as settings_override
from nnunet_pdddpm.network.state import stored_settings, stored_table

CHANNELS, CLASSES = 2, 3
KINDS = [(architecture, dims, isotropic) for architecture in ('PlainConvUNet', 'ResidualEncoderUNet')
         for dims in (2, 3) for isotropic in (True, False)]
KIND_NAMES = [f'{kind[0]}-{kind[1]}D-{"iso" if kind[2] else "aniso"}tropic' for kind in KINDS]
kinds = pytest.mark.parametrize('kind', KINDS, ids=KIND_NAMES)
two_kinds = pytest.mark.parametrize('kind', [KINDS[0], KINDS[-1]], ids=[KIND_NAMES[0], KIND_NAMES[-1]])
heads = pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
PLAIN_2D = KINDS[0]
X0, EPS = DiffusionDesign(), DiffusionDesign(MaskCoding(0, 1), 'eps', paper_levels=300)
designs = pytest.mark.parametrize('design', [X0, EPS], ids=['x0', 'eps'])
SETTINGS = SamplingSettings(start=0.8, steps=3, mask_blind=0.0, mask_samples=2, seed=4)  # the mean of two samples
NO_MASK = -19.0  # the blind level of a table that begins at -14


def unet(kind, seed, deep_supervision=False):
    """A network of three stages as nnU-Net builds it, with every parameter off its initial value."""
    architecture, dims, isotropic = kind
    first = 0 if isotropic else 1  # anisotropic: the first axis is neither convolved nor strided at the top
    convs = 'n_conv_per_stage' if architecture == 'PlainConvUNet' else 'n_blocks_per_stage'
    torch.manual_seed(seed)
    network = get_network_from_plans(
        f'dynamic_network_architectures.architectures.unet.{architecture}',
        {'n_stages': 3, 'features_per_stage': [4, 6, 8], 'conv_op': f'torch.nn.modules.conv.Conv{dims}d',
         'kernel_sizes': [[1] * first + [3] * (dims - first), [3] * dims, [3] * dims],
         'strides': [[1] * dims, [1] * first + [2] * (dims - first), [2] * dims],
         convs: [1, 2, 1], 'n_conv_per_stage_decoder': [1, 1], 'conv_bias': True,
         'norm_op': f'torch.nn.modules.instancenorm.InstanceNorm{dims}d',
         'norm_op_kwargs': {'eps': 1e-5, 'affine': True}, 'dropout_op': None, 'dropout_op_kwargs': None,
         'nonlin': 'torch.nn.LeakyReLU', 'nonlin_kwargs': {'inplace': True}},
        ['conv_op', 'norm_op', 'dropout_op', 'nonlin'], CHANNELS, CLASSES, deep_supervision=deep_supervision)
    return shaken(network)


def shaken(module):
    """The module with noise on every parameter, as after training: nothing is zero or the identity any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / (2 * parameter[0].numel() ** 0.5))  # fan-in: nothing explodes
    return module


def patch(kind, channels=CHANNELS, batch=2, seed=0):
    size = {2: (16, 12), 3: (8, 12, 8)}[kind[1]]
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def make_refiner(kind=PLAIN_2D, design=X0, settings=SETTINGS, regions=False, trained=True, seed=1,
                 deep_supervision=False):
    """A refiner as in prediction; untrained it is as the trainer warm-starts it."""
    stock = unet(kind, seed)
    refiner = Refiner(stock, unet(kind, seed + 1, deep_supervision), CLASSES, design)
    refiner.denoiser.warm_start(unet(kind, seed, deep_supervision).state_dict())
    if trained:
        shaken(refiner.denoiser)
    refiner.configure(settings, regions)
    return refiner.eval()


def probabilities(logits, regions=False):
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)


def noisy_batch(kind=PLAIN_2D, levels=(2.5, -7.0)):
    return NoisyBatch(patch(kind), patch(kind, CLASSES, seed=1), torch.tensor(levels))


def spied(refiner):
    """What the networks of the refiner are called with from now on: [(mask, log SNR)], 'stock' for that network."""
    calls = []
    refiner.presegmenter.register_forward_pre_hook(lambda module, args: calls.append('stock'))
    refiner.denoiser.register_forward_pre_hook(lambda module, args: calls.append(args[1:]))
    return calls


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    for variable in [v for v in os.environ if v.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(variable)


@pytest.fixture
def override(monkeypatch):
    return lambda **values: [monkeypatch.setenv(ENVIRONMENT_PREFIX + k, str(v)) for k, v in values.items()]


# denoiser ------------------------------------------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize('deep_supervision', [False, True])
def test_warm_started_denoiser_is_the_stock_network_bit_for_bit_until_trained(kind, deep_supervision):
    stock = unet(kind, 1, deep_supervision)
    denoiser = Denoiser(unet(kind, 2, deep_supervision), CLASSES)
    denoiser.warm_start(stock.state_dict())
    image, as_list = patch(kind), list if deep_supervision else lambda output: [output]
    with torch.no_grad():
        expected = as_list(stock(image))
        for seed, levels in enumerate([(NO_MASK, 4.0), (-14.0, 0.3)]):
            outputs = as_list(denoiser(image, 5 * patch(kind, CLASSES, seed=seed), torch.tensor(levels)))
            assert len(outputs) == (2 if deep_supervision else 1)
            assert all(torch.equal(output, e) for output, e in zip(outputs, expected, strict=True))


@kinds
def test_trained_denoiser_sees_the_mask_and_the_level_of_each_item(kind):
    denoiser = shaken(Denoiser(unet(kind, 1), CLASSES))
    image, mask = patch(kind), patch(kind, CLASSES)
    with torch.no_grad():
        output = denoiser(image, mask, torch.tensor([-3.0, -3.0]))
        assert not torch.allclose(output, denoiser(image, -mask, torch.tensor([-3.0, -3.0])), atol=1e-3)
        other_level = denoiser(image, mask, torch.tensor([-3.0, 1.0]))
    assert torch.allclose(output[0], other_level[0], atol=1e-5)
    assert not torch.allclose(output[1], other_level[1], atol=1e-3)


@kinds
def test_every_parameter_of_the_denoiser_is_trained_and_none_of_the_presegmenter(kind):
    refiner = Refiner(unet(kind, 1), unet(kind, 2, deep_supervision=True), CLASSES, X0)
    shaken(refiner.denoiser)
    refiner.train()
    assert refiner.denoiser.training and refiner.denoiser.unet.training
    assert not any(module.training for module in refiner.presegmenter.modules())
    outputs = refiner(noisy_batch(kind))
    sum((output ** 2).mean() for output in outputs).backward()
    for name, parameter in refiner.denoiser.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None, name
        if name.endswith('weight'):  # biases in front of an instance norm have no effect in any nnU-Net
            assert parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad or p.grad is not None for p in refiner.presegmenter.parameters())


def test_a_network_that_is_no_unet_is_refused_by_name():
    with pytest.raises(NotImplementedError, match='Conv3d'):
        Denoiser(nn.Conv3d(2, 3, 3), CLASSES)


# the mask ------------------------------------------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize('settings', [
    SamplingSettings(start=0), SamplingSettings(start=0, mask_blind=0, temperature=3),
    SamplingSettings(mask_stock=1, mask_blind=0), SamplingSettings(mask_stock=1, mask_blind=0, temperature=3)], ids=str)
def test_a_start_of_0_or_the_stock_mask_gives_the_stock_output_bit_for_bit(kind, settings):
    refiner, image = make_refiner(kind, settings=settings), patch(kind)
    calls = spied(refiner)
    with torch.no_grad():
        result = refiner(image)
        assert calls == ['stock']
        assert torch.equal(result, refiner.presegmenter(image))


@kinds
@pytest.mark.parametrize('deep_supervision', [False, True])
def test_the_mask_is_the_denoiser_shown_nothing_unless_asked_otherwise(kind, deep_supervision):
    refiner = make_refiner(kind, settings=SamplingSettings(), deep_supervision=deep_supervision)
    image, calls = patch(kind), spied(refiner)
    with torch.no_grad():
        logits = refiner(image)
        (mask, log_snr), = calls  # one call of one network
        assert torch.equal(mask, torch.zeros(2, CLASSES, *image.shape[2:]))
        assert log_snr.tolist() == [NO_MASK] * 2
        output = refiner.denoiser(image, mask, log_snr)
        assert torch.equal(logits, output[0] if deep_supervision else output)
        assert torch.equal(logits, refiner.blind_logits(image))
        assert not torch.allclose(logits, refiner.presegmenter(image), atol=1e-2)


@kinds
@pytest.mark.parametrize('deep_supervision', [False, True])
def test_before_training_the_blind_mask_is_the_stock_output_bit_for_bit(kind, deep_supervision):
    refiner = make_refiner(kind, settings=SamplingSettings(), trained=False, deep_supervision=deep_supervision)
    with torch.no_grad():
        assert torch.equal(refiner(patch(kind)), refiner.presegmenter(patch(kind)))


def test_the_blind_level_lies_below_all_levels_of_the_measured_table():
    refiner, image = make_refiner(settings=SamplingSettings()), patch(PLAIN_2D)
    refiner.store_levels(measured_table(lowest=-17.25))
    calls = spied(refiner)
    refiner(image)
    assert calls[0][1].tolist() == [-22.25] * 2


def test_the_blind_masks_temperature_divides_its_logits():
    refiner, image = make_refiner(settings=SamplingSettings(blind_temperature=2.5)), patch(PLAIN_2D)
    with torch.no_grad():
        torch.testing.assert_close(refiner(image), refiner.blind_logits(image) / 2.5)
        assert torch.equal(BlindNetwork(refiner, 2.5)(image), refiner(image))


@heads
@pytest.mark.parametrize(('stock', 'blind'), [(0.3, 0), (0, 0.6), (0.3, 0.6), (0.4, 0.6)])
def test_other_masks_mix_probabilities_linearly_each_under_its_temperature(regions, stock, blind):
    settings = replace(SETTINGS, mask_stock=stock, mask_blind=blind, temperature=2.0, blind_temperature=0.7)
    image, refiner = patch(PLAIN_2D), make_refiner(regions=regions, settings=settings)
    with torch.no_grad():
        parts = [probabilities(refiner.presegmenter(image) / 2, regions),
                 probabilities(refiner.blind_logits(image) / 0.7, regions),
                 probabilities(refiner.sample(image, replace(settings, mask_stock=0, mask_blind=0)), regions)]
        calls = spied(refiner)
        result = probabilities(refiner(image), regions)
    assert len(calls) == 1 + (blind > 0) + (2 * 3 if stock + blind < 1 else 0)
    expected = sum(w * p for w, p in zip((stock, blind, 1 - stock - blind), parts, strict=True))
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
@pytest.mark.parametrize('source', ['stock', 'blind'])
def test_samples_without_a_chain_have_the_tempered_probabilities_as_their_mean(regions, source):
    settings = replace(SETTINGS, samples_from=source, temperature=2.0, blind_temperature=0.7)
    refiner, image = make_refiner(regions=regions, settings=settings), patch(PLAIN_2D)
    with torch.no_grad():
        expected = refiner.presegmenter(image) / 2 if source == 'stock' else refiner.blind_logits(image) / 0.7
        torch.testing.assert_close(probabilities(refiner(image), regions), probabilities(expected, regions),
                                   rtol=0, atol=1e-5)


@two_kinds
@designs
def test_logits_of_samples_are_those_of_probabilities_and_the_same_every_time(kind, design):
    refiner, image = make_refiner(kind, design), patch(kind)
    logits = refiner(image)
    assert logits.dtype == torch.float32 and logits.shape == (2, CLASSES, *image.shape[2:])
    assert not logits.requires_grad
    assert torch.isfinite(logits).all() and logits.abs().max() <= 13.9
    # log-probabilities: they need no softmax to sum to one, up to the floor under each class
    torch.testing.assert_close(logits.exp().sum(1), torch.ones_like(logits[:, 0]), rtol=0, atol=1e-5)
    assert torch.equal(refiner(image), logits)
    assert not torch.allclose(probabilities(logits), probabilities(refiner.presegmenter(image)), atol=1e-2)


@kinds
@pytest.mark.parametrize('settings', [SamplingSettings(), SETTINGS], ids=['blind', 'samples'])
def test_an_item_is_segmented_the_same_alone_and_in_a_batch(kind, settings):
    refiner, image = make_refiner(kind, settings=settings), patch(kind, batch=3)
    with torch.no_grad():
        alone = torch.cat([refiner(image[i:i + 1]) for i in range(3)])
        torch.testing.assert_close(probabilities(refiner(image)), probabilities(alone), rtol=0, atol=1e-5)


# samples -------------------------------------------------------------------------------------------------------------

@heads
@designs
@pytest.mark.parametrize('start_mask', ['drawn', 'hard'])
def test_the_mean_is_that_of_chains_from_the_noised_stock_mask(regions, design, start_mask):
    settings = SamplingSettings(start=0.6, steps=4, start_mask=start_mask, redraw=0, temperature=2, mask_blind=0,
                                mask_samples=3, seed=9)
    refiner, image, coding = make_refiner(design=design, regions=regions, settings=settings), patch(PLAIN_2D), \
        design.coding
    stock_logits = refiner.presegmenter(image).detach()
    levels = refiner.table.chain(0.6, 4)
    singles, masks = [], []
    for sample in range(3):
        shifts = draw_shifts(CLASSES, regions, sample, 3, seed=9, stage=1, central=True)
        drawn = torch.stack([drawn_mask(p, regions, shifts) for p in probabilities(stock_logits / 2, regions)])
        masks.append(drawn if start_mask == 'drawn' else harden(stock_logits, regions))
        draw = seeded_noise(drawn.shape[1:], 9, sample, drawn.device)
        x = refine(lambda x, level: refiner.denoise(image, x, level), Ancestral(), coding.encode(masks[-1]), levels,
                   draw).detach()
        p = (x - coding.low) / (coding.high - coding.low)
        total = p.sum(1, keepdim=True)  # predicted noise may leave a voxel without any class: then all are as likely
        singles.append(p if regions else torch.where(total > 0, p / total, 1 / CLASSES))
    assert torch.equal(masks[0], masks[1]) == (start_mask == 'hard')
    assert not torch.allclose(singles[0], singles[1], atol=1e-2)
    calls = spied(refiner)
    result = probabilities(refiner(image), regions)
    torch.testing.assert_close(result, torch.stack(singles).mean(0), rtol=0, atol=1e-5)
    assert calls[0] == 'stock'  # then every sample's levels, as the denoiser is told them
    torch.testing.assert_close(torch.stack([log_snr for _, log_snr in calls[1:]])[:, 0], torch.tensor(3 * levels[:-1]))


@heads
def test_a_redrawn_chain_goes_on_from_noised_masks_drawn_from_the_estimate(regions):
    settings = SamplingSettings(start=1, steps=3, seed=9, mask_blind=0, mask_samples=2)
    refiner, image, seen = make_refiner(regions=regions, settings=settings), patch(PLAIN_2D), []
    levels, coding, denoise = refiner.table.chain(1, 3), X0.coding, refiner.denoise
    refiner.denoise = lambda image, x, level: seen.append((level, x, denoise(image, x, level))) or seen[-1][2]
    refiner(image)
    assert [level for level, _, _ in seen] == 2 * levels[:-1]
    for sample in range(2):
        draw = seeded_noise(seen[0][1].shape[1:], 9, sample, image.device)
        draw()  # of the start
        for step in (1, 2):
            estimate, (level, x, _) = seen[3 * sample + step - 1][2], seen[3 * sample + step]
            shifts = draw_shifts(CLASSES, regions, sample, 2, seed=9, stage=1 + step, central=True)
            masks = torch.stack([drawn_mask(p, regions, shifts) for p in coding.decode(estimate)])
            torch.testing.assert_close(x, q_sample(coding.encode(masks), level, draw()))
    assert not torch.equal(seen[1][1], seen[4][1])


@heads
def test_noise_is_drawn_once_for_all_tiles_and_mirrorings(regions, monkeypatch):
    """With 25 classes it takes a CPU eight times as long as a GPU's forward pass."""
    refiner, image = make_refiner(settings=SETTINGS, regions=regions), patch(PLAIN_2D)
    fresh, drawn, randn = make_refiner(settings=SETTINGS, regions=regions), [], torch.randn

    def counted(*args, **kwargs):
        drawn.append(args)
        return randn(*args, **kwargs)
    monkeypatch.setattr(torch, 'randn', counted)
    first = refiner(image)
    assert len(drawn) == SETTINGS.mask_samples * SETTINGS.steps
    for other in (image.flip(-1), 2 * image):
        refiner(other)
    assert len(drawn) == SETTINGS.mask_samples * SETTINGS.steps
    assert torch.equal(refiner(image), first) and torch.equal(fresh(image), first)
    refiner.settings = replace(SETTINGS, seed=5)
    assert not torch.equal(refiner(image), first)


def test_noise_that_is_kept_is_bounded_and_the_same_as_drawn_anew():
    cpu, field = torch.device('cpu'), 4 * 2 * 10 * 10
    kept = NoiseCache(max_bytes=4 * field)
    for sample, draws in ((0, 2), (1, 2), (0, 2), (2, 3), (3, 5), (1, 1)):
        source, anew = kept.source((2, 10, 10), 7, sample, cpu, draws), seeded_noise((2, 10, 10), 7, sample, cpu)
        for _ in range(draws):
            assert torch.equal(source(), anew())
        assert sum(f.nbytes for fields in kept.fields.values() for f in fields) <= 4 * field


def test_where_the_noise_of_all_samples_cannot_be_kept_that_of_some_is(monkeypatch):
    shape, drawn, randn = (2, 10, 10), [], torch.randn
    kept = NoiseCache(max_bytes=4 * 2 * 10 * 10 * 2)
    monkeypatch.setattr(torch, 'randn', lambda *args, **kwargs: (drawn.append(args), randn(*args, **kwargs))[1])
    for _ in range(3):  # tiles
        for sample in range(3):
            kept.source(shape, 7, sample, torch.device('cpu'), 1)()
    assert len(drawn) == 2 + 3


@heads
def test_one_step_is_the_same_whether_masks_are_redrawn_or_not(regions):
    refiner = make_refiner(regions=regions, settings=replace(SETTINGS, steps=1))
    redrawn = refiner(patch(PLAIN_2D))
    refiner.configure(replace(SETTINGS, steps=1, redraw=0), regions)
    assert torch.equal(refiner(patch(PLAIN_2D)), redrawn)


class PriorOfASign(nn.Module):
    """Stands in for the stock network: one class has everywhere a probability of 0.3, and it is one class everywhere.
    """

    def forward(self, image):
        return torch.tensor([0.7, 0.3]).log().reshape(1, 2, 1, 1).expand(len(image), 2, *image.shape[2:])


class PosteriorOfASign(nn.Module):
    """The exact denoiser of masks of which all voxels are of one class, the second in a share of 0.3."""

    def forward(self, image, mask, log_snr):
        seen = torch.sigmoid(log_snr).sqrt() / torch.sigmoid(-log_snr) * (mask[:, 1] - mask[:, 0]).sum((1, 2))
        odds = (2 * seen + math.log(0.3 / 0.7)).reshape(-1, 1, 1, 1).expand(-1, 1, *mask.shape[2:])
        return torch.cat([-odds / 2, odds / 2], 1) - log_likelihood_ratio(mask, log_snr, -1, 1)


@pytest.mark.parametrize(('start', 'steps'), [(0.4, 2), (0.7, 1), (1.0, 4)])
def test_samples_of_an_exact_denoiser_have_the_distribution_of_the_truth(start, steps):
    """Whatever the start and the steps; a chain from the hard mask instead has not forgotten it."""
    refiner, image, n = make_refiner(), torch.zeros(1, 1, 6, 6), 400
    refiner.num_channels, refiner.presegmenter, refiner.denoiser = 2, PriorOfASign(), PosteriorOfASign()
    settings = SamplingSettings(start=start, steps=steps, samples=n, temperature=1.0, mask_blind=0)
    # half of what is open is told apart where 72 values have a signal of about one
    refiner.store_levels(measured_table(lowest=-9.3, half=math.log(1.05 / 72), decided=0))

    def masks(settings, dependent):
        """(n,) the class of each sample, and whether it is one everywhere."""
        classes = []
        for sample in range(n):
            of = n if dependent else None
            shifts = refiner.start_shifts(settings, sample, of)
            mask = refiner.start_mask(PriorOfASign()(image)[0], settings, shifts)[None]
            x = refine(lambda x, level: refiner.denoise(image, x, level), refiner.chain(settings, sample, of), mask,
                       refiner.table.chain(start, steps), seeded_noise(mask.shape[1:], 0, sample, mask.device))
            drawn = drawn_mask(refiner.probabilities(x)[0], False, refiner.end_shifts(settings, sample, of))
            assert bool((drawn[1] == drawn[1, 0, 0]).all())
            classes.append(float(drawn[1, 0, 0]))
        return torch.tensor(classes)
    with torch.no_grad():
        error = math.sqrt(0.3 * 0.7 / n)
        assert abs(float(masks(settings, True).mean()) - 0.3) < 4 * error
        assert abs(float(masks(settings, False).mean()) - 0.3) < 4 * error
        if start == 0.4:
            hard = masks(replace(settings, start_mask='hard'), True)
            assert float(hard.mean()) < 0.3 - 4 * error


def test_a_sample_that_depends_on_no_other_is_the_same_however_many_there_are():
    refiner = make_refiner()
    for shifts in (refiner.start_shifts, refiner.end_shifts):
        alone = [shifts(SETTINGS, sample, None, 2) for sample in range(3)]
        assert len(torch.stack(alone).flatten(1).unique(dim=0)) == 3
        assert not torch.equal(alone[0], shifts(replace(SETTINGS, seed=5), 0, None, 2))
        assert alone[1].shape == (CLASSES, 2)
        assert not torch.equal(alone[1], shifts(SETTINGS, 1, 3, 2))


def test_parts_of_a_volume_are_drawn_by_shifts_of_their_own_between_the_steps():
    settings = replace(SETTINGS, dependence=0.2)
    refiner, parts = make_refiner(settings=settings), (torch.arange(16 * 12) % 3).reshape(16, 12)
    levels = refiner.table.chain(settings.start, settings.steps)
    estimate = X0.coding.encode(torch.softmax(patch(PLAIN_2D, CLASSES), 1))
    chain = refiner.chain(settings, 1, 4, parts, 3)
    for stage, (level, lower) in enumerate(zip(levels[:-2], levels[1:-1], strict=True), 2):
        noise = patch(PLAIN_2D, CLASSES, seed=3)
        shifts = draw_shifts(CLASSES, False, 1, 4, settings.seed, stage, 3, 0.2)
        assert len(shifts.unique(dim=1).T) == 3
        masks = torch.stack([drawn_mask(p, False, shifts, parts) for p in X0.coding.decode(estimate)])
        torch.testing.assert_close(chain.step(noise, estimate, level, lower, noise),
                                   q_sample(X0.coding.encode(masks), lower, noise))


@kinds
@heads
def test_untrained_the_refiner_adds_to_the_stock_logits_what_each_noisy_voxel_says(kind, regions):
    refiner, image = make_refiner(kind, trained=False, regions=regions, deep_supervision=True), patch(kind)
    stock = refiner.presegmenter(image)
    noisy, log_snr = torch.randn_like(stock), torch.tensor([-3.0, 1.0])
    outputs = refiner(NoisyBatch(image, noisy, log_snr))
    torch.testing.assert_close(outputs[0], stock + log_likelihood_ratio(noisy, log_snr, -1, 1))
    plain = refiner.denoiser(image, noisy, log_snr)
    assert len(plain) == len(outputs) > 1
    assert all(torch.equal(one, other) for one, other in zip(outputs[1:], plain[1:], strict=True))
    blind = torch.full((2,), refiner.blind_level)
    assert torch.equal(refiner(NoisyBatch(image, torch.zeros_like(noisy), blind))[0], stock)


def test_a_model_that_predicts_noise_gives_just_that():
    refiner, image = make_refiner(design=EPS), patch(PLAIN_2D)
    noisy, log_snr = torch.randn(2, CLASSES, *image.shape[2:]), torch.tensor([-3.0, 1.0])
    assert torch.equal(refiner(NoisyBatch(image, noisy, log_snr)), refiner.denoiser(image, noisy, log_snr))


@designs
@heads
@pytest.mark.parametrize(('device', 'dtype'), [
    ('cpu', torch.bfloat16), ('cpu', torch.float16),
    pytest.param('cuda', torch.float16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA'))])
def test_results_are_finite_float32_under_inference_mode_and_autocast(design, regions, device, dtype):
    refiner, image = make_refiner(design=design, regions=regions).to(device), patch(PLAIN_2D).to(device)
    expected = refiner(image)
    with torch.inference_mode():
        again = refiner(image)
        if device == 'cpu':
            assert torch.equal(again, expected)
        else:  # cuDNN may sum in another order
            torch.testing.assert_close(again, expected)
        with torch.autocast(device, dtype=dtype):
            logits = refiner(image)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all() and logits.abs().max() <= 13.9


@heads
def test_the_most_certain_logits_survive_nnunets_half_precision_accumulation(regions):
    refiner = make_refiner(regions=regions)
    with torch.no_grad():
        for network in (refiner.presegmenter, refiner.denoiser.unet):
            network.decoder.seg_layers[-1].weight.mul_(1e6)
        logits = refiner(patch(PLAIN_2D))
    assert logits.min() < -13  # the test bites
    total = torch.zeros_like(logits, dtype=torch.half)
    for _ in range(8 * 8):  # overlapping tiles and mirrorings
        total += logits.half() * 10  # nnU-Net's Gaussian peaks at 10
    assert torch.isfinite(total).all()


# state and settings --------------------------------------------------------------------------------------------------

OTHER = SamplingSettings(start=0.123, steps=4, samples=20, samples_from='blind', start_mask='hard', redraw=0,
                         dependence=0.35, temperature=2.2, blind_temperature=0.9, mask_stock=0.25, mask_blind=0.375,
                         mask_samples=3, seed=2 ** 31 - 1)


def measured_table(lowest=-12.0, half=-3.7, decided=0.01):
    """A table as a meter measures it: the share falls as a logistic function of the log SNR."""
    log_snr = torch.linspace(lowest, 4, 41, dtype=torch.float64)
    share = torch.sigmoid(1.7 * (half - log_snr)) + decided * torch.rand(41, generator=torch.Generator().manual_seed(0))
    share = share.sort(descending=True).values
    share = (share - share[-1]) / (share[0] - share[-1])
    share = 0.999 * share + 0.001 * torch.linspace(1, 0, 41, dtype=torch.float64)
    return LevelTable(tuple(log_snr.tolist()), (1.0, *share[1:-1].tolist(), 0.0))


@two_kinds
@heads
def test_settings_levels_and_weights_travel_in_the_state_dict(kind, regions):
    refiner = make_refiner(kind, settings=OTHER, regions=regions)
    cross_entropy, count = torch.rand(2, 41, generator=torch.Generator().manual_seed(1))
    refiner.store_levels(measured_table(), cross_entropy, count)
    refiner.configure(OTHER, regions)
    refiner.calibration[:2, 1] = torch.arange(6.0).reshape(2, 3)
    refiner.quality[3, 1] = torch.arange(14.0)
    fresh = make_refiner(kind, settings=SamplingSettings(), regions=not regions, seed=7)
    fresh.load_state_dict(refiner.state_dict())
    assert fresh.settings == stored_settings(fresh.state_dict()) == OTHER
    assert fresh.table == stored_table(fresh.state_dict()) == refiner.table
    assert fresh.table.log_snr == pytest.approx(measured_table().log_snr)
    assert fresh.table.share == pytest.approx(measured_table().share, abs=1e-7)
    assert torch.equal(fresh.level_cross_entropy, cross_entropy) and torch.equal(fresh.level_count, count)
    assert fresh.regions == regions and torch.equal(fresh.calibration, refiner.calibration)
    assert torch.equal(fresh.quality, refiner.quality)
    assert torch.equal(fresh(patch(kind)), refiner(patch(kind)))
    refiner.configure(OTHER, regions)
    assert not refiner.calibration.any() and not refiner.quality.any()  # they were of other settings


def test_a_table_that_is_stored_is_used_as_it_will_be_loaded():
    """Not in more digits: else a model would sample otherwise in its training than from its file."""
    refiner = make_refiner()
    refiner.store_levels(measured_table())
    before = refiner(patch(PLAIN_2D))
    assert refiner.table == stored_table(refiner.state_dict())
    refiner.load_state_dict(refiner.state_dict())
    assert torch.equal(refiner(patch(PLAIN_2D)), before)
    assert refiner.table.chain(0.8, 3) != make_refiner().table.chain(0.8, 3)


@designs
def test_a_new_model_has_the_designs_table(design):
    table = make_refiner(design=design).table
    assert len(table.share) == design.nodes
    chain = table.chain(1, 300)[:-1]
    first, last = (-math.log(1 / abar - 1) for abar in ((0.7878, 0.99996) if design is EPS else (8.3e-7, 0.981)))
    assert (chain[0], chain[-1]) == pytest.approx((first, last), abs=0.1)


@hypothesis_settings(deadline=None, derandomize=True, database=None)
@given(st.fixed_dictionaries({
    name: st.sampled_from(CHOICES[name]) if name in CHOICES else
    st.integers(*map(int, RANGES[name])) if SETTING_KINDS[name] is int else
    st.integers(math.ceil(RANGES[name][0] * 1000), int(RANGES[name][1] * 1000)).map(lambda n: n / 1000)
    for name in SETTING_KINDS}))
def test_any_settings_survive_the_models_numbers(values):
    kept = SamplingSettings(**values)
    numbers = {name: torch.tensor(n, dtype=torch.float32 if isinstance(n, float) else None).item()
               for name, n in as_numbers(kept).items()}
    assert from_numbers(numbers) == kept
    assert {name: type(value) for name, value in asdict(from_numbers(numbers)).items()} == SETTING_KINDS


OUT_OF_RANGE = [('start', 1.5), ('start', -0.25), ('steps', 0), ('steps', 1001), ('samples', 0), ('redraw', 2),
                ('dependence', 1.25), ('temperature', 0.0625), ('blind_temperature', 11.5), ('mask_stock', 1.5),
                ('mask_blind', -0.5), ('mask_samples', 0), ('seed', -1)]


@pytest.mark.parametrize('name, value', OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    refiner = make_refiner()
    state = refiner.state_dict()
    state[f'setting_{name}'] = torch.tensor(value, dtype=state[f'setting_{name}'].dtype)
    with pytest.raises(ValueError, match=f"{name}={value} in the model's sampling settings is out of range"):
        make_refiner().load_state_dict(state)
    with pytest.raises(ValueError, match=f'{name}={value}.*out of range'):
        refiner.configure(replace(SETTINGS, **{name: value}), False)
    assert {name for name, _ in OUT_OF_RANGE} == RANGES.keys()


@pytest.mark.parametrize('number', [-1, 3])
def test_a_choice_that_this_version_does_not_know_is_refused_by_name(number):
    state = make_refiner().state_dict()
    state['setting_samples_from'] = torch.tensor(number)
    with pytest.raises(ValueError, match=f"samples_from={number} in the model's sampling settings is unknown"):
        make_refiner().load_state_dict(state)


@pytest.mark.parametrize(('changes', 'message'), [
    ({'samples_from': 'oracle'}, 'samples_from=oracle .* one of chain, stock, blind'),
    ({'start_mask': 'soft'}, 'start_mask=soft .* one of drawn, hard'),
    ({'mask_stock': 0.75, 'mask_blind': 0.5}, 'mask_stock=0.75 and mask_blind=0.5 .* cannot be above 1'),
    ({'start': math.nan}, 'start=nan .* must lie in 0 to 1')], ids=str)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes).check()


def test_a_model_of_an_earlier_version_is_refused_in_one_sentence():
    refiner, kept = make_refiner(), make_refiner().state_dict()
    earlier = {name: value for name, value in kept.items() if not name.startswith(('setting_', 'level_'))}
    earlier.update(t_max=torch.tensor(960), t_start=torch.tensor(700), steps=torch.tensor(1), blend=torch.tensor(0.0))
    for state in (earlier, {name: value for name, value in kept.items() if not name.startswith('level_')},
                  {name: value for name, value in kept.items() if not name.startswith('setting_')},
                  {name: value for name, value in kept.items() if name != 'quality'},
                  {**kept, 'calibration': torch.zeros(256, 2, 7)}):
        with pytest.raises(CheckpointError, match='^The model is of another version of PDDDPMTrainer: train it '
                                                  'again with this version[.]$'):
            refiner.load_state_dict(state)


def test_a_model_with_a_setting_more_or_less_is_of_another_version():
    refiner, kept = make_refiner(), make_refiner().state_dict()
    lacking = [{key: value for key, value in kept.items() if key != f'setting_{name}'} for name in RANGES | CHOICES]
    for state in (*lacking, {**kept, 'setting_blend': torch.tensor(0.5)}):
        with pytest.raises(CheckpointError, match='^The model is of another version of PDDDPMTrainer: train it'):
            refiner.load_state_dict(state)


def test_a_table_of_levels_that_is_not_monotone_is_refused():
    for name, change, message in (('level_log_snr', lambda v: v.flip(0), 'not monotone'),
                                  ('level_share', lambda v: v.clamp(max=0.5), 'not monotone'),
                                  ('level_share', lambda v: 0.5 * v, 'from a share of 0.5 to 0, not from 1 to 0')):
        state = make_refiner().state_dict()
        state[name] = change(state[name])
        with pytest.raises(ValueError, match=f'The table of noise levels .*{message}.*Train the model again'):
            make_refiner().load_state_dict(state)


@pytest.mark.parametrize('name', ['presegmenter.decoder.seg_layers.0.weight', 'denoiser.embedding.layers.0.bias',
                                  'level_cross_entropy', 'setting_temperature'])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(name, value):
    state = make_refiner().state_dict()
    state[name] = state[name].clone()
    state[name].view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f'The model has NaN or infinite weights [(]{name}[)]'):
        make_refiner().load_state_dict(state)


# overrides -----------------------------------------------------------------------------------------------------------

def test_environment_overrides_what_a_loaded_model_has_stored_and_leaves_that_as_it_is(override):
    state, fresh = make_refiner().state_dict(), make_refiner(settings=SamplingSettings())
    override(start=0.5, steps=2, dependence=0.25, seed=11, presegmenter='nnUNetTrainer')
    with pytest.warns(UserWarning) as warned:
        fresh.load_state_dict(state)
        fresh.load_state_dict(state)  # said once, not for every case
    expected = replace(SETTINGS, start=0.5, steps=2, dependence=0.25, seed=11)
    assert fresh.settings == expected and stored_settings(fresh.state_dict()) == SETTINGS
    assert torch.equal(fresh(patch(PLAIN_2D)), make_refiner(settings=expected)(patch(PLAIN_2D)))
    assert [str(warning.message) for warning in warned] == [
        f'The environment overrides the sampling settings of the model: {expected}']


def test_every_setting_can_be_overridden(override):
    override(**asdict(OTHER))
    assert environment_overrides() == asdict(OTHER)
    refiner = make_refiner()
    refiner.load_state_dict(refiner.state_dict())
    assert refiner.settings == OTHER


def test_where_the_environment_is_ignored_a_model_has_its_own_settings_even_if_both_do_not_go_together(override):
    override(mask_stock=0.5, start=0.1)  # and 0.75 of the blind mask is stored
    refiner, fresh = make_refiner(settings=replace(SETTINGS, mask_stock=0, mask_blind=0.75)), make_refiner()
    with environment_ignored():
        fresh.load_state_dict(refiner.state_dict())
    assert fresh.settings == refiner.settings
    with pytest.raises(ValueError, match='mask_stock=0.5 and mask_blind=0.75'):
        fresh.load_state_dict(refiner.state_dict())


def test_variables_in_upper_case_as_on_windows_count_and_empty_ones_do_not(monkeypatch):
    monkeypatch.setenv('NNUNET_PDDDPM_SAMPLES_FROM', 'stock')
    monkeypatch.setenv('nnUNet_pdddpm_steps', '')
    assert environment_overrides() == {'samples_from': 'stock'}


@pytest.mark.parametrize(('changes', 'expected'), [
    ({'start': 0}, lambda refiner, image: refiner.presegmenter(image)),
    ({'mask_stock': 1, 'mask_blind': 0}, lambda refiner, image: refiner.presegmenter(image)),
    ({'mask_blind': 1}, lambda refiner, image: refiner.blind_logits(image))], ids=['start', 'stock', 'blind'])
def test_the_environment_turns_sampling_off(override, changes, expected):
    refiner, image = make_refiner(), patch(PLAIN_2D)
    override(**changes)
    refiner.load_state_dict(refiner.state_dict())
    with torch.no_grad():
        assert torch.equal(refiner(image), expected(refiner, image))


def test_a_start_or_steps_ask_for_a_chain_where_the_model_has_none():
    stored = replace(SETTINGS, samples_from='stock')
    for overrides, source in (({'start': 0.5}, 'chain'), ({'steps': 2}, 'chain'), ({'samples': 3}, 'stock'),
                              ({'start': 0.5, 'samples_from': 'blind'}, 'blind')):
        assert settings_override(stored, overrides, 'flags') == replace(stored, **{**overrides, 'samples_from': source})


@pytest.mark.parametrize('values, message', [
    ({'steps': 'abc'}, 'nnUNet_pdddpm_steps must be a whole number, got "abc"'),
    ({'steps': '1.5'}, 'nnUNet_pdddpm_steps must be a whole number, got "1.5"'),
    ({'redraw': 'yes'}, 'nnUNet_pdddpm_redraw must be a whole number, got "yes"'),
    ({'start': 'half'}, 'nnUNet_pdddpm_start must be a number, got "half"'),
    ({'start_mask': 'soft'}, 'start_mask=soft in the environment variables .* one of drawn, hard'),
    ({'samples_from': '1'}, 'samples_from=1 in the environment variables .* one of chain, stock, blind'),
    ({'mask_stock': 0.5, 'mask_blind': 0.75}, 'mask_stock=0.5 and mask_blind=0.75 in the environment'),
    ({'temperature': 'nan'}, 'temperature=nan in the environment .* 0.1 to 10'),
    ({'t_start': 10}, 'nnUNet_pdddpm_t_start is unknown; the known ones are .*nnUNet_pdddpm_start'),
    *[({name: value}, f'{name}={value} in the environment .* is out of range') for name, value in OUT_OF_RANGE],
], ids=str)
def test_a_wrong_override_is_refused_by_name_and_value(override, values, message):
    refiner = make_refiner()
    override(**values)
    with pytest.raises(ValueError, match=message) as error:
        refiner.load_state_dict(refiner.state_dict())
    assert '\n' not in str(error.value)


# torch.compile -------------------------------------------------------------------------------------------------------

@functools.cache
def compiled_run():
    """[(plain, compiled output, newly compiled graphs that hold convolutions)]: an image with the settings of a new
    model, one in three steps, and a batch."""
    refiner, graphs = make_refiner(), []

    def backend(graph, _):
        graphs.append(any('conv' in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled, runs = torch.compile(refiner, backend=backend), []
    with torch.no_grad():
        for settings, x in ((SamplingSettings(), patch(PLAIN_2D)), (SETTINGS, patch(PLAIN_2D)),
                            (SETTINGS, noisy_batch())):
            refiner.configure(settings, False)
            graphs.clear()
            runs.append((refiner(x), compiled(x), sum(graphs)))
    return runs


def test_compiled_refiner_gives_the_same_for_images_and_for_training_batches():
    for expected, output, _ in compiled_run():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_each_network_is_compiled_once_and_not_for_every_level_of_the_chain():
    """Compiling takes minutes on a GPU, and torch gives up on a function after eight times."""
    assert SETTINGS.steps == 3
    assert [graphs for _, _, graphs in compiled_run()[:2]] == [1, 1]  # the denoiser, and then the pre-segmenter


def test_a_training_step_under_ddp_reaches_every_trained_parameter(tmp_path):
    refiner = make_refiner(trained=False).train()
    refiner.decoder.deep_supervision = True
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(refiner)
        for _ in range(2):  # a parameter without gradient in the first step would make the second fail
            sum(output.square().mean() for output in wrapped(noisy_batch())).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in refiner.denoiser.parameters())


def test_a_model_that_predicts_noise_has_no_blind_mask():
    refiner = make_refiner(design=EPS)
    with pytest.raises(ValueError, match='has no blind mask: set mask_blind to 0'):
        refiner.sample(patch(PLAIN_2D), replace(SETTINGS, mask_stock=0, mask_blind=1))
