"""PDDDPMTrainer within nnU-Net's training."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from conftest import (
    BRIEF,
    DATASET,
    DATASET_ID,
    PLANS,
    REFINED,
    STOCK,
    Workspace,
    make_trainer,
    succeed,
    train_in_process,
)
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper

from nnunet_pdddpm.diffusion.coding import one_hot
from nnunet_pdddpm.diffusion.levels import lowest_log_snr
from nnunet_pdddpm.diffusion.measuring import NODES, UNIFORM, LevelMeter
from nnunet_pdddpm.network.refiner import BLIND_OFFSET
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.network.state import LEVELS
from nnunet_pdddpm.training import variants

MEASURED = 'PDDDPMTrainerMeasured'  # sees enough noisy patches for a table of its own


@pytest.fixture
def trainer(scratch_results):
    """An initialised trainer of fold 0 with its data loaders."""
    trainer = make_trainer(REFINED, 0)
    trainer.on_train_start()
    return trainer


def weights(model: Path, fold: int, name: str = 'checkpoint_final.pth') -> dict:
    return torch.load(model / f'fold_{fold}' / name, weights_only=False)


def noised(x0: torch.Tensor, log_snr: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Coded masks (C, ...) at a log SNR (), written out."""
    abar = 1 / (1 + torch.exp(-log_snr.double()))
    return (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).float()


def meter_of(trainer) -> LevelMeter:
    """A meter of the trainer's log SNRs that has seen nothing."""
    patch = trainer.configuration_manager.patch_size
    return LevelMeter(lowest_log_snr(int(np.prod(patch)), trainer.label_manager.num_segmentation_heads))


def test_the_name_of_a_variant_says_how_many_epochs_it_trains():
    lengths = {name: getattr(variants, name).epochs for name in variants.__all__ if 'epoch' in name}
    assert lengths == {name: int(re.search(r'_(\d+)epochs?$', name)[1]) for name in lengths} and len(lengths) == 8



def test_training_leaves_what_nnunet_expects_and_logs_the_stock_dice(refined: Workspace):
    fold = refined.model(REFINED) / 'fold_0'
    for name in ('checkpoint_final.pth', 'checkpoint_best.pth', 'progress.png', 'validation/summary.json'):
        assert (fold / name).is_file(), name
    assert not list(fold.glob('*.partial'))
    log = (refined.model(REFINED) / 'console.txt').read_text()
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
    assert rates == pytest.approx([trainer.initial_lr / 5, trainer.initial_lr * 0.5 ** 0.9])


def test_before_the_first_iteration_the_refined_result_is_the_stock_result(trainer):
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        counts = trainer.validation_step(next(trainer.dataloader_val))
        trainer.on_validation_epoch_end([counts])
    for name in ('tp_hard', 'fp_hard', 'fn_hard'):
        np.testing.assert_array_equal(counts[name], counts[f'stock_{name}'])


def test_the_loss_of_validation_is_the_cross_entropy_as_in_training(trainer):
    batch = next(trainer.dataloader_val)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        found = trainer.validation_step(batch)
        target = batch['target'][0][:, 0].long()
        for name, output in (('loss', trainer.refiner(batch['data'])),
                             ('stock_loss', trainer.refiner.presegmenter(batch['data']))):
            output = output[0] if isinstance(output, list) else output
            assert found[name] == pytest.approx(2 * float(torch.nn.functional.cross_entropy(output, target)), rel=1e-4)


def test_training_calls_no_presegmenter_and_needs_no_other_stock_fold(scratch_results):
    for fold in (1, 2):
        shutil.rmtree(scratch_results / DATASET / f'{STOCK}__{PLANS}__3d_fullres' / f'fold_{fold}')
    trainer = make_trainer(BRIEF, 0)
    trainer.on_train_start()
    calls = []
    trainer.refiner.presegmenter.register_forward_hook(lambda *args: calls.append(args))
    train_step, during_steps = trainer.train_step, []

    def counted(batch):
        before = len(calls)
        losses = train_step(batch)
        during_steps.append(len(calls) - before)
        return losses

    trainer.train_step, trainer.on_train_start = counted, lambda: None
    trainer.run_training()
    assert during_steps == [0, 0, 0] and calls  # validation logs its Dice
    assert (Path(trainer.output_folder) / 'checkpoint_final.pth').is_file()


