"""Refinement around unsure voxels only, and tiles in batches: what is refined, what stays, and that nothing is lost."""
from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REFINED, Workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_pdddpm.commands.predict import main_modelfolder
from nnunet_pdddpm.demo.phantom import make_case
from nnunet_pdddpm.inference import volume
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.inference.tiling import tiles_around, unsure_voxels
from nnunet_pdddpm.inference.volume_predictor import PredictionError

CPU = torch.device('cpu')
SETTINGS = {'samples': 2, 'start': 0.9, 'steps': 2, 'mask_blind': 0}  # the mask is the samples' mean


def sliding_window(patch_size):
    """nnU-Net's tiles for a patch size: a function of the volume's shape."""
    predictor = nnUNetPredictor(device=CPU)
    predictor.configuration_manager = SimpleNamespace(patch_size=patch_size)
    return predictor._internal_get_sliding_window_slicers


def image():
    return torch.from_numpy(make_case((36, 44, 40), 3)[0])[None].float()


@pytest.fixture(scope='module')
def open_predictor(refined: Workspace):
    def opened(**kwargs) -> PDDDPMPredictor:
        predictor = PDDDPMPredictor(use_mirroring=False, device=CPU, allow_tqdm=False, overrides=SETTINGS, **kwargs)
        predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
        return predictor
    return opened


def test_a_voxel_is_unsure_where_no_label_reaches_the_probability():
    p = torch.tensor([[0.98, 0.6, 0.01], [0.01, 0.3, 0.985], [0.01, 0.1, 0.005]]).reshape(3, 1, 1, 3)
    assert unsure_voxels(p.log(), False, 0.97).flatten().tolist() == [False, True, False]
    assert unsure_voxels(p.log(), False, 0.983).flatten().tolist() == [True, True, False]
    assert unsure_voxels(p.log(), False, 1).all()
    q = torch.tensor([[0.98, 0.999, 0.02], [0.5, 0.001, 0.01]]).reshape(2, 1, 1, 3)  # two regions
    assert unsure_voxels(q.logit(), True, 0.97).flatten().tolist() == [True, False, False]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.booleans())
def test_every_unsure_voxel_is_refined_by_no_more_tiles_than_nnunet_has(data, slices):
    patch = data.draw(st.tuples(*[st.integers(1, 8)] * (2 if slices else 3)))
    shape = tuple(max(n, p) for n, p in zip(data.draw(st.tuples(*[st.integers(1, 24)] * 3)),
                                            ((1,) if slices else ()) + patch, strict=True))
    points = data.draw(st.lists(st.tuples(*[st.integers(0, n - 1) for n in shape]), max_size=4))
    unsure = torch.zeros(shape, dtype=torch.bool)
    for point in points:
        unsure[point] = True
    tile = sliding_window(patch)
    tiles, covered = tiles_around(unsure, patch, tile), torch.zeros(shape, dtype=torch.bool)
    assert len(tiles) <= len(tile(shape))
    for one in tiles:
        assert unsure[one[1:]].any() and unsure[one[1:]].shape == torch.Size(patch)
        covered[one[1:]] = True
    assert not (unsure & ~covered).any()
    assert bool(tiles) == bool(points)


def test_a_lesion_in_a_large_volume_lies_in_the_middle_of_a_few_tiles():
    unsure = torch.zeros(200, 300, 300, dtype=torch.bool)
    unsure[90:110, 40:52, 200:230] = True
    tile = sliding_window((64, 64, 64))
    tiles = tiles_around(unsure, (64, 64, 64), tile)
    assert len(tile(unsure.shape)) == 6 * 9 * 9 and len(tiles) == 1
    for index, (low, high) in zip(tiles[0][1:], ((90, 110), (40, 52), (200, 230)), strict=True):
        assert low - index.start >= 16 and index.stop - high >= 16


