"""The same image gives the same files: alone or among others, in parts, with any number of threads.

In background processes, too: see test_bad_input.py and test_pdddpm_predict.py.
"""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID, PLANS, REFINED, Workspace
from tiny_refiner import make_refiner, patch

from nnunet_pdddpm.commands.predict import main
from nnunet_pdddpm.demo.phantom import make_case
from nnunet_pdddpm.inference import volume_predictor
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.network.settings import SamplingSettings


def predict(source: Path, output: Path, *flags: str) -> dict[str, bytes]:
    """The command in this process; every image it writes."""
    main(['-i', str(source), '-o', str(output), '-d', str(DATASET_ID), '-c', '3d_fullres', '-tr', REFINED, '-p', PLANS,
          '-f', '0', '-device', 'cpu', '--disable_progress_bar', '--disable_tta', '-step_size', '1', '-samples', '3',
          '--save_samples', '--uncertainty', 'all', '-npp', '0', '-nps', '0', *flags])
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob('*.nii.gz')}


@pytest.fixture(scope='module')
def source(refined: Workspace, tmp_path_factory) -> Path:
    """Four images under names that order them differently from their contents."""
    folder = tmp_path_factory.mktemp('images')
    files = sorted((refined.raw / 'imagesTr').iterdir())[:3] + sorted((refined.raw / 'imagesTs').iterdir())[:1]
    for name, file in zip('dbca', files, strict=True):
        shutil.copy(file, folder / f'{name}_0000.nii.gz')
    return folder


def test_alone_among_others_and_in_parts(source, tmp_path):
    together = predict(source, tmp_path / 'together')
    assert len(together) == 4 * (1 + 3 + 5)
    for part in ('2', '0', '1'):
        parts = predict(source, tmp_path / 'parts', '-num_parts', '3', '-part_id', part)
    assert parts == together
    alone = tmp_path / 'one'
    alone.mkdir()
    shutil.copy(source / 'c_0000.nii.gz', alone)
    assert predict(alone, tmp_path / 'alone') == {name: content for name, content in together.items()
                                                  if Path(name).name.startswith('c')}


def test_an_earlier_prediction_in_the_same_process_changes_nothing(refined, source):
    predictor = PDDDPMPredictor(tile_step_size=1, use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0, 1))
    image = torch.from_numpy(make_case((20, 26, 22), 3)[0])[None].float()
    first = predictor.predict_volume(image)
    predictor.predict_volume(torch.randn(1, 18, 30, 16))
    torch.manual_seed(5)
    again = predictor.predict_volume(image)
    assert torch.equal(first.logits, again.logits) and torch.equal(first.presegmentation, again.presegmentation)


def test_the_number_of_threads_changes_less_than_1e_3_of_the_probabilities(refined, monkeypatch):
    """Sums are split differently among threads: float32 rounding, then the half precision of nnU-Net's logits."""
    monkeypatch.setattr(volume_predictor, 'default_num_processes', os.cpu_count())
    predictor = PDDDPMPredictor(tile_step_size=1, use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
    image = torch.from_numpy(make_case((20, 26, 22), 3)[0])[None].float()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(torch.softmax(predictor.predict_volume(image).logits.float(), 0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[3])
    for other in results[1:3]:
        assert (other - results[0]).abs().max() < 1e-3
        assert (other.argmax(0) != results[0].argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize('settings', [
    SamplingSettings(), SamplingSettings(mask_blind=0, mask_samples=2, steps=2),
    SamplingSettings(mask_stock=0.3, mask_blind=0.3, start=1, start_mask='hard', redraw=0, steps=3)])
def test_an_image_in_a_batch_is_segmented_as_it_is_alone(settings):
    refiner, images = make_refiner(settings=settings), patch(('PlainConvUNet', 2, True), batch=3)
    with torch.no_grad():
        batch = refiner(images)
        for i in range(3):
            torch.testing.assert_close(refiner(images[i:i + 1])[0], batch[i], rtol=1e-4, atol=1e-4)