@pytest.mark.parametrize('share', [0, 1, 0.5])
def test_noise_is_on_the_truth_and_blind_patches_show_nothing(trainer, share):
    trainer.blind_share = share
    trainer.on_train_epoch_start()
    lowest = trainer.meter.log_snr[0]
    blind = []
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        noisy, noise = trainer.make_noisy_batch(batch['data'], batch['target'][0])
        assert torch.equal(noisy.image, batch['data'])
        x0 = 2 * one_hot(batch['target'][0], 3) - 1
        for i, level in enumerate(noisy.log_snr):
            if level < lowest:
                assert level == lowest - BLIND_OFFSET == trainer.refiner.blind_level and not noisy.noisy[i].any()
            else:
                assert level <= trainer.meter.log_snr[-1]
                torch.testing.assert_close(noisy.noisy[i], noised(x0[i], level, noise[i]), rtol=1e-4, atol=1e-4)
        assert torch.equal(trainer.denoising_loss.noisy, noisy.log_snr >= lowest)
        blind += (noisy.log_snr < lowest).tolist()
    assert sum(blind) == share * len(blind)


@pytest.mark.parametrize('share', [0, 0.5, 0.3, 1])
@pytest.mark.parametrize('batch_size', [1, 2, 5])
def test_over_the_batches_as_many_patches_are_blind_as_their_share_asks_for(trainer, batch_size, share):
    trainer.blind_share = share
    places, offsets = np.zeros(batch_size), set()
    for trainer.current_epoch in range(3):
        trainer.on_train_epoch_start()
        offsets.add(trainer.blind_offset)
        drawn = 0
        for step in range(1, 41):
            blind = trainer.draw_blind(batch_size)
            assert blind.shape == (batch_size,)
            assert abs(int(blind.sum()) - share * batch_size) < 1
            drawn += int(blind.sum())
            assert abs(drawn - share * step * batch_size) < 1
            places += blind.numpy()
    # no place of the batch is preferred: nnU-Net's last ones hold foreground
    expected = share * 120
    assert (np.abs(places - expected) <= 4 * np.sqrt(expected * (1 - share)) + 1).all()
    assert len(offsets) == 3


def test_levels_are_even_in_the_uncertainty_that_they_leave(trainer):
    log_snr = trainer.meter.log_snr
    undecided = torch.sigmoid(-2 * (log_snr + 3))  # nearly all is decided about -3
    trainer.meter.restore(undecided, torch.full((NODES,), 400.0))
    trainer.on_train_epoch_start()
    levels = torch.cat([trainer.draw_levels(n) for n in (1, 2, 1)] + [trainer.draw_levels(4000)])
    table = trainer.meter.table()
    span = float(log_snr[-1] - log_snr[0])
    for level in (-6.0, -4.0, -3.0, -2.0, 0.0):
        expected = (1 - UNIFORM) * (1 - table.share_at(level)) + UNIFORM * (level - float(log_snr[0])) / span
        assert float((levels <= level).float().mean()) == pytest.approx(expected, abs=2e-3), level
    assert float(((levels > -5) & (levels < -1)).float().mean()) > 0.7
    # one by one as many at once: batches of any size go on where the last one ended
    trainer.on_train_epoch_start()
    torch.testing.assert_close(trainer.draw_levels(4004), levels)


def test_the_table_in_a_checkpoint_is_monotone_and_what_the_meter_gives(scratch_results):
    trainer = make_trainer(MEASURED, 0)
    seen = meter_of(trainer)
    train_step, make_noisy_batch, levels = trainer.train_step, trainer.make_noisy_batch, []

    def recorded_batch(*args):
        noisy, noise = make_noisy_batch(*args)
        levels.append(noisy.log_snr[trainer.denoising_loss.noisy])
        return noisy, noise

    def recorded_step(batch):
        losses = train_step(batch)
        if len(levels[-1]):
            seen.update(seen.sums(levels[-1], trainer.denoising_loss.measured))
        return losses

    trainer.train_step, trainer.make_noisy_batch = recorded_step, recorded_batch
    trainer.run_training()
    for name in ('checkpoint_final.pth', 'checkpoint_best.pth'):
        stored = weights(Path(trainer.output_folder).parent, 0, name)['network_weights']
        log_snr, share, cross_entropy, count = (stored[of] for of in LEVELS)
        assert (log_snr.diff() > 0).all() and (share.diff() < 0).all() and (share[0], share[-1]) == (1, 0)
        meter = meter_of(trainer)
        meter.restore(cross_entropy, count)
        torch.testing.assert_close(log_snr, torch.tensor(meter.table().log_snr))
        torch.testing.assert_close(share, torch.tensor(meter.table().share))
    assert not torch.allclose(share, torch.linspace(1, 0, NODES), atol=0.01)  # measured, not the one before training
    final = weights(Path(trainer.output_folder).parent, 0)['network_weights']
    assert torch.equal(final['level_count'], seen.count) and seen.count.sum() == len(torch.cat(levels)) == 60
    torch.testing.assert_close(final['level_cross_entropy'], seen.cross_entropy)


