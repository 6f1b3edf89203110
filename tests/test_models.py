"""Damaged, foreign, edited and exploding models: refused in one sentence, and the last good checkpoint stays."""
from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BRIEF, DATASET, DATASET_ID, PLANS, REFINED, STOCK, Workspace, make_trainer, train_in_process
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from tiny_model import plans, write_model

from nnunet_pdddpm.commands.check_dataset import TRAINER, check_refined, check_stock, read_dataset
from nnunet_pdddpm.inference.errors import PredictionError
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.network.checkpoint import CheckpointError, load_checkpoint, stored_checksum
from nnunet_pdddpm.network.state import LEVELS, SETTING
from nnunet_pdddpm.training.finite import NonFiniteLoss

MODEL_FOLDER = f'{REFINED}__{PLANS}__3d_fullres'


@pytest.fixture
def model(refined: Workspace, tmp_path: Path) -> Path:
    """A copy of the trained PDDDPM model, fold 0, to damage."""
    folder = tmp_path / 'results' / DATASET / MODEL_FOLDER
    (folder / 'fold_0').mkdir(parents=True)
    for name in ('plans.json', 'dataset.json', 'fold_0/checkpoint_final.pth'):
        shutil.copy(refined.model(REFINED) / name, folder / name)
    return folder


def checkpoint(model: Path) -> Path:
    return model / 'fold_0' / 'checkpoint_final.pth'


def rewrite(model: Path, change) -> None:
    """Save the checkpoint again after `change(checkpoint)`; the archive's own checksums are then right."""
    content = torch.load(checkpoint(model), weights_only=False)
    change(content)
    torch.save(content, checkpoint(model))


def load(model: Path) -> None:
    PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False).initialize_from_trained_model_folder(str(model), (0,))


def load_as_nnunet_does(model: Path) -> None:
    nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False).initialize_from_trained_model_folder(str(model), (0,))


def flip_a_bit(file: Path, weight: str) -> None:
    """One bit of one weight, in the file itself."""
    values = torch.load(file, weights_only=False)['network_weights'][weight].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(values) + 2] ^= 0x10
    file.write_bytes(content)


