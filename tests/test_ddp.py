"""Distributed training: two processes that train and validate one model, by nnU-Net's own trainer code."""
from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import test_cuda
import torch
from conftest import DATASET, PLANS, REFINED, in_this_process, make_trainer, succeed
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from nnunet_pdddpm.diffusion.levels import even_table
from nnunet_pdddpm.diffusion.measuring import NODES, LevelMeter
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.tuning import sweep

ON_CPU = 'PDDDPMTrainerOnCPU'


def measured_before() -> tuple[torch.Tensor, torch.Tensor]:
    """The meter's state of a training that had gone on for a while."""
    return torch.linspace(1, 0, NODES), torch.full((NODES,), 3.0)


def rank_main(rank: int, folder: str) -> None:
    """Train and validate as `nnUNetv2_train -num_gpus 2` does, on the CPU; what is to be compared goes to a file."""
    torch.set_num_threads(1)
    # nnU-Net names the GPU of the rank, which DDP does not take for a network on the CPU
    nnunet_module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                                   timeout=datetime.timedelta(seconds=40))
    trainer = make_trainer(ON_CPU, 0)
    trainer.configuration_manager.configuration['batch_dice'] = True  # sums go between the processes
    trainer.num_epochs = 1
    trainer.tuning_share = 10_000  # by rank 0; the other one waits and is told
    sweep.STARTS, sweep.FIRST_STEPS, sweep.MORE_STEPS, sweep.DEPENDENCES, sweep.DRAWS = (0.6,), (1,), (), (1.0,), 2
    trainer.blind_share = 0.4
    trainer.meter.restore(*measured_before())
    blind, levels, sums, counts = [], [], [], []
    make_noisy_batch, validation_step = trainer.make_noisy_batch, trainer.validation_step
    of_patches = trainer.meter.sums

    def recorded_batch(*args):
        noisy, noise = make_noisy_batch(*args)
        levels.append(noisy.log_snr)
        blind.append(~trainer.denoising_loss.noisy)
        return noisy, noise

    def recorded_sums(*args):
        of_rank = of_patches(*args)
        sums.append((len(levels) - 1, of_rank.clone()))  # those of the other rank are added in its place
        return of_rank

    def recorded_step(batch):
        counts.append(validation_step(batch))
        return counts[-1]

    trainer.make_noisy_batch, trainer.validation_step = recorded_batch, recorded_step
    trainer.meter.sums = recorded_sums
    trainer.run_training()
    assert isinstance(trainer.network, DistributedDataParallel)
    with in_this_process():
        trainer.perform_actual_validation()
    torch.save({'weights': trainer.refiner.state_dict(), 'average': trainer.averaged.module.state_dict(),
                'updates': int(trainer.averaged.n_averaged), 'settings': trainer.refiner.settings,
                'levels': torch.cat(levels), 'blind': torch.cat(blind), 'sums': sums,
                'meter': (trainer.meter.log_snr, trainer.meter.cross_entropy, trainer.meter.count),
                'table': trainer.refiner.table,
                'tp': np.sum([c['tp_hard'] for c in counts], 0), 'stock': sum(c['stock_tp_hard'] for c in counts),
                'losses': trainer.logger.get_value('train_losses', -1),
                'dice': trainer.logger.get_value('dice_per_class_or_region', -1)}, Path(folder) / f'{rank}.pt')
    alone = make_trainer(ON_CPU, 0)  # one case for two processes
    alone.load_checkpoint(str(Path(alone.output_folder) / 'checkpoint_final.pth'))
    alone.do_split = lambda: ([], ['phantom_003'])
    alone.output_folder = folder
    with in_this_process():
        alone.perform_actual_validation()
    distributed.destroy_process_group()


