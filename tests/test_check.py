"""nnUNetv2_pdddpm_check names what is missing and what to do, and exits with 1 exactly then."""
from __future__ import annotations

import json
import os
import platform
import re
import shlex
from pathlib import Path

import nnunetv2
import numpy as np
import pytest
import torch
from conftest import DATASET, DATASET_ID, PLANS, run_command
from nnunetv2.utilities import find_objects
from tiny_model import architecture

import nnunet_pdddpm
from nnunet_pdddpm.commands import check
from nnunet_pdddpm.commands.check import find_trainer
from nnunet_pdddpm.diffusion.levels import even_table
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers
from nnunet_pdddpm.network.state import (
    CALIBRATION,
    CALIBRATION_FIELDS,
    QUALITY,
    QUALITY_FIELDS,
    QUALITY_ROWS,
    SETTING,
)
from nnunet_pdddpm.training.presegmenters import TrainingContext

CHECKOUT = Path(__file__).parents[1]
FOLDERS = ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results')
STOCK, REFINED = f'nnUNetTrainer__{PLANS}__3d_fullres', f'PDDDPMTrainer__{PLANS}__3d_fullres'


class Checker:
    """Runs the command within this process, with nnU-Net's three folders below `root`."""

    def __init__(self, root: Path, capsys) -> None:
        self.root, self.capsys = root, capsys
        self.results = root / 'nnUNet_results' / DATASET
        self.preprocessed = root / 'nnUNet_preprocessed' / DATASET

    def __call__(self, *arguments: str) -> tuple[int, str, list[str]]:
        """Exit status, everything printed, and the problems."""
        try:
            check.main(arguments)
            status = 0
        except SystemExit as error:
            status = int(error.code)
        output = self.capsys.readouterr().out
        problems = re.findall(r'^Problem: (.*)$', output, re.MULTILINE)
        assert status == bool(problems) and ('Ready.' in output) != bool(problems), output
        return status, output, problems

    def problem(self, *arguments: str) -> str:
        """The only problem there is, a line that ends the output."""
        _, output, problems = self(*arguments)
        assert len(problems) == 1 and output.endswith(f'{problems[0]}\n'), output
        return problems[0]

    def train(self, model: str, fold: int | str, settings: SamplingSettings = SamplingSettings(), **changes) -> Path:
        """Write a checkpoint as nnU-Net does; of a refined model only what is looked at."""
        plans = json.loads((self.preprocessed / f'{PLANS}.json').read_text())
        dataset_json = json.loads((self.preprocessed / 'dataset.json').read_text())
        file = self.results / model / f'fold_{fold}' / 'checkpoint_final.pth'
        file.parent.mkdir(parents=True)
        init_args = {'plans': plans, 'configuration': '3d_fullres', 'fold': fold, 'dataset_json': dataset_json}
        weights = TrainingContext(plans, '3d_fullres', dataset_json).planned_network().state_dict()
        if model.startswith('PDDDPM'):
            table = even_table(-11.0, 41)
            weights = {'level_log_snr': torch.tensor(table.log_snr), 'level_share': torch.tensor(table.share),
                       'level_cross_entropy': torch.zeros(41), 'level_count': torch.zeros(41),
                       CALIBRATION: torch.zeros(1, 3, CALIBRATION_FIELDS),
                       QUALITY: torch.zeros(QUALITY_ROWS, 3, QUALITY_FIELDS),
                       **{SETTING + name: torch.tensor(value) for name, value in as_numbers(settings).items()}}
        torch.save({'network_weights': weights, 'trainer_name': model, 'init_args': {**init_args, **changes}}, file)
        return file


