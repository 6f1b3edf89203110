"""The denoiser and the refiner on tiny networks that nnU-Net's own builder makes."""
from __future__ import annotations

import functools
import os
from dataclasses import replace

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_pdddpm.diffusion.coding import MaskCoding, harden, logits_to_probabilities, probabilities_to_logits
from nnunet_pdddpm.diffusion.drawing import draw_shifts
from nnunet_pdddpm.diffusion.process import q_sample
from nnunet_pdddpm.diffusion.sampling import refine, seeded_noise
from nnunet_pdddpm.diffusion.schedule import truncated_levels
from nnunet_pdddpm.network.denoiser import Denoiser
from nnunet_pdddpm.network.refiner import MASK, SAMPLES, DiffusionDesign, NoisyBatch, Refiner, stored_settings
from nnunet_pdddpm.network.settings import ENVIRONMENT_PREFIX, SamplingSettings
from nnunet_pdddpm.network.settings import override as settings_override

CHANNELS, CLASSES = 2, 3
KINDS = [(architecture, dims, isotropic) for architecture in ('PlainConvUNet', 'ResidualEncoderUNet')
         for dims in (2, 3) for isotropic in (True, False)]
KIND_NAMES = [f'{kind[0]}-{kind[1]}D-{"iso" if kind[2] else "aniso"}tropic' for kind in KINDS]
kinds = pytest.mark.parametrize('kind', KINDS, ids=KIND_NAMES)
two_kinds = pytest.mark.parametrize('kind', [KINDS[0], KINDS[-1]], ids=[KIND_NAMES[0], KIND_NAMES[-1]])
heads = pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
PLAIN_2D = KINDS[0]
X0, EPS = DiffusionDesign(), DiffusionDesign('linear', MaskCoding(0, 1), 'eps')
CONDITIONED = DiffusionDesign(condition_on_presegmentation=True)
designs = pytest.mark.parametrize('design', [X0, EPS, CONDITIONED], ids=['x0', 'eps', 'conditioned'])
SETTINGS = SamplingSettings(t_start=300, steps=3, eta=0.5, seed=4)
LOW = SamplingSettings(t_start=200)


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


def make_refiner(kind=PLAIN_2D, design=X0, settings=SETTINGS, regions=False, trained=True, seed=1):
    """A refiner as in prediction; untrained it is as the trainer warm-starts it."""
    stock = unet(kind, seed)
    refiner = Refiner(stock, unet(kind, seed + 1), CLASSES, design)
    refiner.denoiser.warm_start(stock.state_dict())
    if trained:
        shaken(refiner.denoiser)
    refiner.configure(settings, LOW, 1000, regions)
    return refiner.eval()


def probabilities(logits, regions=False):
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)


def noisy_batch(kind=PLAIN_2D, levels=(20, 700)):
    return NoisyBatch(patch(kind), patch(kind, CLASSES, seed=1), torch.tensor(levels),
                      torch.softmax(patch(kind, CLASSES, seed=2), 1))


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
        for seed, levels in enumerate([(0, 1000), (17, 500)]):
            outputs = as_list(denoiser(image, 5 * patch(kind, CLASSES, seed=seed), torch.tensor(levels)))
            assert len(outputs) == (2 if deep_supervision else 1)
            assert all(torch.equal(output, e) for output, e in zip(outputs, expected, strict=True))


@kinds
def test_trained_denoiser_sees_the_mask_and_the_level_of_each_item(kind):
    denoiser = shaken(Denoiser(unet(kind, 1), CLASSES))
    image, mask = patch(kind), patch(kind, CLASSES)
    with torch.no_grad():
        output = denoiser(image, mask, torch.tensor([100, 100]))
        assert not torch.allclose(output, denoiser(image, -mask, torch.tensor([100, 100])), atol=1e-3)
        other_level = denoiser(image, mask, torch.tensor([100, 400]))
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


# prediction ----------------------------------------------------------------------------------------------------------

@kinds
@pytest.mark.parametrize('settings', [SamplingSettings(t_start=0), SamplingSettings(blend=1)], ids=['t_start', 'blend'])
def test_without_refinement_the_stock_output_comes_back_bit_for_bit(kind, settings):
    refiner, image = make_refiner(kind, settings=settings), patch(kind)
    with torch.no_grad():
        assert torch.equal(refiner(image), refiner.presegmenter(image))


