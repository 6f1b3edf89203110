"""Tiles go through the denoiser in batches: the result is the same, and a batch too large for the memory is halved."""
from __future__ import annotations

import pytest
import torch
from conftest import REFINED, Workspace

from nnunet_pdddpm.demo.phantom import make_case
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor

CPU = torch.device('cpu')
SETTINGS = {'samples': 2, 'start': 0.9, 'steps': 2, 'mask_blind': 0}  # the mask is the samples' mean


def image():
    return torch.from_numpy(make_case((36, 44, 40), 3)[0])[None].float()


@pytest.fixture(scope='module')
def open_predictor(refined: Workspace):
    def opened() -> PDDDPMPredictor:
        predictor = PDDDPMPredictor(use_mirroring=False, device=CPU, allow_tqdm=False, overrides=SETTINGS)
        predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
        return predictor
    return opened


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory'),
    RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`'),
    RuntimeError('FIND was unable to find an engine to execute this computation')], ids=['torch', 'cuBLAS', 'cuDNN'])
def test_tiles_in_batches_give_the_same_and_too_large_batches_are_halved_once(open_predictor, monkeypatch, caplog,
                                                                              error):
    """The sums are rounded differently: float32 (bfloat16 on CPUs that have it), then nnU-Net's half precision."""
    single, batched = open_predictor(), open_predictor()
    single.bfloat16 = batched.bfloat16 = False
    batched.tile_batch = 8
    denoise, sizes = batched.refiner.denoise, []

    def limited(image, *args):
        sizes.append(len(image))
        if len(image) > 3:
            raise error
        return denoise(image, *args)
    monkeypatch.setattr(batched.refiner, 'denoise', limited)
    alone, together = single.predict_volume(image()), batched.predict_volume(image())
    assert sizes[:3] == [8, 4, 2] and max(sizes[3:]) == 2
    assert caplog.text.count('from now on ') == 2
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
