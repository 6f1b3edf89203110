"""The flags of nnUNetv2_train and nnU-Net's switches, by the command's own entry point."""
from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, DATASET, DATASET_ID, PLANS, STOCK, in_this_process, make_trainer, train_in_process
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch._dynamo import OptimizedModule

FULLRES = '3d_fullres'


@pytest.fixture
def fold(scratch_results) -> Path:
    """Folder of fold 0 of the refined model; the stock models are there."""
    return scratch_results / DATASET / f'{BRIEF}__{PLANS}__{FULLRES}' / 'fold_0'


@pytest.fixture(scope='module')
def stock_on_all(stock, tmp_path_factory) -> Path:
    """Folder of a stock model that was trained on every case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('nnUNet_results', str(tmp_path_factory.mktemp('all')))
        trainer = make_trainer(STOCK, 'all')
        trainer.run_training()
    return Path(trainer.output_folder)


def log_of(fold: Path) -> str:
    return '\n'.join(file.read_text() for file in sorted(fold.glob('training_log*')))


def test_npz_val_and_val_best(fold):
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '--npz')
    masks = sorted((fold / 'validation').glob('*.nii.gz'))
    assert len(masks) == 3
    for mask in masks:
        probabilities = np.load(str(mask).replace('.nii.gz', '.npz'))['probabilities']
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-2)

    # a best checkpoint that is the stock model is told from the final one
    best = torch.load(fold / 'checkpoint_best.pth', weights_only=False)
    best['network_weights']['setting_mask_stock'].fill_(1)
    best['network_weights']['setting_mask_blind'].fill_(0)
    torch.save(best, fold / 'checkpoint_best.pth')
    final = {mask.name: mask.read_bytes() for mask in masks}
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '--val', '--val_best')
    of_best = {mask.name: mask.read_bytes() for mask in masks}
    stock = make_trainer(STOCK, 0)
    stock.load_checkpoint(str(Path(stock.output_folder) / 'checkpoint_final.pth'))
    with in_this_process():
        stock.perform_actual_validation()
    expected = {mask.name: (Path(stock.output_folder) / 'validation' / mask.name).read_bytes() for mask in masks}
    assert of_best == expected != final
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '--val')
    assert {mask.name: mask.read_bytes() for mask in masks} == final


def test_continuing_a_training_whose_validation_had_too_little_memory_only_validates(fold, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError('CUDA out of memory')
    with monkeypatch.context() as patch:
        patch.setattr(nnUNetPredictor, 'predict_sliding_window_return_logits', no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            train_in_process(DATASET_ID, FULLRES, 0, BRIEF)
    before = torch.load(fold / 'checkpoint_final.pth', weights_only=False)
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '--c')
    after = torch.load(fold / 'checkpoint_final.pth', weights_only=False)
    assert log_of(fold).count('Epoch 0') == 1 and (fold / 'validation' / 'summary.json').is_file()
    assert after['current_epoch'] == before['current_epoch'] == 1
    for name, value in before['network_weights'].items():
        assert torch.equal(value, after['network_weights'][name]) or name in ('calibration', 'quality'), name
    for measured in ('calibration', 'quality'):
        assert after['network_weights'][measured].any() and not before['network_weights'][measured].any()


def test_without_checkpointing_nothing_is_written_but_the_validation(fold):
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '--disable_checkpointing')
    assert list(fold.glob('*.pth*')) == []
    assert (fold / 'validation' / 'summary.json').is_file()


def test_without_checkpointing_an_earlier_checkpoint_stays_as_it_is(fold):
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF)
    before = (fold / 'checkpoint_final.pth').read_bytes()
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '--disable_checkpointing')
    assert (fold / 'checkpoint_final.pth').read_bytes() == before


def test_fold_all_refines_the_stock_model_of_fold_all_and_needs_no_other(scratch_results, fold, stock_on_all):
    model = scratch_results / DATASET / f'{STOCK}__{PLANS}__{FULLRES}'
    shutil.copytree(stock_on_all, model / 'fold_all')
    for i in range(3):
        shutil.rmtree(model / f'fold_{i}')
    train_in_process(DATASET_ID, FULLRES, 'all', BRIEF)
    of_all = fold.parent / 'fold_all'
    stock, refined = (torch.load(folder / 'fold_all' / 'checkpoint_final.pth', weights_only=False)['network_weights']
                      for folder in (model, fold.parent))
    for name, value in stock.items():
        assert torch.equal(refined[f'presegmenter.{name}'], value), name
    summary = json.loads((of_all / 'validation' / 'summary.json').read_text())
    assert len(summary['metric_per_case']) == 9


def test_pretrained_weights_of_a_stock_model_are_refused_and_the_right_way_is_named(scratch_results, fold, capsys):
    file = scratch_results / DATASET / f'{STOCK}__{PLANS}__{FULLRES}' / 'fold_0' / 'checkpoint_final.pth'
    with pytest.raises(AssertionError, match='is missing in the pretrained model weights'):
        train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '-pretrained_weights', str(file))
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f'Pre-segmenter: {file} (another stock model is named by nnUNet_pdddpm_presegmenter; -pretrained_weights ' \
           f'is for the denoiser and takes a PDDDPM model with as many labels)' in last_line
    assert list(fold.glob('*.pth')) == []


def test_pretrained_weights_of_a_refined_model_are_trained_on(scratch_results, fold):
    train_in_process(DATASET_ID, FULLRES, 1, BRIEF)
    file = fold.parent / 'fold_1' / 'checkpoint_final.pth'
    train_in_process(DATASET_ID, FULLRES, 0, BRIEF, '-pretrained_weights', str(file))
    checkpoint, other = (torch.load(f, weights_only=False) for f in (fold / 'checkpoint_final.pth', file))
    key = 'denoiser.unet.encoder.stages.0.0.convs.0.conv.mask_conv.weight'  # zero at a warm start
    start, end = other['network_weights'][key], checkpoint['network_weights'][key]
    three_steps = 3 * make_trainer(BRIEF, 0).initial_lr  # of AdamW
    assert start.abs().max() > 0 and not torch.equal(end, start)
    torch.testing.assert_close(end, start, rtol=0, atol=three_steps)
    assert checkpoint['network_weights']['level_count'].sum() == other['network_weights']['level_count'].sum() > 0


@pytest.mark.skipif(torch.__version__ < '2.10',
                    reason='torch before 2.10 compiles code for a CPU that writes beyond a buffer')
def test_compiled_training_is_the_training(scratch_results, monkeypatch):
    """nnU-Net never compiles on the CPU; here it is told to."""
    losses, weights = [], []
    for compiled in (False, True):
        trainer = make_trainer(BRIEF, 0)
        monkeypatch.setattr(type(trainer), '_do_i_compile', lambda self, compiled=compiled: compiled)
        trainer.run_training()
        assert isinstance(trainer.network, OptimizedModule) == compiled
        losses.append([trainer.logger.get_value(key, -1) for key in ('train_losses', 'val_losses')])
        weights.append(torch.load(Path(trainer.output_folder) / 'checkpoint_final.pth', weights_only=False)
                       ['network_weights'])
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=trainer.initial_lr, msg=name)


@pytest.mark.parametrize('value', ['true', 'false'])
def test_the_compile_switch_is_nnunet_s(scratch_results, monkeypatch, value):
    monkeypatch.setenv('nnUNet_compile', value)
    trainer = make_trainer(BRIEF, 0)
    trainer.initialize()
    log = Path(trainer.log_file).read_text()
    assert ('torch.compile disabled because device is CPU' in log) == (value == 'true')
    trainer.device = torch.device('cuda', 0)  # what it would do there
    assert trainer._do_i_compile() == (value == 'true')


def test_the_switch_of_weights_and_biases_is_nnunet_s(scratch_results, fold, monkeypatch):
    monkeypatch.setenv('nnUNet_wandb_enabled', '1')
    monkeypatch.setenv('nnUNet_wandb_mode', 'offline')
    if importlib.util.find_spec('wandb') is None:
        with pytest.raises(RuntimeError, match='W&B is not installed'):  # nnU-Net's own words
            make_trainer(BRIEF, 0)
        return
    trainer = make_trainer(BRIEF, 0)
    trainer.run_training()
    run = trainer.logger.loggers[0].run
    assert run.config['hparas']['initial_lr'] == trainer.initial_lr and run.summary['current_epoch'] == 0
    run.finish()
    assert list(fold.glob('wandb/offline-run-*/*.wandb'))