@pytest.fixture
def checker(tmp_path, monkeypatch, capsys) -> Checker:
    """A data set with two configurations, of which 3d_fullres is preprocessed, and no trained model."""
    for name in [*FOLDERS, *(v for v in os.environ if v.lower().startswith('nnunet_pdddpm_'))]:
        monkeypatch.delenv(name, raising=False)
    for name in FOLDERS:
        (tmp_path / name / DATASET).mkdir(parents=True)
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(check, 'find_trainer', lambda trainer: '')  # nnU-Net's search takes seconds
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    checker = Checker(tmp_path, capsys)
    plans = {'dataset_name': DATASET, 'plans_name': PLANS, 'configurations': {
        name: {'data_identifier': f'{PLANS}_{name}', 'patch_size': [16] * int(name[0]),
               'architecture': architecture(int(name[0]))}
        for name in ('2d', '3d_fullres')}}
    (checker.preprocessed / f'{PLANS}.json').write_text(json.dumps(plans))
    (checker.preprocessed / 'dataset.json').write_text(json.dumps(
        {'labels': {'background': 0, 'organ': 1}, 'channel_names': {'0': 'CT'}}))
    (checker.preprocessed / f'{PLANS}_3d_fullres').mkdir()
    return checker


@pytest.fixture
def external_search(checker, monkeypatch):
    """nnU-Net's own search, as if nothing of this package were installed into nnunetv2."""
    search = find_objects.recursive_find_python_class

    def among_external_trainers(folder, name, module, *args, **kwargs):
        return None if module == 'nnunetv2.training.nnUNetTrainer' else search(folder, name, module, *args, **kwargs)

    monkeypatch.setattr(find_objects, 'recursive_find_python_class', among_external_trainers)
    monkeypatch.setattr(check, 'find_trainer', find_trainer)
    monkeypatch.setattr(check, 'SHIM', Path('not', 'installed'))
    monkeypatch.setattr(nnunet_pdddpm, '__file__', str(CHECKOUT / 'nnunet_pdddpm' / '__init__.py'))
    monkeypatch.delenv('nnUNet_extTrainer', raising=False)


# what every data set needs --------------------------------------------------------------------------------------------

def test_without_a_data_set_versions_folders_and_devices_are_shown(checker):
    status, output, _ = checker()
    assert status == 0 and output.endswith('nnUNetv2_pdddpm_check DATASET\n')
    for name in FOLDERS:
        assert re.search(rf'^  {name} +{re.escape(str(checker.root / name))}$', output, re.MULTILINE)
    for name, value in {'nnunet-pdddpm': nnunet_pdddpm.__version__, 'torch': torch.__version__,
                        'numpy': np.__version__, 'Python': platform.python_version(),
                        'cpu': f'{os.cpu_count()} cores'}.items():
        assert re.search(rf'^  {name} +{re.escape(value)}( in .*)?$', output, re.MULTILINE)


@pytest.mark.parametrize('variable', ['nnUNet_preprocessed', 'nnUNet_results'])
@pytest.mark.parametrize('value, says', [(None, 'not set'), ('/not/there', '/not/there does not exist')])
def test_a_needed_folder_that_is_not_there_is_a_problem_with_its_remedy(checker, monkeypatch, variable, value, says):
    monkeypatch.delenv(variable) if value is None else monkeypatch.setenv(variable, value)
    problem = checker.problem(str(DATASET_ID))
    assert problem.startswith(f'{variable}: {says}.') and f'export {variable}=' in problem


def test_nnunet_raw_is_not_needed(checker, monkeypatch):
    monkeypatch.delenv('nnUNet_raw')
    status, output, _ = checker()
    assert status == 0 and re.search('nnUNet_raw +not set', output)


@pytest.mark.parametrize('variable, value, says', [
    ('nnUNet_pdddpm_steps', 'many', 'must be a whole number, got "many"'),
    ('nnUNet_pdddpm_start', '1.5', 'must lie in 0 to 1'),
    ('nnUNet_pdddpm_samples_from', 'noise', 'must be one of chain, stock, blind'),
    ('NNUNET_PDDDPM_STEPS', 'many', 'must be a whole number, got "many"'),  # as Windows gives it
    ('nnUNet_pdddpm_t_start', '500', 'nnUNet_pdddpm_t_start is unknown')])
def test_wrong_environment_variables_are_shown_and_reported(checker, monkeypatch, variable, value, says):
    monkeypatch.setenv(variable, value)
    _, output, (problem,) = checker()
    assert says in problem and re.search(rf'^  {variable} +{value}$', output, re.MULTILINE)