@pytest.mark.parametrize('share', [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_model_is_refused(model, share):
    content = checkpoint(model).read_bytes()
    checkpoint(model).write_bytes(content[:int(share * len(content))])
    with pytest.raises(CheckpointError, match='checkpoint_final.pth is truncated or no checkpoint'):
        load(model)


@pytest.mark.parametrize('weight', ['presegmenter.encoder.stages.1.0.convs.0.conv.weight',
                                    'denoiser.unet.encoder.stages.1.0.convs.0.conv.weight'])
def test_a_flipped_bit_anywhere_is_told_by_the_checksums_of_the_archive(model, weight):
    flip_a_bit(checkpoint(model), weight)
    torch.load(checkpoint(model), weights_only=False)  # torch does not notice
    with pytest.raises(CheckpointError, match='is damaged: the checksum of .* in it is wrong'):
        load(model)


def test_a_presegmenter_that_is_not_the_embedded_one_is_refused_by_plain_nnunet_too(model):
    flip_a_bit(checkpoint(model), 'presegmenter.encoder.stages.1.0.convs.0.conv.weight')
    with pytest.raises(CheckpointError, match='the stock model in it is not the one that it was trained with'):
        load_as_nnunet_does(model)
    rewrite(model, lambda content: None)  # an archive that is right again, around wrong weights
    for how in (load, load_as_nnunet_does):
        with pytest.raises(CheckpointError, match='the stock model in it is not the one that it was trained with'):
            how(model)


def test_a_model_from_before_there_were_checksums_is_read(model):
    def forget(content):
        content['network_weights']._metadata[''].pop('presegmenter_checksum')
    assert stored_checksum(load_checkpoint(checkpoint(model))['network_weights']) is not None
    rewrite(model, forget)
    assert stored_checksum(load_checkpoint(checkpoint(model))['network_weights']) is None
    load(model)
    load_as_nnunet_does(model)


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_denoiser_with_weights_that_are_no_numbers_does_not_predict(model, value):
    def spoil(content):
        content['network_weights']['denoiser.embedding.layers.0.bias'][3] = value
    rewrite(model, spoil)
    for how in (load, load_as_nnunet_does):
        with pytest.raises(CheckpointError, match=r'NaN or infinite weights \(denoiser.embedding.layers.0.bias\)'):
            how(model)


@pytest.mark.parametrize(('file', 'change', 'what'), [
    ('plans.json', lambda plans: plans['configurations']['3d_fullres'].update(spacing=[2.0, 2.0, 2.0]), 'spacing'),
    ('plans.json', lambda plans: plans['configurations']['3d_fullres'].update(patch_size=[16, 16, 16]), 'patch_size'),
    ('plans.json', lambda plans: plans.update(transpose_forward=[2, 1, 0]), 'transpose_forward'),
    ('dataset.json', lambda description: description['labels'].update(lesion=1, organ=2), 'labels')])
def test_plans_or_labels_edited_after_training_are_refused(model, file, change, what):
    content = json.loads((model / file).read_text())
    change(content)
    (model / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f'{what} was .* when it was trained and is '):
        load(model)


def test_regions_in_another_order_are_refused(tmp_path):
    """nnU-Net's channels are in the order of the names, which `save_json` of batchgenerators sorts."""
    description = {'channel_names': {'0': 'image'}, 'numTraining': 1, 'file_ending': '.nii.gz',
                   'labels': {'background': 0, 'whole': [1, 2], 'core': [2]}, 'regions_class_order': [1, 2]}
    folder = write_model(tmp_path / 'model', plans('SimpleITKIO', 3, 1), description)
    load(folder)
    (folder / 'dataset.json').write_text(json.dumps(description, sort_keys=True))
    with pytest.raises(CheckpointError, match=r"the order of labels was \['background', 'whole', 'core'\] when it was"):
        load(folder)


def test_a_model_without_a_numbered_fold_is_told(model):
    (model / 'fold_0').rename(model / 'fold_all')
    predictor = PDDDPMPredictor(device=torch.device('cpu'), allow_tqdm=False)
    with pytest.raises(PredictionError, match='has no numbered fold with checkpoint_final.pth: name a fold'):
        predictor.initialize_from_trained_model_folder(str(model), None)


def as_of_an_earlier_version(content: dict) -> None:
    """Noise levels by their numbers, and two sets of settings under these names."""
    weights = content['network_weights']
    for name in [name for name in weights if name in LEVELS or name.startswith(SETTING)]:
        weights.pop(name)
    for name, value in {'t_max': 1000, 't_start': 700, 'steps': 1, 'sampler_t_start': 700, 'sampler_steps': 1}.items():
        weights[name] = torch.tensor(value)


def test_a_model_of_an_earlier_version_predicts_nothing_and_one_sentence_says_so(model):
    rewrite(model, as_of_an_earlier_version)
    for how in (load, load_as_nnunet_does):
        with pytest.raises(CheckpointError, match='is of another version of PDDDPMTrainer: train it again with '
                                                  'this version.$'):
            how(model)


def test_the_check_says_that_the_stock_model_was_trained_again_and_that_is_no_problem(refined, model, tmp_path,
                                                                                      monkeypatch, capsys):
    results = tmp_path / 'results'
    shutil.copytree(refined.model(STOCK), results / DATASET / refined.model(STOCK).name)
    model.rename(model.with_name(MODEL_FOLDER.replace(REFINED, TRAINER)))
    monkeypatch.setenv('nnUNet_results', str(results))
    data = read_dataset(DATASET, PLANS)

    def check() -> str:
        problems: list[str] = []
        stock = check_stock(data.context('3d_fullres'), results / DATASET / refined.model(STOCK).name, problems)
        assert check_refined(data, '3d_fullres', stock, problems)[TRAINER] == [0]
        assert problems == []
        return capsys.readouterr().out

    assert 'another stock model' not in check()
    file = results / DATASET / refined.model(STOCK).name / 'fold_0' / 'checkpoint_final.pth'
    content = torch.load(file, weights_only=False)
    next(iter(content['network_weights'].values())).add_(1e-3)
    torch.save(content, file)
    assert f'fold 0 of {TRAINER} holds another stock model than the one that is there now' in check()


# training

def test_training_stops_at_the_first_loss_that_is_no_number_and_keeps_the_last_good_checkpoint(scratch_results):
    trainer = make_trainer(REFINED, 0)
    trainer.on_train_start()
    seen = []

    class Spoiled:
        """The data loader, with a NaN in the image of the fourth iteration of the second epoch."""

        def __init__(self, loader):
            self.loader = loader

        def __next__(self):
            batch = next(self.loader)
            if trainer.current_epoch == 1 and trainer.iteration == 3:
                batch['data'][0, 0, 0, 0, 0] = np.nan
                seen.extend(batch['keys'])
            return batch
    trainer.dataloader_train = Spoiled(trainer.dataloader_train)
    trainer.on_train_start = lambda: None
    with pytest.raises(NonFiniteLoss, match='nan at iteration 3 of epoch 1') as error:
        trainer.run_training()
    assert all(case in str(error.value) for case in seen) and seen
    folder = Path(trainer.output_folder)
    assert 'checkpoint_latest.pth' in str(error.value) and not (folder / 'checkpoint_final.pth').exists()
    kept = load_checkpoint(folder / 'checkpoint_latest.pth')
    assert kept['current_epoch'] == 1
    assert all(torch.isfinite(value).all() for value in kept['network_weights'].values())

    resumed = make_trainer(REFINED, 0)
    resumed.load_checkpoint(str(folder / 'checkpoint_latest.pth'))
    assert resumed.current_epoch == 1
    resumed.save_checkpoint(str(folder / 'again.pth'))  # what a resumed training saves has the checksum, too
    assert stored_checksum(load_checkpoint(folder / 'again.pth')['network_weights']) == \
        stored_checksum(kept['network_weights']) is not None


def test_with_a_grad_scaler_a_loss_that_is_no_number_is_told_and_ten_in_a_row_end_training(scratch_results):
    """As in half precision on a GPU, where GradScaler leaves such a step out and lowers its scale."""
    trainer = make_trainer(REFINED, 0)
    trainer.on_train_start()
    trainer.grad_scaler = torch.amp.GradScaler('cpu')
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    spoiled = {**batch, 'data': batch['data'].clone()}
    spoiled['data'][0, 0, 0, 0, 0] = torch.nan
    before = [p.detach().clone() for p in trainer.refiner.denoiser.parameters()]
    outputs = [trainer.train_step(spoiled)]
    assert math.isnan(outputs[0]['loss']) and trainer.grad_scaler.get_scale() == 2 ** 15
    assert all(torch.equal(p, old) for p, old in zip(trainer.refiner.denoiser.parameters(), before, strict=True))
    outputs.append(trainer.train_step(batch))
    assert not all(torch.equal(p, old) for p, old in zip(trainer.refiner.denoiser.parameters(), before, strict=True))
    assert torch.isfinite(trainer.meter.cross_entropy).all()
    trainer.on_train_epoch_end(outputs)
    assert trainer.logger.get_value('train_losses', -1) == pytest.approx(float(outputs[1]['loss']))
    for _ in range(9):
        trainer.train_step(spoiled)
    log = next(Path(trainer.output_folder).glob('training_log*')).read_text()
    assert 'GradScaler leaves this step out (9 in a row, training stops at 10).' in log
    with pytest.raises(NonFiniteLoss, match='the 10th time in a row, on patches of'):
        trainer.train_step(spoiled)
    next(trainer.refiner.denoiser.parameters()).data.fill_(torch.inf)
    trainer.loss_watch.in_a_row = 0
    with pytest.raises(NonFiniteLoss, match='and weights of the network are no numbers'):
        trainer.train_step(batch)


def test_a_killed_data_worker_ends_training_and_the_last_checkpoint_is_there(scratch_results, monkeypatch):
    monkeypatch.setenv('nnUNet_n_proc_DA', '1')
    trainer = make_trainer(REFINED, 0)
    trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    on_train_epoch_start = trainer.on_train_epoch_start

    def kill_the_worker():
        on_train_epoch_start()
        if trainer.current_epoch == 1:
            for process in trainer.dataloader_train._processes:
                process.kill()
            trainer.num_iterations_per_epoch = 1000  # what lies ready does not last
    trainer.on_train_epoch_start = kill_the_worker
    with pytest.raises(RuntimeError, match='background workers are no longer alive'):
        trainer.run_training()
    trainer.dataloader_val._finish()
    folder = Path(trainer.output_folder)
    assert load_checkpoint(folder / 'checkpoint_latest.pth')['current_epoch'] == 1
    assert not (folder / 'checkpoint_final.pth').exists()


def test_training_does_not_go_on_from_a_checkpoint_of_an_earlier_version(model, scratch_results):
    rewrite(model, as_of_an_earlier_version)
    fold = scratch_results / DATASET / MODEL_FOLDER / 'fold_0'
    fold.mkdir(parents=True)
    latest = fold / 'checkpoint_latest.pth'
    shutil.move(checkpoint(model), latest)
    content = latest.read_bytes()
    with pytest.raises(CheckpointError) as error:
        train_in_process(DATASET_ID, '3d_fullres', 0, REFINED, '--c')
    assert str(error.value) == (f'The checkpoint {latest} is of another version of PDDDPMTrainer: train it '
                                f'again with this version.')
    assert latest.read_bytes() == content and [file.name for file in fold.glob('*.pth*')] == [latest.name]


def test_weights_that_are_no_numbers_are_not_saved_over_a_good_checkpoint(scratch_results):
    trainer = make_trainer(BRIEF, 0)
    trainer.initialize()
    file = Path(trainer.output_folder) / 'checkpoint_latest.pth'
    trainer.save_checkpoint(str(file))
    good = file.read_bytes()
    with torch.no_grad():
        next(trainer.averaged.module.parameters()).fill_(np.nan)
    with pytest.raises(CheckpointError, match='The network in training has NaN'):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == good


@pytest.mark.parametrize('damage', ['truncated', 'flipped'])
def test_training_does_not_go_on_from_a_damaged_checkpoint(model, scratch_results, damage):
    if damage == 'flipped':
        flip_a_bit(checkpoint(model), 'denoiser.unet.encoder.stages.1.0.convs.0.conv.weight')
    else:
        checkpoint(model).write_bytes(checkpoint(model).read_bytes()[:-100])
    trainer = make_trainer(BRIEF, 0)
    with pytest.raises(CheckpointError, match='The checkpoint .*checkpoint_final.pth is (damaged|truncated)'):
        trainer.load_checkpoint(str(checkpoint(model)))
    assert not trainer.was_initialized
