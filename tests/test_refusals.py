"""What does not fit is refused at the start, in one sentence, with nothing overwritten."""
from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID, PLANS, REFINED, STOCK, make_trainer, run_command

from nnunet_pdddpm import versions
from nnunet_pdddpm.network.checkpoint import CheckpointError, load_checkpoint
from nnunet_pdddpm.training.presegmenters import PresegmenterError


def initialise(fold: int = 0) -> None:
    make_trainer(REFINED, fold).initialize()


def stock_file(results: Path, fold: int = 0) -> Path:
    return results / DATASET / f'{STOCK}__{PLANS}__3d_fullres' / f'fold_{fold}' / 'checkpoint_final.pth'


def tampered(results: Path, change) -> None:
    """Rewrite the stock checkpoint of fold 0 after `change(checkpoint)`."""
    file = stock_file(results)
    checkpoint = torch.load(file, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, file)


@pytest.mark.parametrize('damage', ['missing', 'truncated'])
def test_training_without_a_readable_stock_model_fails_with_one_sentence(scratch_results, damage):
    file = stock_file(scratch_results)
    content = file.read_bytes()
    file.unlink()
    if damage == 'truncated':
        file.write_bytes(content[:len(content) // 2])
    fold = scratch_results / DATASET / f'{REFINED}__{PLANS}__3d_fullres' / 'fold_0'
    fold.mkdir(parents=True)
    (fold / 'checkpoint_final.pth').write_bytes(b'earlier result')
    result = run_command('nnUNetv2_train', str(DATASET_ID), '3d_fullres', '0', '-tr', REFINED, '-p', PLANS,
                         '-device', 'cpu')
    assert result.returncode != 0
    sentence = result.stdout.strip().splitlines()[-1]
    assert str(file) in sentence
    assert {'missing': 'does not exist: train it first with nnUNetv2_train', 'truncated': 'is truncated'}[
        damage] in sentence
    assert (fold / 'checkpoint_final.pth').read_bytes() == b'earlier result'


@pytest.mark.parametrize(('what', 'change'), [
    ('labels', lambda c: c['init_args']['dataset_json']['labels'].update(lesion=3)),
    ('channel_names', lambda c: c['init_args']['dataset_json'].update(channel_names={'0': 'CT'})),
    ('fold', lambda c: c['init_args'].update(fold=1)),
    ('configuration', lambda c: c['init_args'].update(configuration='3d_lowres')),
    ('patch_size', lambda c: c['init_args']['plans']['configurations']['3d_fullres'].update(patch_size=[8, 8, 8])),
    ('spacing', lambda c: c['init_args']['plans']['configurations']['3d_fullres'].update(spacing=[1.0, 2.0, 3.0])),
    ('architecture', lambda c: c['init_args']['plans']['configurations']['3d_fullres']['architecture'].update(
        network_class_name='another.Network')),
    ('foreground_intensity_properties_per_channel',
     lambda c: c['init_args']['plans'].update(foreground_intensity_properties_per_channel={})),
])
def test_a_stock_model_trained_on_something_else_is_refused_by_name(scratch_results, what, change):
    tampered(scratch_results, change)
    with pytest.raises(PresegmenterError, match=what) as error:
        initialise()
    assert str(stock_file(scratch_results)) in str(error.value)


def test_a_stock_model_with_another_network_than_the_planned_is_refused(scratch_results):
    tampered(scratch_results, lambda c: c['network_weights'].update({'encoder.extra.weight': torch.zeros(3)}))
    with pytest.raises(PresegmenterError, match=r'another network than the plans describe \(encoder.extra.weight'):
        initialise()


@pytest.mark.parametrize('module', ['numpy.core', 'numpy._core'])
def test_checkpoints_written_with_either_numpy_generation_are_read(scratch_results, tmp_path, module):
    source, target = stock_file(scratch_results), tmp_path / 'checkpoint.pth'
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, 'w') as rewritten:
        for item in archive.infolist():
            content = archive.read(item)
            if item.filename.endswith('data.pkl'):
                content = re.sub(rb'cnumpy\._?core\.multiarray\n', b'c%s.multiarray\n' % module.encode(), content)
                assert b'c%s.multiarray' % module.encode() in content
            rewritten.writestr(item, content)
    assert load_checkpoint(target)['trainer_name'] == STOCK


class Payload:
    """Unpickled without care, it writes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_with_a_payload_is_refused_before_it_runs(scratch_results, tmp_path):
    tampered(scratch_results, lambda c: c.update(extra=Payload(tmp_path / 'executed')))
    with pytest.raises(CheckpointError, match='objects that nnU-Net does not write'):
        load_checkpoint(stock_file(scratch_results))
    assert not (tmp_path / 'executed').exists()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({'weights': torch.zeros(1)}, tmp_path / 'foreign.pth')
    with pytest.raises(CheckpointError, match='no nnU-Net v2 checkpoint'):
        load_checkpoint(tmp_path / 'foreign.pth')


def test_a_presegmenter_folder_that_does_not_exist_is_named(scratch_results, monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', '/nowhere/model')
    with pytest.raises(PresegmenterError, match='/nowhere/model, which does not exist'):
        initialise()


def test_a_presegmenter_can_be_named_by_its_folder(scratch_results, monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', str(stock_file(scratch_results).parents[1]))
    initialise()


@pytest.mark.parametrize(('variable', 'value'), [
    ('nnUNet_pdddpm_start', 'high'), ('nnUNet_pdddpm_step', '3'), ('nnUNet_pdddpm_t_start', '500')])
def test_a_wrong_environment_variable_stops_training_before_anything_is_written(scratch_results, monkeypatch, variable,
                                                                                value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable):
        initialise()
    assert not (scratch_results / DATASET / f'{REFINED}__{PLANS}__3d_fullres').exists()


def test_the_variable_that_names_the_benchmarks_data_is_no_setting(scratch_results, monkeypatch):
    monkeypatch.setenv('NNUNET_PDDDPM_DATA', '/data')
    initialise()


def test_an_older_nnunet_is_refused_with_the_command_that_helps(scratch_results, monkeypatch):
    monkeypatch.setattr(versions, 'version', lambda name: '2.7.0')
    with pytest.raises(ImportError, match=r'2\.7\.0 is installed: pip install "nnunetv2>=2\.8,<3"'):
        initialise()