@two_kinds
@designs
def test_refined_logits_are_those_of_probabilities_and_the_same_every_time(kind, design):
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
def test_an_item_is_refined_the_same_alone_and_in_a_batch(kind):
    refiner, image = make_refiner(kind), patch(kind, batch=3)
    alone = torch.cat([refiner(image[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(probabilities(refiner(image)), probabilities(alone), rtol=0, atol=1e-5)


@heads
@designs
def test_result_is_the_mean_of_the_samples(regions, design):
    refiner = make_refiner(design=design, regions=regions, settings=SamplingSettings(250, 4, samples=3, eta=1, seed=9))
    image, levels, coding = patch(PLAIN_2D), truncated_levels(250, 4), design.coding
    stock_logits = refiner.presegmenter(image).detach()
    x_pre, p_pre = coding.encode(harden(stock_logits, regions)), probabilities(stock_logits, regions)
    singles = []
    for sample in range(3):
        draw = seeded_noise(x_pre.shape[1:], 9, sample, x_pre.device)
        x = refine(lambda x, t: refiner.denoise(image, x, t, p_pre), refiner.process(1.0), x_pre, levels, draw).detach()
        p = (x - coding.low) / (coding.high - coding.low)
        total = p.sum(1, keepdim=True)  # predicted noise may leave a voxel without any class: then all are as likely
        singles.append(p if regions else torch.where(total > 0, p / total, 1 / CLASSES))
    assert not torch.allclose(singles[0], singles[1], atol=1e-2)
    result = probabilities(refiner(image), regions)
    torch.testing.assert_close(result, torch.stack(singles).mean(0), rtol=0, atol=1e-5)


@heads
def test_a_redrawn_chain_goes_on_from_noised_masks_of_the_samples_quantiles(regions):
    settings = SamplingSettings(900, 2, samples=3, redraw=True, seed=9)
    refiner = make_refiner(regions=regions, settings=settings)
    image, coding = patch(PLAIN_2D), X0.coding
    seen = []
    denoise = refiner.denoise
    refiner.denoise = lambda image, x, t, p: seen.append((t, x, denoise(image, x, t, p))) or seen[-1][2]
    refiner(image)
    assert [t for t, _, _ in seen] == [900, 450] * 3
    for sample in range(3):
        draw = seeded_noise(seen[0][1].shape[1:], 9, sample, image.device)
        draw()  # of the start
        logits = probabilities_to_logits(coding.decode(seen[2 * sample][2]), regions)
        shifts = draw_shifts(CLASSES, regions, sample, 3, seed=9, level=450)
        mask = harden(logits + shifts.reshape(-1, 1, 1), regions)
        torch.testing.assert_close(seen[2 * sample + 1][1], q_sample(coding.encode(mask), 450, draw(), refiner.abar))
    assert not torch.equal(seen[1][1], seen[3][1])
    refiner.configure(replace(settings, steps=1), LOW, 1000, regions)
    of_one_step = refiner(image)
    refiner.configure(replace(settings, steps=1, redraw=False), LOW, 1000, regions)
    assert torch.equal(of_one_step, refiner(image))


def test_models_of_before_redraw_nothing_and_an_eta_ends_redrawing():
    state = make_refiner().state_dict()
    for name in ('redraw', 'sampler_redraw', 'interval_sd'):
        del state[name]
    fresh = make_refiner(settings=SamplingSettings(redraw=True))
    fresh.load_state_dict(state)
    assert fresh.settings == stored_settings(state, MASK) == SETTINGS and not fresh.settings.redraw
    redrawing = replace(SETTINGS, redraw=True)
    for overrides, redraw in (({'eta': 1.0}, False), ({'steps': 2}, True), ({'eta': 1.0, 'redraw': 1}, True),
                              ({'redraw': 0}, False)):
        assert settings_override(redrawing, overrides, 1000, 'flags').redraw is redraw


@heads
def test_blend_mixes_probabilities_linearly(regions):
    image, refiner = patch(PLAIN_2D), make_refiner(regions=regions)
    refined, stock = (probabilities(logits, regions) for logits in (refiner(image), refiner.presegmenter(image)))
    refiner.configure(SamplingSettings(300, 3, eta=0.5, seed=4, blend=0.3), LOW, 1000, regions)
    torch.testing.assert_close(probabilities(refiner(image), regions), 0.7 * refined + 0.3 * stock, rtol=0, atol=1e-5)


def test_conditioned_denoiser_sees_the_presegmentation_and_the_other_does_not():
    batch = noisy_batch()
    other = batch._replace(presegmentation=batch.presegmentation.flip(1))
    with torch.no_grad():
        conditioned, plain = make_refiner(design=CONDITIONED), make_refiner()
        assert not torch.allclose(conditioned(batch), conditioned(other), atol=1e-3)
        assert torch.equal(plain(batch), plain(other))


@kinds
@pytest.mark.parametrize('chain', [(1, 1), (500, 1), (1000, 5)], ids=str)
def test_untrained_refiner_segments_as_the_stock_network(kind, chain):
    settings = SamplingSettings(*chain, samples=2, eta=1)
    refiner, image = make_refiner(kind, settings=settings, trained=False), patch(kind)
    assert torch.equal(refiner(image).argmax(1), refiner.presegmenter(image).argmax(1))


@designs
@heads
@pytest.mark.parametrize(('device', 'dtype'), [
    ('cpu', torch.bfloat16), ('cpu', torch.float16),
    pytest.param('cuda', torch.float16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA'))])
def test_results_are_finite_float32_under_inference_mode_and_autocast(design, regions, device, dtype):
    refiner, image = make_refiner(design=design, regions=regions).to(device), patch(PLAIN_2D).to(device)
    expected = refiner(image)
    with torch.inference_mode():
        assert torch.equal(refiner(image), expected)
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

@heads
@pytest.mark.parametrize('design', [X0, DiffusionDesign(condition_on_presegmentation=True)], ids=['x0', 'conditioned'])
def test_without_steps_the_denoiser_sees_the_presegmentation_itself_at_level_0(design, regions):
    settings = SamplingSettings(t_start=300, steps=0, blend=0.25, samples=3)
    refiner, image = make_refiner(design=design, regions=regions, settings=settings), patch(PLAIN_2D)
    with torch.no_grad():
        logits = refiner.presegmenter(image)
        stock = logits_to_probabilities(logits, regions)
        parts = [2 * harden(logits, regions) - 1, 2 * stock - 1]
        mask = torch.cat(parts[:1 + design.condition_on_presegmentation], 1)
        output = refiner.denoiser(image, mask, torch.zeros(len(image)))
    expected = 0.75 * logits_to_probabilities(output, regions) + 0.25 * stock
    torch.testing.assert_close(logits_to_probabilities(refiner(image), regions), expected, rtol=1e-4, atol=1e-5)


@two_kinds
@heads
def test_settings_and_weights_travel_in_the_state_dict(kind, regions):
    settings = SamplingSettings(t_start=123, steps=4, samples=2, eta=0.3, blend=0.7, seed=99)
    refiner = make_refiner(kind, settings=settings, regions=regions)
    refiner.configure(settings, LOW, 321, regions)
    fresh = make_refiner(kind, settings=SamplingSettings(), regions=not regions, seed=7)
    fresh.load_state_dict(refiner.state_dict())
    assert fresh.settings == stored_settings(fresh.state_dict(), MASK) == settings
    assert stored_settings(fresh.state_dict(), SAMPLES) == LOW
    assert int(fresh.t_max) == 321 and fresh.regions == regions
    assert torch.equal(fresh(patch(kind)), refiner(patch(kind)))


@pytest.mark.parametrize('name, value', [('t_start', 401), ('steps', 301), ('samples', 0), ('blend', 1.5)])
def test_a_state_dict_with_a_setting_out_of_range_is_refused_by_name(name, value):
    refiner = make_refiner()
    refiner.configure(SETTINGS, LOW, 400, False)
    state = refiner.state_dict()
    state[name] = torch.tensor(value, dtype=state[name].dtype)
    with pytest.raises(ValueError, match=f'{name}={value}.*out of range'):
        make_refiner().load_state_dict(state)
    with pytest.raises(ValueError, match=f'{name}={value}.*out of range'):
        refiner.configure(SamplingSettings(**{**vars(SETTINGS), name: value}), LOW, 400, False)


def test_environment_overrides_what_a_loaded_model_has_stored_and_leaves_that_as_it_is(override):
    state, fresh = make_refiner().state_dict(), make_refiner(settings=SamplingSettings())
    override(t_start=200, steps=5, samples=2, blend=0.25, seed=11, presegmenter='nnUNetTrainer')
    fresh.load_state_dict(state)
    assert fresh.settings == SamplingSettings(t_start=200, steps=5, samples=2, eta=0.5, blend=0.25, seed=11)
    assert stored_settings(fresh.state_dict(), MASK) == SETTINGS
    expected = make_refiner(settings=SamplingSettings(t_start=200, steps=5, samples=2, eta=0.5, blend=0.25, seed=11))
    assert torch.equal(fresh(patch(PLAIN_2D)), expected(patch(PLAIN_2D)))


def test_a_lowered_t_start_lowers_the_steps_and_a_raised_one_keeps_them(override):
    refiner = make_refiner(settings=SamplingSettings(t_start=300, steps=100))
    for t_start, steps in ((20, 20), (0, 1), (900, 100)):
        override(t_start=t_start)
        refiner.load_state_dict(refiner.state_dict())
        assert (refiner.settings.t_start, refiner.settings.steps) == (t_start, steps)


def test_a_t_start_asks_for_a_chain_where_the_model_has_none(override):
    refiner = make_refiner(settings=SamplingSettings(t_start=300, steps=0))
    for values, expected in (({'t_start': 200}, (200, 1)), ({'t_start': 200, 'steps': 0}, (200, 0)),
                             ({'samples': 3}, (200, 0))):
        override(**values)
        refiner.load_state_dict(refiner.state_dict())
        assert (refiner.settings.t_start, refiner.settings.steps) == expected


def test_steps_are_checked_against_the_t_start_of_the_loaded_model(override):
    """A new network has t_start = 700 until the model's weights are in; 800 steps are none too many for those."""
    state = make_refiner(settings=SamplingSettings(t_start=900, steps=3)).state_dict()
    override(steps=800)
    fresh = Refiner(unet(PLAIN_2D, 1), unet(PLAIN_2D, 2), CLASSES, X0)
    fresh.load_state_dict(state)
    assert (fresh.settings.t_start, fresh.settings.steps) == (900, 800)


@pytest.mark.parametrize('values, message', [
    ({'t_start': 'abc'}, 'nnUNet_pdddpm_t_start must be a whole number, got "abc"'),
    ({'steps': '1.5'}, 'nnUNet_pdddpm_steps must be a whole number, got "1.5"'),
    ({'blend': 'half'}, 'nnUNet_pdddpm_blend must be a number, got "half"'),
    ({'t_start': 401}, 't_start=401 in the environment .* 0 to 400'),
    ({'t_start': 10, 'steps': 11}, 'steps=11 in the environment .* 0 to 10'),
    ({'steps': 301}, 'steps=301 in the environment .* 0 to 300'),
    ({'samples': 0}, 'samples=0 in the environment'),
    ({'blend': 'nan'}, 'blend=nan in the environment'),
    ({'blend': 1.2}, 'blend=1.2 in the environment'),
    ({'seed': -1}, 'seed=-1 in the environment'),
    ({'tstart': 10}, 'nnUNet_pdddpm_tstart is unknown; the known ones are .*nnUNet_pdddpm_t_start'),
], ids=str)
def test_a_wrong_override_is_refused_by_name_and_value(override, values, message):
    refiner = make_refiner()
    refiner.configure(SETTINGS, LOW, 400, False)
    override(**values)
    with pytest.raises(ValueError, match=message):
        refiner.load_state_dict(refiner.state_dict())


# torch.compile -------------------------------------------------------------------------------------------------------

@functools.cache
def compiled_run():
    """[(plain, compiled output, compiled graphs that hold convolutions)] for an image in three steps and a batch."""
    refiner, graphs = make_refiner(), []

    def backend(graph, _):
        graphs.append(any('conv' in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    compiled, runs = torch.compile(refiner, backend=backend), []
    with torch.no_grad():
        for x in (patch(PLAIN_2D), noisy_batch()):
            graphs.clear()
            runs.append((refiner(x), compiled(x), sum(graphs)))
    return runs


def test_compiled_refiner_gives_the_same_for_images_and_for_training_batches():
    for expected, output, _ in compiled_run():
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_each_network_is_compiled_once_and_not_for_every_level_of_the_chain():
    """Compiling takes minutes on a GPU, and torch gives up on a function after eight times."""
    assert SETTINGS.steps == 3
    assert compiled_run()[0][2] == 2  # the pre-segmenter and the denoiser


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