@pytest.mark.parametrize('noisy', [[False, False], [True, True], [True, False]])
def test_the_loss_is_nnunets_cross_entropy_whether_a_mask_is_shown_or_none(trainer, noisy):
    output, target = torch.randn(2, 3, 8, 8, 8), torch.randint(0, 3, (2, 1, 8, 8, 8)).float()
    trainer.denoising_loss.set_noisy(torch.tensor(noisy))
    expected = 2 * torch.nn.functional.cross_entropy(output, target[:, 0].long())
    torch.testing.assert_close(trainer.denoising_loss(output, target), expected)


@pytest.mark.parametrize('noisy', [[True, False, True], [False, False, False], [True, True, True]])
def test_measured_is_the_cross_entropy_of_each_noisy_item_at_full_resolution(trainer, noisy):
    assert isinstance(trainer.loss, DeepSupervisionWrapper) and trainer.loss.loss is trainer.denoising_loss
    loss_of = DeepSupervisionWrapper(trainer.denoising_loss, (0.5, 0.3, 0.2))  # as of a network with more stages
    shapes = [(8, 8, 8), (4, 4, 4), (2, 2, 2)]
    torch.manual_seed(1)
    outputs = [torch.randn(3, 3, *shape, requires_grad=True) for shape in shapes]
    targets = [torch.randint(0, 3, (3, 1, *shape)).float() for shape in shapes]
    of_batch = trainer.denoising_loss
    of_batch.set_noisy(~torch.tensor(noisy))
    loss_of(outputs, targets)
    of_batch.set_noisy(torch.tensor(noisy))
    assert of_batch.measured is None
    loss = loss_of(outputs, targets)
    if not any(noisy):
        assert of_batch.measured is None
        return
    expected = torch.nn.functional.cross_entropy(outputs[0], targets[0][:, 0].long(), reduction='none').mean((1, 2, 3))
    torch.testing.assert_close(of_batch.measured, 2 * expected[noisy])  # nnU-Net's weights are 1 and 1
    assert loss.requires_grad and not of_batch.measured.requires_grad


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
    make_trainer(MEASURED, 2).run_training()
    model = scratch_results / DATASET / f'{MEASURED}__{PLANS}__3d_fullres'
    uninterrupted = weights(model, 2)
    shutil.move(model, tmp_path / 'uninterrupted')

    command = [str(Path(sys.executable).parent / 'nnUNetv2_train'), str(DATASET_ID), '3d_fullres', '2', '-tr', MEASURED,
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
    half = weights(model, 2, latest.name)['network_weights']
    assert half['level_count'].sum() == uninterrupted['network_weights']['level_count'].sum() / 2 == 30

    log = succeed(*command, '--c')
    assert 'Epoch 1' in log and 'Epoch 0' not in log
    resumed = weights(model, 2)
    assert resumed['current_epoch'] == uninterrupted['current_epoch'] == 2
    for name, value in uninterrupted['network_weights'].items():
        # the command has validated, too
        assert torch.equal(resumed['network_weights'][name], value) or name in ('calibration', 'quality'), name
    assert set(LEVELS) <= uninterrupted['network_weights'].keys()  # table and meter
    assert not torch.equal(half['level_share'], uninterrupted['network_weights']['level_share'])
    moved, expected = (c['optimizer_state']['denoiser_before_averaging'] for c in (resumed, uninterrupted))
    for name, value in expected.items():
        assert torch.equal(moved[name], value), name


def test_the_optimizer_counts_on_the_cpu_after_a_checkpoint_was_loaded_to_a_gpu(trainer):
    """As in a training that was not resumed: AdamW asks for every count in each step, and would wait for the GPU."""
    for parameter in trainer.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    state = trainer.optimizer.state_dict()
    for of_parameter in state['state'].values():
        of_parameter['step'] = SimpleNamespace(cpu=lambda: torch.tensor(7.0))
    trainer.optimizer.load_state_dict(state)
    assert {of_parameter['step'].item() for of_parameter in trainer.optimizer.state.values()} == {7.0}


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
    paper_s = SamplingSettings(start=1.0, steps=300, samples=5, start_mask='hard', redraw=0, mask_stock=0.0,
                               mask_blind=0.0, mask_samples=5)
    assert trainer.sampling == paper_s
    trainer.sampling = replace(paper_s, steps=3, mask_samples=2)
    trainer.num_epochs = 1
    trainer.run_training()
    batch = next(trainer.dataloader_train)
    target = batch['target']
    noisy, noise = trainer.make_noisy_batch(batch['data'], target)
    for i, level in enumerate(noisy.log_snr):
        torch.testing.assert_close(noisy.noisy[i], noised(one_hot(target, 3)[i], level, noise[i]))  # coded 0/1
    assert isinstance(trainer.loss, torch.nn.MSELoss)
    # an untrained prediction of unit noise has a mean squared error of about 1 or more; a few steps bring it near 1
    assert 0 < trainer.logger.get_value('train_losses', -1) < 3
    logits = trainer.refiner.eval()(torch.randn(1, 1, 16, 24, 16))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(torch.softmax(logits, 1).sum(1), torch.ones(1, 16, 24, 16))


def test_the_paper_s_levels_are_those_of_the_cosine_schedule_up_to_300_also_when_resumed(scratch_results):
    trainer = make_trainer('PDDDPMTrainerTinyPaper', 0)
    trainer.sampling = replace(trainer.sampling, steps=1, mask_samples=1)
    trainer.num_epochs = trainer.num_iterations_per_epoch = 1
    trainer.run_training()
    resumed = make_trainer('PDDDPMTrainerTinyPaper', 0)
    resumed.load_checkpoint(str(Path(trainer.output_folder) / 'checkpoint_final.pth'))
    abar = np.cos((np.arange(301) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = abar[1:] / abar[0]
    expected = np.log(abar / (1 - abar))
    for of in (trainer, resumed):
        of.level_generator.manual_seed(0)
        levels = of.draw_levels(60_000).double().numpy()
        t = 1 + np.abs(levels[:, None] - expected).argmin(1)
        np.testing.assert_allclose(levels, expected[t - 1], rtol=1e-4, atol=1e-4)
        counts = np.bincount(t, minlength=301)
        assert counts[0] == 0 and counts[1:].min() > 100 and counts.max() < 300  # 200 each
        assert of.refiner.table.chain(1.0, 300)[:-1] == pytest.approx(expected[::-1])
        assert not of.refiner.level_count.any()


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
    trainer.refiner.configure(SamplingSettings(start=0.3), False)  # as another model's would be
    other = refined.model(REFINED) / 'fold_1' / 'checkpoint_final.pth'
    load_pretrained_weights(trainer.network, str(other))
    trainer.refiner.calibration.fill_(2)  # as if the other model had calibrated intervals, and an order
    trainer.refiner.quality.fill_(2)
    assert trainer.refiner.level_count.sum() > 0
    trainer.on_train_start()
    stock = weights(refined.model(STOCK), 0)['network_weights']
    for name, value in trainer.refiner.presegmenter.state_dict().items():
        assert torch.equal(value, stock[name]), name
    name = 'denoiser.unet.encoder.stages.0.0.convs.0.conv.mask_conv.weight'
    assert torch.equal(trainer.network.state_dict()[name], weights(refined.model(REFINED), 1)['network_weights'][name])
    assert trainer.refiner.settings == trainer.sampling
    assert not trainer.refiner.calibration.any() and not trainer.refiner.quality.any()
    assert not trainer.refiner.level_count.any() and not trainer.meter.count.any()  # levels are measured anew


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
    monkeypatch.setenv('nnUNet_pdddpm_start', '0')
    trainer = make_trainer(REFINED, 0)
    trainer.initialize()
    assert trainer.refiner.settings == trainer.sampling != SamplingSettings(start=0)


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
