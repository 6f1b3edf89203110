"""PDDDPMTrainer within nnU-Net's training."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from conftest import DATASET, DATASET_ID, PLANS, REFINED, STOCK, Workspace, make_trainer, succeed, train_in_process
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_pdddpm.diffusion.coding import harden, one_hot
from nnunet_pdddpm.diffusion.process import at_level
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.losses import DenoisingLoss


@pytest.fixture
def trainer(scratch_results):
    """An initialised trainer of fold 0 with its data loaders."""
    trainer = make_trainer(REFINED, 0)
    trainer.on_train_start()
    return trainer


def weights(model: Path, fold: int, name: str = 'checkpoint_final.pth') -> dict:
    return torch.load(model / f'fold_{fold}' / name, weights_only=False)


def test_training_leaves_what_nnunet_expects_and_logs_the_stock_dice(refined: Workspace):
    fold = refined.model(REFINED) / 'fold_0'
    for name in ('checkpoint_final.pth', 'checkpoint_best.pth', 'progress.png', 'validation/summary.json'):
        assert (fold / name).is_file(), name
    assert not list(fold.glob('*.partial'))
    log = (refined.model(REFINED) / 'console.txt').read_text()
    assert '6 of 6 training cases are pre-segmented by the stock model that held them out (folds [1, 2])' in log
    assert log.count('Stock pseudo dice on the same patches') == 2


def test_the_stock_model_is_embedded_frozen_and_unchanged(refined: Workspace):
    checkpoint, stock = weights(refined.model(REFINED), 0), weights(refined.model(STOCK), 0)
    for name, value in stock['network_weights'].items():
        torch.testing.assert_close(checkpoint['network_weights'][f'presegmenter.{name}'], value, rtol=0, atol=0)
    trainer = make_trainer(REFINED, 0)
    trainer.initialize()
    names = [name for name, _ in trainer.network.named_parameters()]
    moved = [names[i] for i in checkpoint['optimizer_state']['state']]
    assert moved and all(name.startswith('denoiser.') for name in moved)


def test_the_first_epoch_warms_up(trainer):
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    rates = []
    for trainer.current_epoch in (0, 1):
        trainer.lr_scheduler.step(trainer.current_epoch)
        rates.append(trainer.optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([5e-4 / 5, 5e-4 * 0.5 ** 0.9])


def test_before_the_first_iteration_the_refined_result_is_the_stock_result(trainer):
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        counts = trainer.validation_step(next(trainer.dataloader_val))
        trainer.on_validation_epoch_end([counts])
    for name in ('tp_hard', 'fp_hard', 'fn_hard'):
        np.testing.assert_array_equal(counts[name], counts[f'stock_{name}'])


def test_each_case_is_presegmented_by_the_fold_that_held_it_out(trainer):
    held_out_in = trainer.held_out_in
    assert set(held_out_in.values()) == {1, 2}
    image = torch.randn(2, 1, 16, 24, 16)
    keys = [next(case for case, fold in held_out_in.items() if fold == wanted) for wanted in (2, 1)]
    logits = trainer.presegment(image, keys)
    for i, fold in enumerate((2, 1)):
        expected = trainer.out_of_fold_presegmenters[str(fold)](image[i:i + 1])
        torch.testing.assert_close(logits[i:i + 1], expected, rtol=1e-4, atol=1e-4)
    in_fold = trainer.presegment(image, ['unknown', 'unknown'])
    torch.testing.assert_close(in_fold, trainer.refiner.presegmenter(image), rtol=1e-4, atol=1e-4)


def test_missing_stock_folds_are_named_once_and_their_cases_presegmented_in_fold(scratch_results):
    shutil.rmtree(scratch_results / DATASET / f'{STOCK}__{PLANS}__3d_fullres' / 'fold_2')
    trainer = make_trainer(REFINED, 0)
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text()
    assert '3 of 6 training cases are pre-segmented by the stock model that held them out (folds [1])' in log
    assert log.count('3 training cases are pre-segmented by a stock model that was trained on them') == 1
    assert 'stock folds not trained: [0, 2]' not in log and 'stock folds not trained: [2]' in log
    assert 'phantom_002, phantom_005, phantom_008' in log


@pytest.mark.parametrize('share', [0, 1, 0.5])
def test_noise_is_on_the_truth_and_level_0_is_the_presegmentation(trainer, share, monkeypatch):
    trainer.presegmentation_share = share
    presegment, levels = trainer.presegment, []
    if share == 0:  # then no time is spent on it
        monkeypatch.setattr(trainer, 'presegment', None)
    for _ in range(6):
        batch = next(trainer.dataloader_train)
        noisy, noise = trainer.make_noisy_batch(batch['data'], batch['target'][0], batch['keys'])
        x_pre = 2 * harden(presegment(batch['data'], batch['keys']), False) - 1
        x0 = 2 * one_hot(batch['target'][0], 3) - 1
        abar = trainer.refiner.abar
        for i, t in enumerate(noisy.t.tolist()):
            assert 0 <= t <= trainer.t_max
            expected = x_pre[i] if t == 0 else abar[t].sqrt() * x0[i] + (1 - abar[t]).sqrt() * noise[i]
            torch.testing.assert_close(noisy.noisy[i], expected.float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(trainer.denoising_loss.noisy, noisy.t > 0)
        levels += noisy.t.tolist()
    at_0 = sum(t == 0 for t in levels)
    assert at_0 == share * len(levels) if share in (0, 1) else 0 < at_0 < len(levels)


@pytest.mark.parametrize(('power', 'below_half'), [(0, 1 / 2), (2, 1 / 8)])  # the paper's trainer, the default
def test_levels_are_drawn_with_a_density_that_grows_as_their_power(trainer, power, below_half, monkeypatch):
    monkeypatch.setattr(trainer, 'level_power', power)
    monkeypatch.setattr(trainer, 't_max', 400)
    trainer.level_generator.manual_seed(0)
    levels = trainer.draw_levels(40_000)
    shown, noisy = levels == 0, levels[levels > 0]
    assert float(shown.float().mean()) == pytest.approx(trainer.presegmentation_share, abs=0.01)
    assert int(noisy.min()) >= 1 and int(noisy.max()) == 400
    assert float((noisy <= 200).float().mean()) == pytest.approx(below_half, abs=0.01)


@pytest.mark.parametrize('regions', [False, True])
@pytest.mark.parametrize('noisy', [[False, False], [True, True], [True, False, False]])
def test_a_dice_over_processes_is_that_of_the_items_without_noise(regions, noisy):
    """With several processes every item takes part in it, those with noise as nothing: the sums are the same."""
    kwargs = {'batch_dice': True, 'do_bg': regions, 'smooth': 1e-5, 'ddp': False}
    loss = DC_and_BCE_loss({}, kwargs) if regions \
        else DC_and_CE_loss(kwargs, {}, dice_class=MemoryEfficientSoftDiceLoss)
    both = []
    for over_processes in (False, True):
        torch.manual_seed(0)
        output = (3 * torch.randn(len(noisy), 3, 4, 5, 6)).requires_grad_()
        target = torch.randint(0, 2, (len(noisy), 3 if regions else 1, 4, 5, 6)).float()
        of = DenoisingLoss(loss)
        of.noisy, of.dice_over_processes = torch.tensor(noisy), over_processes
        value = of(output, target)
        value.backward()
        both.append((value.detach(), output.grad))
    torch.testing.assert_close(both[0], both[1])
    several = DC_and_CE_loss({**kwargs, 'ddp': True}, {}, dice_class=MemoryEfficientSoftDiceLoss)
    assert DenoisingLoss(several).dice_over_processes


@pytest.mark.parametrize('noisy', [[False, False], [True, True], [True, False]])
def test_at_noise_levels_the_loss_is_cross_entropy_and_at_level_0_nnunets_own(trainer, noisy):
    """By nnU-Net's own two terms, item by item: the Dice term of these plans is that of the single patch."""
    assert not trainer.full_resolution_loss.dc.batch_dice
    output, target = torch.randn(2, 3, 8, 8, 8), torch.randint(0, 3, (2, 1, 8, 8, 8)).float()
    trainer.denoising_loss.noisy = torch.tensor(noisy)
    expected = 0
    for i, is_noisy in enumerate(noisy):
        cross_entropy = torch.nn.functional.cross_entropy(output[i:i + 1], target[i:i + 1, 0].long())
        dice = trainer.full_resolution_loss.dc(output[i:i + 1], target[i:i + 1])
        expected = expected + (2 * cross_entropy if is_noisy else cross_entropy + dice) / 2
    torch.testing.assert_close(trainer.denoising_loss(output, target), expected)