def test_sure_tiles_keep_the_stock_result_and_cost_no_call(open_predictor, monkeypatch):
    """A stock model that is sure of background but for one place, or everywhere."""
    def predicted(sure, unsure_at):
        predictor = open_predictor(sure=sure)
        logits = torch.zeros(3, *image().shape[1:])
        logits[0] = 8
        logits[:, unsure_at] = torch.tensor([0.5, 0.4, 0.3])[:, None]
        monkeypatch.setattr(predictor, 'predict_sliding_window_return_logits', lambda image: logits.half())
        temperature = predictor.fold_settings[0].temperature
        assert temperature > 1
        return predictor.predict_volume(image()), torch.softmax(logits.half().float() / temperature, 0)
    place = torch.zeros(image().shape[1:], dtype=torch.bool)
    place[16:19, 20:23, 30:33] = True
    whole, stock = predicted(1.0, place)
    partial, _ = predicted(0.999, place)
    none, sure_stock = predicted(0.999, torch.zeros_like(place))
    assert whole.refined_tiles == 1 and none.refined_tiles == 0
    assert partial.refined_tiles == 1 / 48 and partial.network_calls['denoiser'] == 2 * 2  # samples x steps
    assert whole.network_calls['denoiser'] == 48 * 2 * 2 and none.network_calls['denoiser'] == 0
    kept = (partial.spread.mean - stock).abs().amax(0) < 1e-3
    assert kept.sum() >= kept.numel() - 16 * 24 * 16 and not kept[place].any()
    torch.testing.assert_close(none.spread.mean, sure_stock, atol=1e-6, rtol=0)
    assert (whole.spread.mean - stock).abs().amax(0).gt(1e-3).float().mean() > 0.5
    assert (partial.spread.mean.sum(0) - 1).abs().max() < 1e-5


def test_the_blind_mask_is_that_of_the_whole_volume_whatever_the_stock_model_is_sure_of(open_predictor, monkeypatch):
    predictor = open_predictor()
    predictor.fold_settings = [replace(of_fold, mask_blind=1) for of_fold in predictor.fold_settings]
    whole = predictor.predict_volume(image())
    predictor.sure = 0.999
    monkeypatch.setattr(volume, 'unsure_voxels', lambda logits, regions, sure: torch.zeros(logits.shape[1:]) > 0)
    partial = predictor.predict_volume(image())
    assert (whole.refined_tiles, partial.refined_tiles) == (1, 0)
    assert whole.network_calls['denoiser'] == 48 * (1 + 2 * 2) and partial.network_calls['denoiser'] == 48
    assert torch.equal(whole.logits, partial.logits)


def test_the_summary_tells_the_share_of_refined_tiles_and_a_wrong_setting_is_refused(refined, tmp_path, capsys):
    def run(sure, name):
        main_modelfolder(['-i', str(refined.raw / 'imagesTs'), '-o', str(tmp_path / name), '-m',
                          str(refined.model(REFINED)), '-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0',
                          '--disable_tta', '-samples', '1', '-sure', sure, '--disable_progress_bar'])
        return json.loads((tmp_path / name / 'pdddpm_summary.json').read_text())['cases']
    for row in run('0.9', 'some'):
        assert 0 <= row['refined_tiles'] <= 1 and row['settings'][0]['sure'] == 0.9
    assert 'case_refined_tiles' in (tmp_path / 'some' / 'pdddpm_summary.csv').read_text()
    with pytest.raises(SystemExit, match='sure=0.4 is out of range'):
        run('0.4', 'wrong')
    assert not (tmp_path / 'wrong').exists()


def test_tiles_in_batches_give_the_same_and_too_large_batches_are_halved_once(open_predictor, monkeypatch, capsys):
    """The sums are rounded differently: float32 (bfloat16 on CPUs that have it), then nnU-Net's half precision."""
    single, batched = open_predictor(), open_predictor()
    single.bfloat16 = batched.bfloat16 = False
    batched.tile_batch = 8
    denoise, sizes = batched.refiner.denoise, []

    def limited(image, *args):
        sizes.append(len(image))
        if len(image) > 3:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return denoise(image, *args)
    monkeypatch.setattr(batched.refiner, 'denoise', limited)
    alone, together = single.predict_volume(image()), batched.predict_volume(image())
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2
    assert capsys.readouterr().out.count('from now on ') == 2
    assert alone.network_calls == together.network_calls
    difference = torch.softmax(alone.logits.float(), 0) - torch.softmax(together.logits.float(), 0)
    assert difference.abs().max() < 1e-3


def test_a_single_tile_that_does_not_fit_is_the_callers_error(open_predictor, monkeypatch):
    predictor = open_predictor()

    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(predictor.refiner, 'denoise', full)
    with pytest.raises(torch.OutOfMemoryError):
        predictor.predict_volume(image())


def test_the_setting_has_a_range():
    with pytest.raises(PredictionError, match='sure=0.5 is out of range: it must lie above 0.5'):
        PDDDPMPredictor(sure=0.5, device=CPU)
