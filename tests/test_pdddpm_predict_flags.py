"""Flags of nnUNetv2_pdddpm_predict: what is refused, and those that it has in common with nnU-Net's command."""
from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATASET, STOCK, Workspace
from nnunetv2.inference import predict_from_raw_data
from predicting import QUICK, arguments, command, model_folder, predict, refusal, rows

from nnunet_pdddpm.commands.predict import NO_FLAG, SETTINGS, main, main_modelfolder
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.network.settings import CHOICES, KINDS, RANGES, SamplingSettings
from nnunet_pdddpm.tuning.stored import store


@pytest.fixture(scope='module')
def one_case(refined: Workspace, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('one_image')
    shutil.copy(refined.raw / 'imagesTs' / 'phantom_009_0000.nii.gz', folder)
    return folder


def test_what_cannot_be_predicted_is_refused_in_one_sentence_and_nothing_is_written(one_case, tmp_path,
                                                                                    monkeypatch):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'two_channels').mkdir()
    for channel in range(2):
        shutil.copy(one_case / 'phantom_009_0000.nii.gz', tmp_path / 'two_channels' / f'case_{channel:04d}.nii.gz')
    out = tmp_path / 'out'
    refusals = {
        'no PDDDPM trainer': refusal(predict, one_case, out, trainer=STOCK),
        'no trained model in': refusal(predict, one_case, out, trainer='PDDDPMTrainerNotThere'),
        'fold_2/checkpoint_final.pth': refusal(predict, one_case, out, folds=(0, 2)),
        'fold_all/checkpoint_final.pth': refusal(predict, one_case, out, folds=('all',)),
        'checkpoint_other.pth does not exist': refusal(predict, one_case, out, '-chk', 'checkpoint_other.pth'),
        f'{tmp_path / "empty"} holds no images': refusal(predict, tmp_path / 'empty', out),
        f'{tmp_path / "none"} does not exist': refusal(predict, tmp_path / 'none', out),
        'case in ': refusal(predict, tmp_path / 'two_channels', out),
        'There is no data set with the id 799': refusal(predict, one_case, out, '-d', '799'),
    }
    assert 'has 2 channel files, the model needs 1' in refusals['case in ']
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    refusals['There is no cuda device'] = refusal(predict, one_case, out, '-device', 'cuda')
    for what, said in refusals.items():
        assert what.lower() in said.lower(), said
    assert not out.exists()


def test_a_refused_command_exits_with_1(one_case, tmp_path):
    result = command(arguments(one_case, tmp_path / 'out', '-start', '5'))
    assert result.returncode == 1
    assert result.stdout.strip().splitlines()[-1].startswith('Error: start=5.0 ')
    assert not (tmp_path / 'out').exists()


def test_every_sampling_setting_has_a_flag_or_is_named_among_those_without():
    assert sorted([*SETTINGS, *NO_FLAG]) == sorted(KINDS) == sorted([*RANGES, *CHOICES])


@pytest.mark.parametrize('name', [name for name in SETTINGS if name in RANGES])
def test_a_setting_out_of_range_is_refused_with_its_range_and_nothing_is_written(one_case, tmp_path, name):
    low, high = RANGES[name]
    kind = KINDS[name]
    step = 1 if kind is int else 0.01
    for value in [kind(low - step), kind(high + step), *([math.nan, math.inf] if kind is float else [])]:
        assert refusal(predict, one_case, tmp_path / 'out', f'-{name}', str(value)) == (
            f'Error: {name}={value} in the command line and environment is out of range: it must lie in {low} to '
            f'{high}.')
    assert not (tmp_path / 'out').exists()


