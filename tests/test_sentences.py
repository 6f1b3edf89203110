"""Sentences that name the fault and its remedy as the command at hand knows them; and help that gives every default."""
from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from tiny_model import DATASET, plans, write_model

from nnunet_pdddpm.commands import check, demo, evaluate, predict, tune
from nnunet_pdddpm.inference.case import OutputInUse, PendingCase
from nnunet_pdddpm.inference.errors import CasesFailed, PredictionError
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import CHOICES, RANGES

DESCRIPTION = {'channel_names': {'0': 'T1'}, 'file_ending': '.nii.gz', 'numTraining': 1,
               'labels': {'background': 0, 'cell': 1}}
FLAGS = ('-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar', '--disable_tta')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model and two images."""
    write_model(tmp_path / 'model', plans('SimpleITKIO', 3, 1), DESCRIPTION)
    (tmp_path / 'images').mkdir()
    for case in 'ab':
        array = np.random.default_rng(ord(case)).normal(100, 40, (8, 20, 22)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / 'images' / f'{case}_0000.nii.gz'))
    return tmp_path


def run(root: Path, *flags: str, images: str = 'images') -> Path:
    predict.main_modelfolder(['-m', str(root / 'model'), '-i', str(root / images), '-o', str(root / 'out'), *FLAGS,
                              *flags])
    return root / 'out'


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*args, **kwargs)
    message = str(stop.value.code)
    assert message.startswith('Error: ') and '\n' not in message
    return message


def test_a_file_given_as_the_input_folder_is_called_one(root):
    assert refused(run, root, images='images/a_0000.nii.gz').endswith(
        'a_0000.nii.gz is a file: name the folder that it lies in.')
    assert refused(run, root, images='nowhere').endswith('nowhere does not exist.')


def test_an_image_of_four_dimensions_is_named_and_the_others_are_done(root):
    volumes = [sitk.GetImageFromArray(np.random.default_rng(i).normal(size=(8, 20, 22))) for i in range(2)]
    sitk.WriteImage(sitk.JoinSeries(volumes), str(root / 'images' / 'two_0000.nii.gz'))
    said = refused(run, root)
    assert said.startswith('Error: 1 of 3 cases')
    assert 'two_0000.nii.gz has 4 dimensions, which no mask is written with: save every volume in it' in said
    assert {file.name for file in (root / 'out').glob('*.nii.gz')} == {'a.nii.gz', 'b.nii.gz'}


@pytest.mark.parametrize('content', ['', '{"case": "a", "lab', 'null'])
def test_a_case_whose_file_is_empty_or_torn_after_a_loss_of_power_is_predicted_again(root, capsys, content):
    out = run(root)
    before = {file.name: file.read_bytes() for file in out.glob('*.nii.gz')}
    (out / 'pdddpm_cases' / 'a.json').write_text(content)
    capsys.readouterr()
    run(root, '--continue_prediction')
    said = capsys.readouterr()
    assert f'{out / "pdddpm_cases" / "a.json"} is empty or damaged: a does not count as predicted' in said.err
    assert '1 cases are done, 1 are left.' in said.out
    rows = json.loads((out / 'pdddpm_summary.json').read_text())['cases']
    assert [row['case'] for row in rows] == ['a', 'b']
    assert {file.name: file.read_bytes() for file in out.glob('*.nii.gz')} == before


def test_masks_of_another_source_are_named_in_one_line_and_the_other_cases_are_done(root, capsys):
    shutil.copy(root / 'images' / 'b_0000.nii.gz', root / 'images' / 'c_0000.nii.gz')
    out = run(root)
    done = (out / 'c.nii.gz').read_bytes()
    for case in 'ab':  # one corrected by hand, one by another command, one missing
        sitk.WriteImage(sitk.GetImageFromArray(np.ones((8, 20, 22), np.uint8)), str(out / f'{case}.nii.gz'))
    mine = (out / 'a.nii.gz').read_bytes()
    (out / 'pdddpm_cases' / 'b.json').unlink()
    (out / 'c.nii.gz').unlink()
    capsys.readouterr()
    run(root, '--continue_prediction')
    said = capsys.readouterr()
    line, = [line for line in said.err.splitlines() if 'masks stay as they are' in line]
    assert line.startswith('2 masks') and f'{out / "a.nii.gz"} was changed or replaced' in line
    assert f'{out / "b.nii.gz"} was not written by nnUNetv2_pdddpm_predict' in line
    assert '0 cases are done, 1 are left.' in said.out and (out / 'c.nii.gz').read_bytes() == done
    assert [(out / f'{case}.nii.gz').read_bytes() for case in 'ab'] == [mine, mine]
    assert [row['case'] for row in json.loads((out / 'pdddpm_summary.json').read_text())['cases']] == ['c']


@pytest.mark.parametrize('name', ['plans.json', 'dataset.json'])
def test_an_empty_file_of_a_model_is_named(root, name):
    (root / 'model' / name).write_text('')
    assert refused(run, root) == (f'Error: {root / "model" / name} is empty or damaged: copy it again from where the '
                                  f'model was trained.')


@pytest.mark.parametrize(('name', 'content'), [
    ('plans.json', '{}'), ('plans.json', '{"configurations": []}'), ('dataset.json', '{}'),
    ('plans.json', '{"configurations": {"3d_fullres": 7}}')])
def test_a_file_of_a_model_that_is_none_of_it_is_refused(root, name, content):
    (root / 'model' / name).write_text(content)
    said = refused(run, root)
    assert 'plans.json and dataset.json' in said and str(root / 'model') in said and 'Put back the files' in said


def test_a_fold_that_is_named_twice_is_refused(root):
    assert refused(run, root, '-f', '0', '0') == 'Error: Fold 0 is named twice: name each fold once with -f.'
    with pytest.raises(PredictionError, match='^Fold 0 is named twice'):
        VolumePredictor(device=torch.device('cpu')).initialize_from_trained_model_folder(str(root / 'model'), (0, '0'))
    assert not (root / 'out').exists()


def test_a_trainer_that_nnunet_does_not_find_is_named(root):
    file = root / 'model' / 'fold_0' / 'checkpoint_final.pth'
    torch.save({**torch.load(file, weights_only=False), 'trainer_name': 'PDDDPMTrainerOfMine'}, file)
    said = refused(run, root)
    assert said.startswith(f'Error: nnU-Net does not find PDDDPMTrainerOfMine, by which the model in {root / "model"} '
                           f'was trained: put the folder of its file into nnUNet_extTrainer')
    assert not (root / 'out').exists()


def test_predictions_of_a_previous_stage_are_refused_for_a_model_that_is_no_cascade(root):
    assert refused(run, root, '-prev_stage_predictions', str(root / 'images')) == (
        'Error: This model is no cascade: leave out -prev_stage_predictions.')
    assert not (root / 'out').exists()


@pytest.mark.parametrize(('variable', 'value', 'said'), [
    ('nnUNet_pdddpm_start', '1.5', 'nnUNet_pdddpm_start=1.5 in the environment variables is out of range: it must lie '
                                   'in 0 to 1.'),
    ('nnUNet_pdddpm_temperature', 'nan', 'nnUNet_pdddpm_temperature=nan in the environment'),
    ('nnUNet_pdddpm_start_mask', 'soft', 'nnUNet_pdddpm_start_mask=soft in the environment variables is unknown: it '
                                         'must be one of drawn, hard.')])
def test_an_environment_variable_is_refused_by_its_own_name(root, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    assert refused(run, root).startswith(f'Error: {said}')


@pytest.mark.parametrize('value', ['many', '-1', '1.5'])
def test_a_wrong_number_of_processes_is_refused_by_the_name_of_its_variable_or_flag(root, monkeypatch, capsys, value):
    with pytest.raises(SystemExit):
        run(root, '-nps', value)
    assert 'nps' in capsys.readouterr().err
    monkeypatch.setenv('nnUNet_npp', value)
    with pytest.raises(SystemExit) as stop:
        run(root)
    assert stop.value.code == 2
    assert f'the environment variable nnUNet_npp must be a whole number from 0 on, got "{value}"' in \
        capsys.readouterr().err


@pytest.mark.parametrize(('command', 'arguments', 'flag'), [
    (predict.main, ['-d', '731', '-c', '2d', '-i', 'x', '-o', 'y', *FLAGS], '-d'),
    (tune.main, ['731', '2d', '0', '-device', 'cpu'], 'DATASET')])
def test_an_id_of_no_or_of_two_data_sets_is_refused_with_their_names(tmp_path, monkeypatch, command, arguments, flag):
    for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results'):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    rest = 'the variables nnUNet_results, nnUNet_raw and nnUNet_preprocessed.'
    assert refused(command, arguments) == f'Error: There is no data set with the id 731: correct {flag}, or {rest}'
    for name in ('Dataset731_One', 'Dataset731_Other'):
        (tmp_path / 'nnUNet_raw' / name).mkdir()
    assert refused(command, arguments) == (f'Error: 2 data sets have the id 731 (Dataset731_One, Dataset731_Other): '
                                           f'name one of them in {flag}, or {rest}')


@pytest.mark.parametrize('dataset', ['731', 'Dataset731_One'])
def test_without_nnunet_results_the_variable_is_named(monkeypatch, dataset):
    monkeypatch.delenv('nnUNet_results', raising=False)
    for command, arguments in ((predict.main, ['-d', dataset, '-c', '2d', '-i', 'x', '-o', 'y', *FLAGS]),
                               (tune.main, [dataset, '2d', '0', '-device', 'cpu'])):
        assert refused(command, arguments) == (
            'Error: The variable nnUNet_results is not set: it names the folder of the trained models.')


@pytest.fixture
def in_results(root, monkeypatch) -> Path:
    """The model, where nnU-Net looks for it."""
    model = root / 'results' / DATASET / 'PDDDPMTrainer__nnUNetPlans__3d_fullres'
    model.parent.mkdir(parents=True)
    (root / 'model').rename(model)
    monkeypatch.setenv('nnUNet_results', str(root / 'results'))
    return model


def test_without_preprocessed_cases_the_variable_or_the_missing_file_is_named(root, in_results, monkeypatch):
    arguments, folder = [DATASET, '3d_fullres', '0', '-device', 'cpu'], root / 'preprocessed' / DATASET
    monkeypatch.delenv('nnUNet_preprocessed', raising=False)
    assert refused(tune.main, arguments) == (
        'Error: The variable nnUNet_preprocessed is not set: it names the folder of the preprocessed cases.')
    monkeypatch.setenv('nnUNet_preprocessed', str(folder.parent))
    folder.mkdir(parents=True)
    for name in ('nnUNetPlans.json', 'dataset.json'):
        assert refused(tune.main, arguments).startswith(f'Error: {folder / name} is missing: the validation cases have')
        (folder / name).write_text('{}')


def test_a_model_that_cannot_be_tuned_is_refused_without_flags_that_tuning_has_not(in_results):
    model = in_results
    file = model / 'fold_0' / 'checkpoint_final.pth'
    checkpoint = torch.load(file, weights_only=False)
    weights = checkpoint['network_weights']
    weights[next(name for name in weights if name.startswith('denoiser.'))].fill_(np.nan)
    torch.save(checkpoint, file)
    arguments = [DATASET, '3d_fullres', '0', '-device', 'cpu']
    assert 'NaN or infinite weights' in (said := refused(tune.main, arguments))
    assert said.endswith('(nnUNetv2_pdddpm_predict -chk checkpoint_best.pth).')
    (model / 'plans.json').unlink()
    assert refused(tune.main, arguments).endswith(
        'or correct the data set, configuration, trainer and plans that name it.')


# help

class Captured(Exception):
    """Carries a parser out of a command."""


@pytest.mark.parametrize('command', [predict.main, predict.main_modelfolder, check.main, evaluate.main, tune.main,
                                     demo.main])
def test_help_gives_the_default_of_every_flag_and_the_range_of_every_setting(monkeypatch, command):
    def parse_args(self, *_):
        raise Captured(self)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    monkeypatch.setattr(sys, 'argv', ['command'])
    with pytest.raises(Captured) as captured:
        command()
    parser: argparse.ArgumentParser = captured.value.args[0]
    text = ' '.join(parser.format_help().split())
    for action in parser._actions:
        if action.required or isinstance(action, argparse._HelpAction):
            assert action.help
            continue
        assert 'default' in (action.help or ''), action.dest
        if action.container.title == 'sampling':
            has_variable = action.dest in RANGES or action.dest in CHOICES
            assert ('no variable' in action.help) != has_variable, action.dest
        if action.type in (int, float) and action.dest not in ('npp', 'nps'):
            assert any(word in action.help for word in (' to ', 'above', 'from')), action.dest
        if action.dest in RANGES:
            low, high = RANGES[action.dest]
            assert f'{low:g} to {high}' in text
    if command in (predict.main, predict.main_modelfolder):
        without = re.search('have a variable but no flag: ([^.]*)[.]', text)
        assert {*without[1].split(', ')} == {*RANGES, *CHOICES} - {action.dest for action in parser._actions}


def deleting(case: PendingCase, move_to_output) -> None:
    move_to_output(case)
    shutil.rmtree(case.output)


def killed(case: PendingCase, move_to_output) -> None:
    raise BrokenProcessPool


def held(case: PendingCase, move_to_output) -> None:
    raise OutputInUse('another process predicts it.')


@pytest.mark.parametrize(('ends', 'said_then'), [
    (deleting, 'is not there any more, nor may others be'), (killed, 'A background process was killed'),
    (held, 'another process predicts it')])
def test_a_failed_case_does_not_hide_that_others_are_not_done(root, monkeypatch, ends, said_then):
    (root / 'images' / '0bad_0000.nii.gz').write_bytes(b'')
    move_to_output = PendingCase.move_to_output
    monkeypatch.setattr(PendingCase, 'move_to_output', lambda self: ends(self, move_to_output))
    said = refused(run, root)
    assert said_then in said and 'others are done' not in said
    assert said.endswith('Besides, these cases could not be predicted: 0bad (0bad_0000.nii.gz is empty).')


def test_what_failed_is_forgotten_in_a_further_prediction_that_has_nothing_to_do(root):
    (root / 'images' / 'bad_0000.nii.gz').write_bytes(b'')
    predictor = PDDDPMPredictor(use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(root / 'model'), (0,))

    def predict_cases(*cases: str) -> None:
        predictor.predict_from_files_sequential([[str(root / 'images' / f'{case}_0000.nii.gz')] for case in cases],
                                                str(root / 'out'), overwrite=False)
    with pytest.raises(CasesFailed):
        predict_cases('a', 'bad')
    assert list(predictor.failed) == ['bad']
    predict_cases('a')
    assert predictor.failed == {}