def test_an_old_nnunet_is_reported_with_the_command_that_replaces_it(checker, monkeypatch):
    monkeypatch.setattr('nnunet_pdddpm.versions.version', lambda name: '2.5.1')
    assert 'pip install "nnunetv2>=2.8,<3"' in checker.problem()


def test_a_configuration_without_a_data_set_is_refused(checker, capsys):
    with pytest.raises(SystemExit):
        check.main(['-c', '2d'])
    assert '-c needs a DATASET' in capsys.readouterr().err


# the route on which nnU-Net finds the trainer -------------------------------------------------------------------------

def test_trainers_installed_in_nnunet_are_found(checker, tmp_path, monkeypatch):
    shim = tmp_path / 'nnunetv2' / 'training' / 'nnUNetTrainer' / 'variants' / 'pdddpm'
    shim.mkdir(parents=True)
    (shim / 'PDDDPMTrainer.py').touch()
    monkeypatch.setattr(nnunetv2, '__path__', [str(tmp_path / 'nnunetv2')])
    status, output, _ = checker()
    assert status == 0 and f'installed in nnunetv2: {shim}' in output


def test_without_a_route_the_export_line_is_given_and_works(checker, external_search, tmp_path, monkeypatch):
    assert checker.problem().endswith(f': export nnUNet_extTrainer={CHECKOUT / "trainers"}')
    (tmp_path / 'my trainers').mkdir()
    monkeypatch.setenv('nnUNet_extTrainer', f'{tmp_path}/my trainers')
    value = f'{tmp_path}/my trainers{os.pathsep}{CHECKOUT / "trainers"}'
    assert checker.problem().endswith(f': export nnUNet_extTrainer={shlex.quote(value)}')
    monkeypatch.setenv('nnUNet_extTrainer', value)
    status, output, _ = checker()
    assert status == 0 and f'by nnUNet_extTrainer: {CHECKOUT / "trainers"}\n' in output
    assert output.startswith('Versions') and 'Searching' not in output


def test_without_a_checkout_the_advice_is_to_install_the_wheel(checker, external_search, tmp_path, monkeypatch):
    monkeypatch.setattr(nnunet_pdddpm, '__file__', str(tmp_path / 'nnunet_pdddpm' / '__init__.py'))
    assert 'pip install . (without -e)' in checker.problem()


def test_the_shims_of_a_wheel_beside_another_nnunet_are_offered(checker, external_search, tmp_path, monkeypatch):
    monkeypatch.setattr(nnunet_pdddpm, '__file__', str(tmp_path / 'nnunet_pdddpm' / '__init__.py'))
    (tmp_path / check.SHIM).mkdir(parents=True)
    (tmp_path / check.SHIM / 'PDDDPMTrainer.py').touch()
    assert checker.problem().endswith(f': export nnUNet_extTrainer={tmp_path / check.SHIM}')


@pytest.mark.parametrize(('content', 'says'), [
    ('import no_such_module', "No module named 'no_such_module'"), ('1 / 0', 'ZeroDivisionError: division by zero'),
    ('open("/no/such/file")', 'FileNotFoundError'), ('{}["a"]', "KeyError: 'a'")])
def test_a_broken_trainer_in_the_way_of_the_search_is_reported(checker, external_search, tmp_path, monkeypatch, content,
                                                               says):
    (tmp_path / 'a_trainer_of_mine.py').write_text(content)
    monkeypatch.setenv('nnUNet_extTrainer', str(tmp_path))
    assert says in checker.problem()


def test_an_editable_nnunet_hidden_by_the_installed_shims_is_explained(checker, external_search, monkeypatch):
    monkeypatch.delattr(nnunetv2, '__file__')
    assert '--config-settings editable_mode=compat' in checker.problem()


# one data set ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('arguments, says', [
    (['Hippocampus'], 'DATASET must be an id such as 4'),
    (['999'], 'Could not find a dataset with the ID 999:'),
    (['Dataset999_No'], 'There is no data set Dataset999_No'),
    ([str(DATASET_ID)], f'{DATASET} has no plans nnUNetPlans: choose from {PLANS}'),
    ([str(DATASET_ID), '-p', PLANS, '-c', '4d'], 'no configuration 4d: choose from 2d, 3d_fullres'),
    ([str(DATASET_ID), '-p', PLANS, '-c', '2d'], f'nnUNetv2_preprocess -d {DATASET_ID} -plans_name {PLANS} -c 2d')])