def test_a_flag_counts_before_the_environment_is_refused(one_case, tmp_path, monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_mask_stock', '0.5')  # and 1 of the blind mask is stored
    assert 'mask_stock=0.5 and mask_blind=1' in refusal(predict, one_case, tmp_path / 'out', *QUICK)
    (row,) = rows(predict(one_case, tmp_path / 'out', *QUICK, '-samples', '1', '-mask_blind', '0.5')).values()
    assert row['settings'][0]['mask_stock'] == row['settings'][0]['mask_blind'] == 0.5


@pytest.mark.parametrize(('folds', 'checkpoint', 'says'), [
    (['0'], 'checkpoint_final.pth', 'nnUNetv2_pdddpm_tune does it'), (['all'], 'checkpoint_final.pth', 'no case out'),
    (['0'], 'checkpoint_best.pth', '--val --val_best does it')])
def test_what_calibrates_a_model_is_said_by_its_fold_and_checkpoint(tmp_path, folds, checkpoint, says):
    folder = tmp_path / DATASET / model_folder().name
    shutil.copytree(model_folder(), folder)
    final = folder / 'fold_0' / 'checkpoint_final.pth'
    store(final.parent, SamplingSettings())  # which drops the calibration
    if folds == ['all']:
        shutil.move(final.parent, folder / 'fold_all')
    predictor = PDDDPMPredictor(device=torch.device('cpu'))
    predictor.initialize_from_trained_model_folder(str(folder), folds, checkpoint)
    assert all(says in label.with_label for label in predictor.calibrated.values())
    assert says in predictor.ranking.describe()


@pytest.mark.parametrize(('flags', 'says'), [
    (('-mask_stock', '0.7', '-mask_blind', '0.5'), 'mask_stock=0.7 and mask_blind=0.5 in the command line and '
                                                   'environment are weights of which the sum cannot be above 1'),
    (('-mask_stock', '0.25'), 'mask_stock=0.25 and mask_blind=1 in')],  # which is stored
    ids=['both named', 'one stored'])
def test_weights_that_sum_to_more_than_1_are_refused(one_case, tmp_path, flags, says):
    assert refusal(predict, one_case, tmp_path / 'out', *flags).startswith(f'Error: {says}')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('flag', 'value'), [('-part_id', '1'), ('-step_size', '0'), ('-step_size', '1.5'),
                                             ('-uncertainty', 'much'), ('-device', 'tpu'), ('-steps', 'two'),
                                             ('-steps', '1.5'), ('-start', 'high'), ('-samples_from', 'truth'),
                                             ('-start_mask', 'hard'), ('-t_start', '300'), ('-eta', '1'),
                                             ('-blend', '0.5'), ('-mask_samples', '2')])
def test_flags_out_of_range_are_refused_by_name(one_case, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as refused:
        predict(one_case, tmp_path / 'out', flag, value)
    assert refused.value.code == 2 and flag.strip('-') in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


# nnU-Net's flags

class Captured(Exception):
    """Carries a parser out of a command."""


def parser_of(entry_point, *args) -> argparse.ArgumentParser:
    def parse_args(self, *_):
        raise Captured(self)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured) as captured:
        patch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
        entry_point(*args)
    return captured.value.args[0]


@pytest.mark.parametrize(('theirs', 'ours'), [
    (predict_from_raw_data.predict_entry_point, main),
    (predict_from_raw_data.predict_entry_point_modelfolder, main_modelfolder)])
def test_every_flag_of_nnunets_command_is_there_with_the_same_default(theirs, ours):
    stock, extended = parser_of(theirs), parser_of(ours, [])
    known = {flag: action for action in extended._actions for flag in action.option_strings}
    flags = [(flag, action) for action in stock._actions for flag in action.option_strings]
    assert len(flags) > 15
    for flag, action in flags:
        assert flag in known, f'{flag} of nnU-Net is not accepted'
        own = known[flag]
        assert (own.nargs, own.required, own.dest) == (action.nargs, action.required, action.dest), flag
        default = {'-tr': 'PDDDPMTrainer', '-f': list(action.default)} if flag in ('-tr', '-f') else {}
        if action.dest != 'help':
            assert own.default == default.get(flag, action.default), flag
        if action.type is not None and flag != '-f':
            assert (own.type or str) == action.type, flag
