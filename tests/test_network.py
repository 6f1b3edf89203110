"""The denoiser and the refiner on tiny networks that nnU-Net's own builder makes."""
from __future__ import annotations

import functools
import math
import os
from dataclasses import replace

import pytest
import torch
from tiny_refiner import (
    CLASSES,
    EPS,
    NO_MASK,
    PLAIN_2D,
    SETTINGS,
    X0,
    designs,
    heads,
    kinds,
    make_refiner,
    measured_table,
    noisy_batch,
    patch,
    probabilities,
    shaken,
    spied,
    two_kinds,
    unet,
)
from torch import nn

from nnunet_pdddpm.diffusion.coding import harden
from nnunet_pdddpm.diffusion.drawing import draw_shifts, drawn_mask
from nnunet_pdddpm.diffusion.process import Ancestral, log_likelihood_ratio, q_sample
from nnunet_pdddpm.diffusion.sampling import NoiseCache, refine, seeded_noise
from nnunet_pdddpm.network.denoiser import Denoiser
from nnunet_pdddpm.network.refiner import BlindNetwork, NoisyBatch, Refiner
from nnunet_pdddpm.network.settings import ENVIRONMENT_PREFIX, SamplingSettings


@pytest.fixture(autouse=True)
def no_overrides(monkeypatch):
    for variable in [v for v in os.environ if v.startswith(ENVIRONMENT_PREFIX)]:
        monkeypatch.delenv(variable)


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
        assert mask is None and log_snr.tolist() == [NO_MASK] * 2
        output = refiner.denoiser(image, torch.zeros(2, CLASSES, *image.shape[2:]), log_snr)  # as in training
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
    # the denoiser that is shown no mask; the pre-segmenter and the denoiser that is shown one
    assert [graphs for _, _, graphs in compiled_run()[:2]] == [1, 2]


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