def test_what_nnunet_does_not_know_is_refused_in_one_sentence(checker, arguments, says):
    assert says in checker.problem(*arguments)


def test_an_id_of_two_data_sets_is_refused_with_their_names(checker):
    twin = checker.root / 'nnUNet_raw' / f'Dataset{DATASET_ID}_Twin'
    twin.mkdir()
    said = checker.problem(str(DATASET_ID))
    assert f'for dataset id {DATASET_ID} ({DATASET}, {twin.name}): there must be one' in said


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"configurations": {"2d": {}}}',
                                     '{"configurations": {"2d": {"inherits_from": []}}, "dataset_name": 7}'])
def test_unreadable_plans_are_reported_with_the_command_that_makes_them(checker, content):
    (checker.preprocessed / f'{PLANS}.json').write_text(content)
    assert checker.problem(DATASET, '-p', PLANS).endswith(f'nnUNetv2_plan_and_preprocess -d {DATASET_ID}')


def test_a_data_set_that_is_only_raw_is_reported_with_the_command_that_preprocesses_it(checker):
    (checker.root / 'nnUNet_raw' / 'Dataset702_Raw').mkdir()
    assert checker.problem('702') == 'Dataset702_Raw is not preprocessed: nnUNetv2_plan_and_preprocess -d 702'


@pytest.mark.parametrize('presegmenter', ['nnUNetTrainer', 'nnUNetTrainer_5epochs'])
def test_without_a_stock_model_the_command_that_trains_it_is_given(checker, monkeypatch, presegmenter):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', presegmenter)
    command = f'nnUNetv2_train {DATASET_ID} 3d_fullres 0 -tr {presegmenter} -p {PLANS} -device cpu'
    assert checker.problem(str(DATASET_ID), '-p', PLANS, '-c', '3d_fullres').endswith(command)
    _, _, problems = checker(str(DATASET_ID), '-p', PLANS)
    assert len(problems) == 2 and problems[1].endswith(command)


def test_one_trained_configuration_is_enough_unless_another_is_asked_for(checker):
    checker.train(STOCK, 1)
    status, output, _ = checker(str(DATASET_ID), '-p', PLANS)
    assert status == 0 and f'not preprocessed for 2d: nnUNetv2_preprocess -d {DATASET_ID}' in output
    assert checker(str(DATASET_ID), '-p', PLANS, '-c', '3d_fullres')[0] == 0
    assert checker(str(DATASET_ID), '-p', PLANS, '-c', '2d')[0] == 1


@pytest.mark.parametrize('model', [STOCK, REFINED])
def test_a_truncated_checkpoint_is_a_problem_for_all_folds(checker, model):
    checker.train(STOCK, 0)
    file = checker.train(model, 2)
    file.write_bytes(file.read_bytes()[:500])
    problem = checker.problem(str(DATASET_ID), '-p', PLANS)
    assert str(file) in problem and 'is truncated or no checkpoint; train or copy it again.' in problem


def test_an_override_that_a_trained_model_cannot_take_is_a_problem_of_that_model(checker, monkeypatch):
    checker.train(STOCK, 0)
    checker.train(REFINED, 0, SamplingSettings(mask_stock=0.0, mask_blind=0.25))
    blind = checker.train(REFINED, 1)  # its mask is the blind mask alone
    monkeypatch.setenv('nnUNet_pdddpm_mask_stock', '0.5')
    problem = checker.problem(str(DATASET_ID), '-p', PLANS)
    assert problem.startswith(f'The model {blind} cannot be used for prediction: mask_stock=0.5 and mask_blind=1')
    monkeypatch.setenv('nnUNet_pdddpm_mask_blind', '0.5')
    assert checker(str(DATASET_ID), '-p', PLANS)[0] == 0
    monkeypatch.setenv('nnUNet_pdddpm_mask_stock', '0.75')  # no model takes both: told once
    assert 'mask_stock=0.75 and mask_blind=0.5 in the environment variables' in checker.problem(
        str(DATASET_ID), '-p', PLANS)


