"""Samples of whole volumes, what several of them say together, and its summary: numbers against closed forms."""
from __future__ import annotations

import csv
import itertools
import json
import math
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from nnunet_pdddpm.diffusion.coding import MaskCoding
from nnunet_pdddpm.diffusion.drawing import drawn_logits, drawn_mask, hard_mask
from nnunet_pdddpm.diffusion.levels import even_table
from nnunet_pdddpm.diffusion.process import Ancestral, Redrawing
from nnunet_pdddpm.diffusion.sampling import refine
from nnunet_pdddpm.files import identity
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.summary import mean_of_known, sample_volumes, write_row, write_summary
from nnunet_pdddpm.inference.volume_sampling import (
    fuse_tiles,
    mirrorings,
    mirrorings_of_sample,
    refine_volume,
    volume_noise,
)

CPU = torch.device('cpu')
CODING = MaskCoding()
TABLE = even_table(-8.0, 41)
PROCESSES = pytest.mark.parametrize('process', [Ancestral(), Redrawing(lambda x0_hat, lower: x0_hat.sign())],
                                    ids=['DDPM', 'redraw'])


def field(shape, seed=0, sample=0, correlation=0.0):
    """The first noise field (C, Z, Y, X) of a sample."""
    return volume_noise(shape, seed, sample, CPU, correlation)()(shape[1])


@pytest.mark.parametrize('correlation', [0.0, 0.9, 1.0])
def test_noise_is_white_within_a_slice_and_correlated_between_neighbours_as_asked(correlation):
    noise = field((2, 12, 120, 120), correlation=correlation).double()
    n = noise[:, 0].numel()
    four_errors = 4 / math.sqrt(n)  # of a mean and of a correlation; of a variance sqrt(2) times as large
    assert noise.mean((0, 2, 3)).abs().max() < four_errors
    assert (noise.pow(2).mean((0, 2, 3)) - 1).abs().max() < math.sqrt(2) * four_errors
    for one, other in ((noise[..., 1:], noise[..., :-1]), (noise[..., 1:, :], noise[..., :-1, :])):
        assert (one * other).mean((0, 2, 3)).abs().max() < 1.1 * four_errors
    assert (noise[0] * noise[1]).mean((1, 2)).abs().max() < math.sqrt(2) * four_errors
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean((0, 2, 3)) / noise[:, :-1].pow(2).mean((0, 2, 3))
    assert (neighbours - correlation).abs().max() < four_errors
    third = (noise[:, 3:] * noise[:, :-3]).mean((0, 2, 3)) / noise[:, :-3].pow(2).mean((0, 2, 3))
    assert (third - correlation ** 3).abs().max() < four_errors