def test_two_processes_train_one_model(scratch_results, tmp_path):
    multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    one, other = (torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in (0, 1))
    fold = scratch_results / DATASET / f'{ON_CPU}__{PLANS}__3d_fullres' / 'fold_0'
    start = torch.load(fold.parents[1] / f'nnUNetTrainerTiny__{PLANS}__3d_fullres' / 'fold_0' / 'checkpoint_final.pth',
                       weights_only=False)['network_weights']
    moved = 'encoder.stages.1.0.convs.0.conv.weight'
    assert not torch.equal(one['weights'][f'denoiser.unet.{moved}'], start[moved])
    for part in ('weights', 'average'):
        for name, value in one[part].items():
            assert torch.equal(value, other[part][name]), name
    tuned = json.loads((fold / 'sampling_sweep.json').read_text())['chosen']
    assert asdict(one['settings']) == asdict(other['settings']) == tuned
    assert one['updates'] == other['updates'] == 8
    assert one['losses'] == other['losses'] and one['dice'] == other['dice']

    assert len(one['levels']) == len(other['levels']) == 8  # a batch of two, one on each rank
    noisy = ~(one['blind'] | other['blind'])
    assert (one['blind'] != other['blind']).any()  # where one process has no Dice and the other has
    assert noisy.any() and (one['levels'] != other['levels'])[noisy].all()
    assert not np.array_equal(one['tp'], other['tp'])  # each rank validates on its own patches

    # one table of levels, made of the patches of both
    log_snr, cross_entropy, count = one['meter']
    assert all(torch.equal(a, b) for a, b in zip(one['meter'], other['meter'], strict=True))
    assert one['table'] == other['table']
    expected = LevelMeter(float(log_snr[0]))
    expected.restore(*measured_before())
    for step in range(8):
        of_ranks = [sums for rank in (one, other) for i, sums in rank['sums'] if i == step]
        expected.update(sum(of_ranks, torch.zeros(2, NODES)))
    for rank in (one, other):
        assert sum(sums[1].sum() for _, sums in rank['sums']) == (~rank['blind']).sum() > 0
    assert torch.equal(count, expected.count)
    torch.testing.assert_close(cross_entropy, expected.cross_entropy)
    assert one['table'] == expected.table() != even_table(float(log_snr[0]), NODES)

    saved = torch.load(fold / 'checkpoint_final.pth', weights_only=False)['network_weights']
    for name, value in one['average'].items():
        assert torch.equal(saved[f'denoiser.{name}'], value), name
    torch.testing.assert_close(saved['level_share'], torch.tensor(one['table'].share))
    assert torch.equal(saved['level_count'], count) and torch.equal(saved['level_cross_entropy'], cross_entropy)
    assert {file.name for file in (fold / 'validation').glob('*.nii.gz')} == {
        f'phantom_{i:03d}.nii.gz' for i in (0, 3, 6)}  # two by one rank, one by the other
    assert (fold / 'validation' / 'summary.json').is_file()
    true = saved['calibration'][:, 1, 0]  # both ranks' volumes of the organ, of three validation cases
    assert (true[:3] > 0).all() and len(set(true[:3].tolist())) == 3 and not true[3:].any()
    again = tmp_path / 'validation' / 'phantom_003.nii.gz'
    assert again.read_bytes() == (fold / 'validation' / again.name).read_bytes()


def test_where_processes_cannot_wait_for_each_other_training_does_not_begin(tmp_path, monkeypatch):
    """gloo needs the name of the host: after days of training its lack would end the run, and every --c."""
    for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'):
        monkeypatch.setenv(name, str(tmp_path / name))
    trainer, begun = test_cuda.bare_trainer(PDDDPMTrainer, 'classes', 'cpu', tmp_path), []

    def no_host(backend, **kwargs):
        assert backend == 'gloo'
        raise RuntimeError('cannot resolve the host')
    monkeypatch.setattr(distributed, 'new_group', no_host)
    monkeypatch.setattr(nnUNetTrainer, 'on_train_start', lambda self: begun.append(self))
    monkeypatch.setattr(trainer, '_note_cases', lambda: None)
    trainer.is_ddp, trainer.was_initialized, trainer._restored = True, True, True
    with pytest.raises(RuntimeError, match='cannot resolve the host'):
        trainer.on_train_start()
    assert begun == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_two_gpus_by_the_command(scratch_results):
    succeed('nnUNetv2_train', '701', '3d_fullres', '0', '-tr', REFINED, '-p', PLANS, '-num_gpus', '2',
            environment={'nnUNet_compile': os.environ.get('nnUNet_compile', 'false')})
    fold = scratch_results / DATASET / f'{REFINED}__{PLANS}__3d_fullres' / 'fold_0'
    assert (fold / 'validation' / 'summary.json').is_file()