def test_a_model_of_another_version_is_a_problem_in_one_sentence(checker):
    checker.train(STOCK, 0)
    checker.train(REFINED, 1)
    file = checker.train(REFINED, 0)
    earlier = {name: torch.tensor(value) for name, value in
               {'t_max': 1000, 't_start': 700, 'steps': 1, 'sampler_t_start': 700, 'sampler_steps': 1}.items()}
    torch.save({**torch.load(file), 'network_weights': earlier}, file)
    assert checker.problem(str(DATASET_ID), '-p', PLANS) == (
        f'The model {file} is of another version of PDDDPMTrainer: train it again with this version.')


def test_a_choice_that_this_version_does_not_know_is_a_problem_of_that_model(checker):
    checker.train(STOCK, 0)
    file = checker.train(REFINED, 0)
    content = torch.load(file)
    content['network_weights'][SETTING + 'samples_from'] = torch.tensor(3)
    torch.save(content, file)
    assert checker.problem(str(DATASET_ID), '-p', PLANS).startswith(
        f"The model {file} cannot be used for prediction: samples_from=3 in the model's sampling settings is unknown")


def test_a_model_whose_noise_levels_are_not_in_order_is_a_problem_of_that_model(checker):
    checker.train(STOCK, 0)
    file = checker.train(REFINED, 0)
    checkpoint = torch.load(file)
    checkpoint['network_weights']['level_share'][3] = 1
    torch.save(checkpoint, file)
    problem = checker.problem(str(DATASET_ID), '-p', PLANS)
    assert problem.startswith(f'The model {file} cannot be used for prediction: The table of noise levels is not ')


def test_a_stock_model_of_other_labels_is_a_problem(checker):
    file = checker.train(STOCK, 0, dataset_json={'labels': {'background': 0}})
    problem = checker.problem(str(DATASET_ID), '-p', PLANS)
    assert problem.startswith(f'The stock model {file} does not fit: labels was')


def test_a_model_folder_in_the_environment_stands_for_its_configuration(checker, tmp_path, monkeypatch):
    checker.train(STOCK, 0)
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', f'{checker.results / STOCK}{os.sep}')
    status, output, _ = checker(str(DATASET_ID), '-p', PLANS)
    assert status == 0 and ' 2d' not in output
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', str(tmp_path / 'nowhere'))
    assert 'nowhere, which does not exist' in checker.problem(str(DATASET_ID), '-p', PLANS)


def test_the_next_fold_to_train_and_every_trained_model_are_offered(checker):
    for model, folds in {STOCK: (0, 1, 3, 'all'), REFINED: (0, 1),
                         REFINED.replace('__', '_5epochs__', 1): ('all', 10, 2)}.items():
        for fold in folds:
            checker.train(model, fold)
    (checker.results / STOCK / 'fold_4').mkdir()
    status, output, _ = checker(DATASET, '-p', PLANS)
    assert status == 0 and 'trained folds: 0, 1, 3, all in' in output
    assert re.search('PDDDPMTrainer_5epochs +trained folds: 2, 10, all\n', output)
    predict = f'nnUNetv2_pdddpm_predict -i INPUT_FOLDER -o OUTPUT_FOLDER -d {DATASET} -c 3d_fullres -tr'
    assert output.endswith(f"""Ready. What can be run next:
  nnUNetv2_train {DATASET} 3d_fullres 3 -tr PDDDPMTrainer -p {PLANS} -device cpu
  {predict} PDDDPMTrainer -p {PLANS} -f 0 1 -device cpu --save_samples --report
  {predict} PDDDPMTrainer_5epochs -p {PLANS} -f 2 10 all -device cpu --save_samples --report
""")


def test_trained_models_are_ready_and_the_command_runs(refined):
    result = run_command('nnUNetv2_pdddpm_check', str(DATASET_ID), '-p', PLANS)
    assert result.returncode == 0, result.stdout
    assert f'nnUNetv2_train {DATASET_ID} 3d_fullres 0 -tr PDDDPMTrainer -p {PLANS}' in result.stdout
    assert f'-tr PDDDPMTrainerTiny -p {PLANS} -f 0 1' in result.stdout