def test_noise_repeats_for_the_same_arguments_only():
    shape = (2, 3, 4, 5)
    draws = [field(shape, seed, sample, 0.5) for seed, sample in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for (i, one), (j, other) in itertools.product(enumerate(draws), repeat=2):
        assert torch.equal(one, other) == (i == j)
    assert torch.equal(field(shape, 1, 1, 0.5), draws[3])
    source = volume_noise(shape, 0, 0, CPU)
    first, second = (source()(shape[1]) for _ in range(2))
    assert torch.equal(first, field(shape)) and not torch.equal(first, second)


def local_denoiser(x):
    """Smoothing over 3 x 3 x 3 voxels of (C, Z, Y, X), and bounded like a mask: an estimate of x0 that looks nearby."""
    return torch.tanh(2 * torch.nn.functional.avg_pool3d(x[None], 3, 1, 1)[0])


def at_once(denoise):
    """A function of a volume as one that gives its slices."""
    return lambda x, level: [(slice(0, x.shape[1]), denoise(x, level))]


def fused(*args):
    """All that `fuse_tiles` gives, (C, Z, Y, X)."""
    return torch.cat([values.clone() for _, values in fuse_tiles(*args)], 1)


@PROCESSES
@pytest.mark.parametrize(('start', 'steps'), [(0.7, 1), (1.0, 2), (0.4, 7), (0, 1)])
def test_a_volume_is_refined_as_the_whole_tensor_would_be(process, start, steps):
    shape = (2, 5, 6, 7)
    mask = CODING.encode(torch.randn(shape, generator=torch.Generator().manual_seed(3)) > 0)
    levels = TABLE.chain(start, steps)
    asked = []

    def denoise(x, level):
        asked.append(level)
        return local_denoiser(x) * math.cos(level / 10)
    source = volume_noise(shape, 5, 2, CPU)
    expected = refine(lambda x, level: denoise(x[0], level)[None], process, mask[None], levels,
                      lambda: source()(shape[1])[None])[0]
    asked_of_the_whole, asked = asked, []
    result = refine_volume(at_once(denoise), lambda z: process, lambda z: mask[:, z], shape, CPU, levels,
                           volume_noise(shape, 5, 2, CPU))
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert asked == asked_of_the_whole == levels[:-1]  # one call a step, none where nothing is left to do


def tiles_of(shape, tile, step=0.5):
    """Overlapping tiles as nnU-Net makes them, and its weights."""
    steps = compute_steps_for_sliding_window(shape, tile, step)
    tiles = [(slice(None), *(slice(s, s + n) for s, n in zip(start, tile, strict=True)))
             for start in itertools.product(*steps)]
    return tiles, compute_gaussian(tile, value_scaling_factor=10, dtype=torch.float32, device=CPU)


def test_fused_tiles_are_the_weighted_mean_in_any_order():
    shape = (2, 9, 12, 10)
    tiles, weight = tiles_of(shape[1:], (6, 8, 6))
    assert len(tiles) > 4
    rng = np.random.default_rng(0)
    values = {i: rng.standard_normal((2, 6, 8, 6)) for i in range(len(tiles))}
    total, weights = np.zeros(shape), np.zeros(shape[1:])
    for i, tile in enumerate(tiles):
        total[tile] += weight.double().numpy() * values[i]
        weights[tile[1:]] += weight.double().numpy()

    def fuse(order):
        return fused(((tiles[i], torch.from_numpy(values[i]).float()) for i in order), shape, weight, CPU)
    forwards, shuffled = fuse(range(len(tiles))), fuse(rng.permutation(len(tiles)).tolist())
    np.testing.assert_allclose(forwards.numpy(), total / weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(forwards, shuffled, rtol=1e-5, atol=1e-5)
    slices = [(slice(None), z, *tile[2:]) for z in range(9) for tile in tiles[:6]]  # 2d: tiles of single slices
    in_2d = fused(((tile, torch.full((2, *weight.shape[1:]), float(tile[1]))) for tile in slices), shape, weight[3],
                  CPU)
    np.testing.assert_allclose(in_2d[0, :, 0, 0].numpy(), range(9), rtol=1e-6)


TILE, VOLUME = (8, 8, 16), (8, 8, 72)


def refined(denoise, process, mask, levels, seed, sample):
    """One sample from a coded mask (C, Z, Y, X)."""
    return refine_volume(denoise, lambda z: process, lambda z: mask[:, z], mask.shape, CPU, levels,
                         volume_noise(mask.shape, seed, sample, CPU))


def sample_of_the_whole_volume(process, mask, levels, sample):
    tiles, weight = tiles_of(VOLUME, TILE)
    return refined(lambda x, level: fuse_tiles(((tile, local_denoiser(x[tile])) for tile in tiles), mask.shape, weight,
                                               CPU), process, mask, levels, 0, sample)


def sample_of_every_tile_for_itself(process, mask, levels, sample):
    """What a sliding window makes of a network that draws its noise anew for every tile."""
    tiles, weight = tiles_of(VOLUME, TILE)
    number = itertools.count(1000 * sample)
    return fused(((tile, refined(at_once(lambda x, level: local_denoiser(x)), process, mask[tile], levels, 0,
                                 next(number))) for tile in tiles), mask.shape, weight, CPU)


@PROCESSES
@pytest.mark.parametrize(('draw', 'coherent'), [(sample_of_the_whole_volume, True),
                                                (sample_of_every_tile_for_itself, False)])
def test_the_border_between_tiles_is_as_the_inside_for_whole_volumes_and_not_for_single_tiles(draw, coherent, process):
    """Tiles of 16 start at every 8th voxel: half way between two centres (4 past a start) both weigh the same, at a
    centre one counts alone. The mask is the same all along that axis and the denoiser local, so nothing but the tiles
    tells these places apart. Compared: the variance over the samples, and the squared step to the next voxel;
    each difference has to lie within three of its standard errors."""
    samples = 40
    mask = torch.full((2, *VOLUME), -1.0)
    mask[0, :, :4], mask[1, :, 4:] = 1, 1
    levels = TABLE.chain(0.5, 2)
    x = torch.stack([draw(process, mask, levels, i) for i in range(samples)]).double()
    centres = torch.arange(16, 57, 8)
    borders = centres[:-1] + 4

    deviation = (x - x.mean(0)) ** 2 * samples / (samples - 1)
    step = (x[..., 1:] - x[..., :-1]) ** 2
    z_scores = {}
    for name, values in (('variance', deviation), ('step', step)):
        at_border, inside = (values[..., at].flatten(1).mean(1) for at in (borders, centres))
        difference = at_border - inside
        z_scores[name] = float(difference.mean() / (difference.std() / math.sqrt(samples)))
    seamless = all(abs(z) < 3 for z in z_scores.values())
    assert seamless == coherent, z_scores


@pytest.mark.parametrize('axes', [None, (), (1,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize('samples', [1, 2, 3, 5, 8, 11])
def test_all_mirrorings_are_seen_at_no_more_cost_than_needed(axes, samples):
    every = mirrorings(axes)
    assert every[0] == () and len(set(every)) == len(every) == 2 ** len(axes or ())
    of_samples = [mirrorings_of_sample(i, samples, every) for i in range(samples)]
    assert sum(map(len, of_samples)) == max(samples, len(every))
    assert set(itertools.chain(*of_samples)) == set(every)
    if samples >= len(every):
        assert {len(own) for own in of_samples} == {1}


def probabilities_like(rng, samples, regions, shape=(3, 4, 5, 6)):
    """(n, C, Z, Y, X) random probabilities; classes sum to one."""
    p = rng.random((samples, *shape)) ** 3
    return p if regions else p / p.sum(1, keepdims=True)


def spread_of(p, regions, folds=1):
    """`Spread` of (n, C, Z, Y, X), whose samples are dealt out to the folds in turn."""
    spread = Spread(p.shape[1:], len(p), folds, regions, CPU)
    for fold in range(folds):
        for sample in range(fold, len(p), folds):
            values = torch.as_tensor(p[sample], dtype=torch.float32)
            spread.add(sample, slice(0, p.shape[2]), values, hard_mask(values.logit() if regions else values, regions))
        spread.finish_fold(len(range(fold, len(p), folds)))
    return spread


def brute_force(p, regions, folds):
    """The maps of stacked samples (n, C, Z, Y, X), by the textbook."""
    def entropy(q):
        with np.errstate(divide='ignore', invalid='ignore'):
            terms = [-np.where(r > 0, r * np.log(r), 0) for r in ([q, 1 - q] if regions else [q])]
        of_channels = sum(terms)
        return of_channels.mean(-4) / np.log(2) if regions else of_channels.sum(-4) / np.log(p.shape[1])
    over_channels = np.mean if regions else np.sum
    maps = {'uncertainty': entropy(p.mean(0)), 'variance': over_channels(p.var(0), 0),
            'mutual_information': entropy(p.mean(0)) - entropy(p).mean(0)}
    if folds > 1:
        of_fold = [p[fold::folds] for fold in range(folds)]
        share = np.array([len(own) / len(p) for own in of_fold])[:, None, None, None]
        squares = np.stack([over_channels((own.mean(0) - p.mean(0)) ** 2, 0) for own in of_fold])
        maps['variance_between_folds'] = (share * squares).sum(0)
        within = (share * np.stack([over_channels(own.var(0), 0) for own in of_fold])).sum(0)
        np.testing.assert_allclose(maps['variance_between_folds'] + within, maps['variance'])
        if len(p) > folds:
            chance = within * (folds - 1) / (len(p) - folds)
            maps['variance_between_folds'] = np.maximum(maps['variance_between_folds'] - chance, 0)
    return maps


def brute_force_pairs(p, channel, regions):
    """Sum of intersections and of half the sizes over all pairs, and the Dice of every pair."""
    hard = p[:, channel] > 0.5 if regions else p.argmax(1) == channel
    pairs = list(itertools.combinations(hard, 2))
    intersections = [2 * (a & b).sum() for a, b in pairs]
    sizes = [a.sum() + b.sum() for a, b in pairs]
    return sum(intersections) / sum(sizes), [i / s for i, s in zip(intersections, sizes, strict=True) if s]


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
@pytest.mark.parametrize(('samples', 'folds'), [(2, 1), (7, 1), (7, 2), (6, 3), (3, 3)])
def test_running_sums_say_what_stacked_samples_do(regions, samples, folds):
    p = probabilities_like(np.random.default_rng(samples + folds), samples, regions)
    spread = spread_of(p, regions, folds)
    np.testing.assert_allclose(spread.mean.numpy(), p.mean(0), atol=1e-6)
    maps, expected = spread.maps(), brute_force(p, regions, folds)
    assert maps.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(maps[name].numpy(), values, atol=3e-6, err_msg=name)
        assert maps[name].dtype == torch.float32
    for channel in range(p.shape[1]):
        assert spread.pairwise_dice(channel) == pytest.approx(brute_force_pairs(p, channel, regions)[0], abs=1e-12)

    box = (slice(1, 3), slice(0, 4), slice(2, 6))
    spread.crop(box)
    for name, values in expected.items():
        np.testing.assert_allclose(spread.maps()[name].numpy(), values[box], atol=3e-6, err_msg=name)


@pytest.mark.parametrize('samples', [2, 4])  # fewer and more than channels
@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
def test_masks_are_counted_as_drawn_with_the_thresholds_of_their_part(regions, samples):
    rng = np.random.default_rng(2)
    p = torch.from_numpy(probabilities_like(rng, 1, regions)[0]).float()
    index = torch.from_numpy(rng.integers(0, 3, p.shape[1:]).astype(np.int32))
    shifts = torch.from_numpy(rng.normal(0, 2, (3, 3))).float()
    spread = Spread(p.shape, samples, 1, regions, CPU)
    mask = hard_mask(drawn_logits(p, regions, shifts, index), regions)
    for number, z in itertools.product(range(samples), (slice(0, 1), slice(1, 4))):
        spread.add(number, z, p[:, z], mask[:, z] if regions else mask[z])
    counts = torch.cat([spread.count_at(z) for z in (slice(0, 3), slice(3, 4))], 1)
    logits = p.logit() if regions else p.log()
    for part in range(3):
        shifted = logits + shifts[:, part, None, None, None]
        expected = shifted > 0 if regions else shifted == shifted.amax(0)
        assert torch.equal(counts[:, index == part], samples * expected[:, index == part].to(counts.dtype))
    whole = drawn_mask(p, regions, shifts[:, :1])
    assert (counts != samples * whole).any()
    torch.testing.assert_close(spread.mean, p)  # which the draws leave alone


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
def test_identical_samples_have_no_spread(regions):
    p = probabilities_like(np.random.default_rng(0), 1, regions).repeat(5, 0)
    spread = spread_of(p, regions)
    maps = spread.maps()
    assert maps['mutual_information'].max() < 1e-6 and maps['variance'].max() < 1e-6
    assert maps['uncertainty'].max() > 0.1
    assert spread.pairwise_dice(1) == 1
    hard = spread_of((p > 0.5).astype(float) if regions else np.eye(3)[p.argmax(1)].transpose(0, 4, 1, 2, 3), regions)
    assert all(values.max() < 1e-6 for values in hard.maps().values())


def test_uniform_probabilities_are_wholly_uncertain_and_opposite_samples_disagree_by_one_bit():
    for regions, value in ((False, 1 / 3), (True, 0.5)):
        maps = spread_of(np.full((4, 3, 2, 2, 2), value), regions).maps()
        torch.testing.assert_close(maps['uncertainty'], torch.ones(2, 2, 2))
        assert maps['mutual_information'].max() < 1e-6
    for classes in (2, 3, 5):
        opposite = np.zeros((2, classes, 1, 1, 1))
        opposite[0, 0], opposite[1, 1] = 1, 1
        maps = spread_of(opposite, False).maps()
        assert maps['mutual_information'].item() == pytest.approx(math.log(2) / math.log(classes), abs=1e-6)
        assert maps['uncertainty'].item() == pytest.approx(math.log(2) / math.log(classes), abs=1e-6)
        assert maps['variance'].item() == pytest.approx(0.5)  # 1/4 for each of two classes
    two_regions = np.zeros((2, 2, 1, 1, 1))
    two_regions[1, 0] = 1  # the samples disagree on one region of two
    assert spread_of(two_regions, True).maps()['mutual_information'].item() == pytest.approx(0.5, abs=1e-6)


def test_pairwise_dice_is_the_mean_of_the_pairs_where_sizes_agree():
    hard = np.zeros((4, 2, 1, 1, 20))
    for i in range(4):
        hard[i, 1, 0, 0, 2 * i:2 * i + 9] = 1
    hard[:, 0] = 1 - hard[:, 1]
    ratio, dices = brute_force_pairs(hard, 1, False)
    spread = spread_of(hard, False)
    assert spread.pairwise_dice(1) == pytest.approx(np.mean(dices)) == pytest.approx(ratio)
    assert 0 < spread.pairwise_dice(1) < 1
    # disjoint: 0; nowhere, or nothing to compare with: not known
    disjoint = np.stack([np.eye(3)[[1, 0]], np.eye(3)[[0, 1]]]).transpose(0, 2, 1)[:, :, None, None]
    assert spread_of(disjoint, False).pairwise_dice(1) == 0
    assert spread_of(disjoint, False).pairwise_dice(2) is None
    assert spread_of(hard[:1], False).pairwise_dice(1) is None


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
def test_the_estimated_dice_is_the_expected_overlap_over_the_expected_sizes_of_truths_that_follow_the_probabilities(
        regions):
    rng = np.random.default_rng(5)
    p = probabilities_like(rng, 1, regions, (3, 10, 20, 20)).repeat(2, 0)
    logits = rng.standard_normal(p.shape[1:]).astype(np.float32)
    estimates = spread_of(p, regions).estimated_dice(torch.from_numpy(logits))
    for channel, estimate in enumerate(estimates):
        mask = logits[channel] > 0 if regions else logits.argmax(0) == channel
        truths = rng.random((400, *mask.shape)) < p[0, channel]
        dices = 2 * (truths & mask).sum((1, 2, 3)) / (mask.sum() + truths.sum((1, 2, 3)))
        assert estimate == pytest.approx(dices.mean(), abs=4 * dices.std() / 20), channel


def test_no_dice_is_estimated_of_a_label_that_neither_mask_nor_samples_have():
    p = np.zeros((2, 3, 1, 2, 2))
    p[:, 0], p[:, 1], p[:, 2] = 0.9, 0.1, 0
    nothing, all_of_1 = (torch.tensor(of).reshape(3, 1, 1, 1).expand(3, 1, 2, 2) for of in ([1.0, 0, 0], [0, 1.0, 0]))
    assert spread_of(p, False).estimated_dice(nothing)[1:] == [None, None]
    assert spread_of(p, False).estimated_dice(all_of_1)[1] == pytest.approx(2 * 0.4 / (4 + 0.4))
    p[0, 0], p[0, 1] = 0.4, 0.6
    assert spread_of(p, False).estimated_dice(nothing)[1] == 0


@pytest.mark.parametrize('samples', [8, 10, 11])
def test_a_region_on_which_all_agree_hides_no_disagreement_on_another(samples):
    """Ten tenths of one are a little more than one in single precision."""
    spread = Spread((2, 1, 1, 2), samples, 1, True, CPU)
    for i in range(samples):
        p = torch.ones(2, 1, 1, 2)
        p[1, ..., 0] = float(i % 2)
        spread.add(i, slice(0, 1), p, p > 0.5)
    maps = spread.maps()
    share = (samples // 2) / samples
    expected = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 2  # mean over the two regions
    for name in ('uncertainty', 'mutual_information'):
        assert maps[name].flatten().tolist() == pytest.approx([expected, 0], abs=1e-5)


def test_300_samples_are_counted_without_overflow():
    p = np.zeros((300, 2, 1, 1, 2))
    p[:, 1, ..., 0] = 1
    p[:150, 1, ..., 1] = 1
    p[:, 0] = 1 - p[:, 1]
    assert spread_of(p, False).pairwise_dice(1) == pytest.approx(brute_force_pairs(p, 1, False)[0], abs=1e-12)


def test_the_share_of_uncertain_voxels_by_hand():
    # possible (over 10 %): 0.3, 0.95, 0.5, 0.85; of them uncertain (not over 90 %): 0.3, 0.5, 0.85
    lesion = np.array([0.05, 0.3, 0.95, 0.5, 0.0, 0.85])
    p = np.stack([1 - lesion, lesion])[None, :, None, None].repeat(2, 0)
    spread = spread_of(p, False)
    assert spread.uncertain_share([1]) == pytest.approx(3 / 4)
    assert spread_of(np.stack([np.ones(6), np.zeros(6)])[None, :, None, None], False).uncertain_share([1]) == 0
    two = np.stack([lesion, np.array([0.0, 0.0, 0.5, 0.0, 0.95, 0.0])])[None, :, None, None]
    assert spread_of(two, True).uncertain_share([0, 1]) == pytest.approx(4 / 5)  # the third now, of five possible


@pytest.mark.parametrize('folds', [1, 3])
def test_memory_does_not_grow_with_the_number_of_samples(folds):
    shape = (4, 6, 5, 7)
    voxels = math.prod(shape[1:])

    def bytes_a_voxel(samples):
        spread = spread_of(np.full((samples, *shape), 0.25), False, folds)
        return sum(t.nbytes for t in vars(spread).values() if isinstance(t, torch.Tensor)) / voxels
    documented = 4 * 4 + 12 + (4 * 4 if folds > 1 else 0)
    assert [bytes_a_voxel(n) for n in (3, 4, 255)] == [documented + 3, documented + 4, documented + 4]
    assert bytes_a_voxel(256) == documented + 8


def test_volumes_of_samples_by_hand():
    ml = np.array([5.0, 10, 15, 30])
    row = sample_volumes(ml, [0, 1, 0, 1])
    assert row['volume_ml_mean'] == 15
    assert row['volume_ml_sd'] == pytest.approx(math.sqrt((100 + 25 + 0 + 225) / 3))
    assert (row['samples_low_ml'], row['samples_high_ml']) == (5, 30)
    within = (np.var(ml[::2], ddof=1) + np.var(ml[1::2], ddof=1)) / 2
    assert row['volume_ml_sd_between_folds'] == 0 and np.var([10, 20], ddof=1) < within / 2  # no more than by chance
    assert row['volume_ml_sd_within_folds'] == pytest.approx(math.sqrt(within))
    apart = sample_volumes(ml + np.array([0, 40, 0, 40]), [0, 1, 0, 1])
    assert apart['volume_ml_sd_between_folds'] == pytest.approx(math.sqrt(np.var([10, 60], ddof=1) - within / 2))

    assert sample_volumes(np.array([5.0]), [0]) == {'volume_ml_mean': 5, 'volume_ml_sd': None, 'samples_low_ml': None,
                                                    'samples_high_ml': None}
    assert 'volume_ml_sd_between_folds' not in sample_volumes(np.array([1.0, 2]), [0, 0])
    one_each = sample_volumes(np.array([10.0, 20]), [0, 1])
    assert one_each['volume_ml_sd_between_folds'] is None
    assert one_each['volume_ml_sd_within_folds'] is None


@pytest.mark.parametrize('regions', [False, True])
def test_models_that_are_alike_have_no_variance_between_them(regions):
    """Five of two samples each, from one distribution: nearly half of the plain decomposition would be between them."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet((1, 1), (10, 400)).transpose(0, 2, 1).reshape(10, 2, 1, 20, 20)
    maps = spread_of(p, regions, 5).maps()
    share = float(maps['variance_between_folds'].mean() / maps['variance'].mean())
    assert share < 0.2  # clipped at 0, voxel by voxel
    volumes = [sample_volumes(rng.normal(10, 1, 10), np.repeat(range(5), 2)) for _ in range(200)]
    between = np.mean([row['volume_ml_sd_between_folds'] ** 2 for row in volumes])
    assert between < 0.2 * np.mean([row['volume_ml_sd'] ** 2 for row in volumes])


def test_a_mean_is_over_the_labels_that_are_there():
    assert mean_of_known([0.5, None, 1.0]) == 0.75
    assert mean_of_known([None, None]) is None
    assert mean_of_known([]) is None


def a_row(folder, number, folds=1):
    mask = folder / f'case_{number:03d}.nii.gz'
    mask.write_bytes(b'a mask')
    settings = [{'start': 0.6, 'steps': 1 + fold, 'samples_from': 'chain'}
                for fold in range(folds)]
    return {'case': f'case_{number:03d}', 'estimated_dice': None, 'uncertain_share': 0.25, 'num_samples': 2,
            'settings': settings, 'network_calls': {'stock': 8, 'denoiser': number},
            'seconds': 1.5, 'versions': {'torch': '2'}, 'mask': identity(mask),
            'labels': {name: {'volume_ml': number + 0.5, 'pairwise_dice': None} for name in ('organ', 'a, b')}}


def write_some(folder, start):
    for number in range(start, 40, 4):
        write_row(folder / 'pdddpm_cases', a_row(folder, number))
        write_summary(folder)


def test_four_processes_share_one_summary(tmp_path):
    context = get_context('fork')
    processes = [context.Process(target=write_some, args=(tmp_path, start)) for start in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(file.name for file in tmp_path.iterdir() if file.suffix != '.gz') == [
        'pdddpm_cases', 'pdddpm_summary.csv', 'pdddpm_summary.json']
    assert len(list((tmp_path / 'pdddpm_cases').iterdir())) == 40
    assert json.loads((tmp_path / 'pdddpm_summary.json').read_text()) == {
        'cases': [a_row(tmp_path, i) for i in range(40)]}
    lines = list(csv.DictReader((tmp_path / 'pdddpm_summary.csv').open(newline='')))
    assert [(line['case'], line['label']) for line in lines] == [(f'case_{i:03d}', name) for i in range(40)
                                                                 for name in ('organ', 'a, b')]
    assert [float(line['volume_ml']) for line in lines[::2]] == [i + 0.5 for i in range(40)]
    assert {line['pairwise_dice'] for line in lines} == {''}


def test_settings_that_differ_between_folds_are_both_told(tmp_path):
    write_row(tmp_path / 'pdddpm_cases', a_row(tmp_path, 0, folds=2))
    write_summary(tmp_path)
    line = next(csv.DictReader((tmp_path / 'pdddpm_summary.csv').open(newline='')))
    assert (line['start'], line['steps'], line['samples_from']) == ('0.6', '1/2', 'chain')
    assert line['calls_stock'] == '8' and line['case_seconds'] == '1.5'