def test_the_average_of_the_weights_is_saved_and_the_weights_themselves_are_kept(refined: Workspace):
    checkpoint = weights(refined.model(REFINED), 0)
    moved = checkpoint['optimizer_state']['denoiser_before_averaging']
    saved = {k.removeprefix('denoiser.'): v for k, v in checkpoint['network_weights'].items()
             if k.startswith('denoiser.')}
    assert saved.keys() == moved.keys()
    assert any(not torch.equal(saved[k], moved[k]) for k in saved)
    assert int(checkpoint['optimizer_state']['averaged_updates']) == 16


def test_killed_and_resumed_training_ends_where_the_uninterrupted_one_does(stock, tmp_path, scratch_results):
    torch.set_num_threads(os.cpu_count())  # as the command: sums are split among threads
    make_trainer(REFINED, 2).run_training()
    model = scratch_results / DATASET / f'{REFINED}__{PLANS}__3d_fullres'
    uninterrupted = weights(model, 2)
    shutil.move(model, tmp_path / 'uninterrupted')

    command = [str(Path(sys.executable).parent / 'nnUNetv2_train'), str(DATASET_ID), '3d_fullres', '2', '-tr', REFINED,
               '-p', PLANS, '-device', 'cpu']
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    latest = model / 'fold_2' / 'checkpoint_latest.pth'
    deadline = time.monotonic() + 120
    while not latest.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (model / 'fold_2' / 'checkpoint_final.pth').exists()

    log = succeed(*command, '--c')
    assert 'Epoch 1' in log and 'Epoch 0' not in log
    resumed = weights(model, 2)
    assert resumed['current_epoch'] == uninterrupted['current_epoch'] == 2
    for name, value in uninterrupted['network_weights'].items():
        torch.testing.assert_close(resumed['network_weights'][name], value, rtol=1e-4, atol=1e-5, msg=name)
    moved, expected = (c['optimizer_state']['denoiser_before_averaging'] for c in (resumed, uninterrupted))
    for name, value in expected.items():
        torch.testing.assert_close(moved[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_val_needs_no_stock_model_and_reproduces_the_validation(refined, scratch_results):
    shutil.rmtree(scratch_results / DATASET / f'{STOCK}__{PLANS}__3d_fullres')
    model = scratch_results / DATASET / refined.model(REFINED).name
    shutil.copytree(refined.model(REFINED), model)
    mask = Path('validation') / 'phantom_000.nii.gz'
    (model / 'fold_0' / mask).unlink()
    train_in_process(DATASET_ID, '3d_fullres', 0, REFINED, '--val')
    assert (model / 'fold_0' / mask).read_bytes() == (refined.model(REFINED) / 'fold_0' / mask).read_bytes()


def test_the_paper_s_trainer_predicts_the_noise_from_the_truth(scratch_results):
    trainer = make_trainer('PDDDPMTrainerTinyPaper', 0)
    assert trainer.sampling == SamplingSettings(t_start=300, steps=300, samples=5, eta=1.0)
    trainer.sampling = SamplingSettings(t_start=300, steps=3, samples=2, eta=1.0)
    trainer.num_epochs = 1
    trainer.run_training()
    batch = next(trainer.dataloader_train)
    target = batch['target']
    noisy, noise = trainer.make_noisy_batch(batch['data'], target, batch['keys'])
    abar = trainer.refiner.abar
    truth = (noisy.noisy - at_level((1 - abar).sqrt(), noisy.t, noise) * noise) / at_level(abar.sqrt(), noisy.t, noise)
    torch.testing.assert_close(truth, one_hot(target, 3), rtol=0, atol=1e-4)  # coded 0/1
    assert isinstance(trainer.loss, torch.nn.MSELoss)
    # an untrained prediction of unit noise has a mean squared error of about 1 or more; a few steps bring it near 1
    assert 0 < trainer.logger.get_value('train_losses', -1) < 3
    logits = trainer.refiner.eval()(torch.randn(1, 1, 16, 24, 16))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(torch.softmax(logits, 1).sum(1), torch.ones(1, 16, 24, 16))


def test_every_trained_parameter_of_the_paper_s_network_has_a_gradient_as_ddp_demands(scratch_results):
    trainer = make_trainer('PDDDPMTrainerTinyPaper', 0)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    without = [name for name, p in trainer.network.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_pretrained_weights_reach_the_denoiser_and_leave_the_presegmenter_and_the_settings(refined, scratch_results):
    trainer = make_trainer(REFINED, 0)
    trainer.initialize()
    other_settings = SamplingSettings(t_start=7)  # as another model's would be
    trainer.refiner.configure(other_settings, other_settings, trainer.t_max, False)
    other = refined.model(REFINED) / 'fold_1' / 'checkpoint_final.pth'
    load_pretrained_weights(trainer.network, str(other))
    trainer.refiner.interval_sd.fill_(2)  # as if the other model had calibrated intervals
    trainer.on_train_start()
    stock = weights(refined.model(STOCK), 0)['network_weights']
    for name, value in trainer.refiner.presegmenter.state_dict().items():
        assert torch.equal(value, stock[name]), name
    name = 'denoiser.unet.encoder.stages.0.0.convs.0.conv.mask_conv.weight'
    assert torch.equal(trainer.network.state_dict()[name], weights(refined.model(REFINED), 1)['network_weights'][name])
    assert trainer.refiner.settings == trainer.sampling and not trainer.refiner.interval_sd.any()


def test_mirroring_is_that_of_the_stock_model(scratch_results):
    file = scratch_results / DATASET / f'{STOCK}__{PLANS}__3d_fullres' / 'fold_0' / 'checkpoint_final.pth'
    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, 'inference_allowed_mirroring_axes': (1,)}, file)
    trainer = make_trainer(REFINED, 0)
    trainer.on_train_start()
    assert trainer.inference_allowed_mirroring_axes == (1,)
    mirroring = [t for t in trainer.dataloader_train.data_loader.transforms.transforms
                 if isinstance(t, MirrorTransform)]
    assert [t.allowed_axes for t in mirroring] == [(1,)]


def test_sampling_variables_do_not_reach_into_training(scratch_results, monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_t_start', '0')
    trainer = make_trainer(REFINED, 0)
    trainer.initialize()
    assert trainer.refiner.settings == trainer.sampling != SamplingSettings(t_start=0)


def test_without_checkpointing_an_earlier_checkpoint_stays(trainer):
    final = Path(trainer.output_folder) / 'checkpoint_best.pth'
    final.write_bytes(b'earlier')
    Path(f'{final}.partial').write_bytes(b'left by a kill')
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(final))
    assert final.read_bytes() == b'earlier'
    trainer.disable_checkpointing = False
    trainer.save_checkpoint(str(final))
    assert weights(final.parent.parent, 0, final.name)['trainer_name'] == REFINED
    assert not Path(f'{final}.partial').exists()
