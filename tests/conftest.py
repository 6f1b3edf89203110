"""A phantom data set with trained stock models, made once a test session with nnU-Net's own code."""
from __future__ import annotations

import copy
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing.pool import ThreadPool
from pathlib import Path

# Before torch and nnU-Net read them: the tests are run by as many processes as there are cores, so one thread for each,
# and threads that wait leave their core to others. The commands that a test runs inherit it.
os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', nnUNet_def_n_proc='1')

import pytest
import torch
from filelock import FileLock
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.run.run_training import get_trainer_from_args, run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm import logs
from nnunet_pdddpm.demo.phantom import write_dataset

DATASET_ID = 701
DATASET = f'Dataset{DATASET_ID}_Phantom'
PLANS = 'nnUNetPlansTiny'
CASCADE = '3d_cascade_fullres'
STOCK, REFINED = 'nnUNetTrainerTiny', 'PDDDPMTrainerTiny'
BRIEF_STOCK, BRIEF = 'nnUNetTrainerBrief', 'PDDDPMTrainerBrief'  # for what has to run, not to segment


LONGEST = ('test_pdddpm_predict', 'test_labels', 'test_package', 'test_after_training', 'test_training_flags',
           'test_predict', 'test_tune', 'test_images', 'test_plans', 'test_training', 'test_configurations', 'test_api')


def run_command(*command: str, environment: dict[str, str] | None = None, cwd: Path | None = None,
                binaries: Path = Path(sys.executable).parent) -> subprocess.CompletedProcess[str]:
    """Run a console command of the environment; stdout and stderr come back together."""
    return subprocess.run([str(binaries / command[0]), *command[1:]], env={**os.environ, **(environment or {})},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd)


def succeed(*command: str, **kwargs) -> str:
    """Run a command that must exit with 0 and return what it printed."""
    result = run_command(*command, **kwargs)
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def make_trainer(trainer: str, fold: int | str, configuration: str = '3d_fullres',
                 dataset: int = DATASET_ID, plans: str = PLANS) -> nnUNetTrainer:
    """The trainer that `nnUNetv2_train` would make, in this process: importing nnU-Net takes longer than training."""
    return get_trainer_from_args(str(dataset), configuration, fold, trainer, plans, device=torch.device('cpu'))


class ThreadContext:
    """Stands in for multiprocessing's contexts: nnU-Net's pools of processes become pools of threads."""
    Pool = ThreadPool


@contextmanager
def in_this_process(*arguments: str) -> Iterator[None]:
    """Within it, nnU-Net's code runs without child processes, each of which imports it for seconds, in one thread.

    `arguments`: the command line that an entry point is to see, without the command's name.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, 'get_context', lambda method=None: ThreadContext)
        patch.setattr('nnunetv2.utilities.utils.Pool', ThreadPool)
        patch.setattr(multiprocessing, 'cpu_count', lambda: 1)  # commands take it for torch's number of threads
        patch.setattr(sys, 'argv', ['nnUNetv2', *arguments])
        yield


def succeed_in_process(*command: str) -> None:
    """Run a console command of nnU-Net by its entry point, in this process; background processes only as threads."""
    entry_point, = set(entry_points(group='console_scripts', name=command[0]))
    with in_this_process(*command[1:]):
        entry_point.load()()


def train_in_process(dataset: int, configuration: str, fold: int | str, trainer: str, *flags: str,
                     plans: str = PLANS) -> None:
    """`nnUNetv2_train` with its command line, training and final validation, in this process."""
    with in_this_process(str(dataset), configuration, str(fold), '-tr', trainer, '-p', plans, '-device', 'cpu', *flags):
        run_training_entry()


def predict_in_process(source: Path, output: Path, dataset: int, configuration: str, trainer: str, *flags: str,
                       plans: str = PLANS, folds: tuple[int | str, ...] = (0,), mirroring: bool = False) -> None:
    """`nnUNetv2_predict` with its command line, in this process."""
    with in_this_process('-i', str(source), '-o', str(output), '-d', str(dataset), '-c', configuration, '-tr', trainer,
                         '-p', plans, '-f', *map(str, folds), '-device', 'cpu', '-npp', '0', '-nps', '0',
                         *([] if mirroring else ['--disable_tta']), *flags):
        predict_entry_point()


def printed_commands(results: Path, source: Path, output: Path) -> list[list[str]]:
    """What `nnUNetv2_find_best_configuration` says is to be run, in words.

    Args:
        results: folder of the data set's models, where it has left the commands.
        source: with the images, in the place of its INPUT_FOLDER.
        output: folder of its OUTPUT_FOLDERs.
    """
    commands = []
    for line in re.findall(r'^nnUNetv2_.*$', (results / 'inference_instructions.txt').read_text(), re.MULTILINE):
        words = [str(output / word) if word.startswith('OUTPUT_FOLDER') else word
                 for word in line.replace('INPUT_FOLDER', str(source)).split()]
        commands.append([*words, '-device', 'cpu'] if words[0] == 'nnUNetv2_predict' else words)
    return commands


def predict(output: Path, trainer: str, *flags: str, folds: tuple[int, ...] = (0,), source: Path | None = None,
            **kwargs) -> str:
    """The unmodified `nnUNetv2_predict` on the held-out phantoms."""
    source = source or Path(os.environ['nnUNet_raw']) / DATASET / 'imagesTs'
    return succeed('nnUNetv2_predict', '-i', str(source), '-o', str(output), '-d', str(DATASET_ID), '-c', '3d_fullres',
                   '-tr', trainer, '-p', PLANS, '-f', *map(str, folds), '-device', 'cpu', '-npp', '1', '-nps', '1',
                   *flags, **kwargs)


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders, with trained models in them."""
    root: Path

    @property
    def raw(self) -> Path:
        return self.root / 'nnUNet_raw' / DATASET

    @property
    def preprocessed(self) -> Path:
        return self.root / 'nnUNet_preprocessed' / DATASET

    def model(self, trainer: str, configuration: str = '3d_fullres') -> Path:
        return self.root / 'nnUNet_results' / DATASET / f'{trainer}__{PLANS}__{configuration}'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first (with xdist's --no-loadscope-reorder): no process is left alone with one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The commands that a test runs in this process may have set as many as there are cores."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_console() -> Iterator[None]:
    """A command that a test runs in this process shows the log on the console from then on."""
    handlers, level = logs.PACKAGE.handlers[:], logs.PACKAGE.level
    yield
    logs.PACKAGE.handlers[:] = handlers
    logs.PACKAGE.setLevel(level)


@pytest.fixture(scope='session')
def folders(tmp_path_factory) -> Workspace:
    """nnU-Net's three folders in the environment, empty."""
    work = Workspace(tmp_path_factory.mktemp('nnunet'))
    os.environ.update({name: str(work.root / name) for name in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results')})
    os.environ.update(nnUNet_extTrainer=str(Path(__file__).parent / 'trainers'), nnUNet_n_proc_DA='0',
                      nnUNet_pdddpm_presegmenter=STOCK)
    return work


@pytest.fixture(scope='session')
def made_once(tmp_path_factory, folders: Workspace) -> Callable[..., None]:
    """`made_once(name, make, *results)`: the folders `results` in nnU-Net's, made by `make` or copied.

    When several processes share the tests, the first one that needs them makes them and the others copy them, so that
    no process sees what a test of another one writes.
    """
    workers = 'PYTEST_XDIST_WORKER' in os.environ
    shared = tmp_path_factory.getbasetemp().parent / 'made_once' if workers else None

    def made(name: str, make: Callable[[], object], *results: Path) -> None:
        if shared is None:
            make()
            return
        shared.mkdir(exist_ok=True)
        copies = {result: shared / result.relative_to(folders.root) for result in results}
        with FileLock(shared / f'{name}.lock'):
            if not (shared / f'{name}.made').exists():
                make()
                for result, copy in copies.items():
                    shutil.copytree(result, copy, dirs_exist_ok=True)
                (shared / f'{name}.made').touch()
                return
        for result, copy in copies.items():
            shutil.copytree(copy, result, dirs_exist_ok=True)
    return made


@pytest.fixture(scope='session')
def workspace(folders: Workspace, made_once) -> Workspace:
    """A planned and preprocessed phantom data set, split into three folds, with small plans."""
    def make() -> None:
        write_dataset(folders.raw, num_training=9, num_test=2, shape=(20, 26, 22))
        prepare(folders.raw, '3d_fullres')

    made_once('workspace', make, folders.raw, folders.preprocessed)
    return folders


def prepare(raw: Path, *configurations: str, planner: str = 'ExperimentPlanner', folds: int = 3) -> Path:
    """Preprocess by the functions behind nnU-Net's command, with plans of a size for tests; the preprocessed folder."""
    dataset, preprocessed = int(raw.name[7:10]), Path(os.environ['nnUNet_preprocessed']) / raw.name
    with in_this_process(), pytest.MonkeyPatch.context() as patch:
        patch.setenv('nnUNet_n_proc_DA', '1')  # the planner takes it for its number of threads
        extract_fingerprints([dataset], num_processes=1)
        plans = plan_experiments([dataset], planner)
        preprocess([dataset], plans, configurations, [1] * len(configurations))
    write_splits(raw, preprocessed, folds)
    if plans == 'nnUNetPlans':
        shrink_plans(preprocessed, *configurations)
    return preprocessed


def shrink_plans(preprocessed: Path, *configurations: str) -> None:
    """A copy of nnU-Net's plans with patches and networks of a size for tests."""
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    for name in configurations:
        dims = 2 if name == '2d' else 3
        plans['configurations'][name].update(patch_size=[16, 24, 16][-dims:], batch_size=2)
        plans['configurations'][name]['architecture']['arch_kwargs'].update(
            n_stages=3, features_per_stage=[8, 16, 16], kernel_sizes=[[3] * dims] * 3,
            strides=[[1] * dims, [2] * dims, [2] * dims], n_conv_per_stage=[1, 1, 1], n_conv_per_stage_decoder=[1, 1])
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans))


def add_cascade(preprocessed: Path) -> None:
    """3d_lowres and 3d_cascade_fullres in the small plans, which nnU-Net plans for larger images only; preprocessed."""
    plans = json.loads((preprocessed / f'{PLANS}.json').read_text())
    fullres = plans['configurations']['3d_fullres']
    plans['configurations']['3d_lowres'] = {
        'inherits_from': '3d_fullres', 'data_identifier': f'{PLANS}_3d_lowres', 'next_stage': CASCADE,
        'spacing': [2 * s for s in fullres['spacing']], 'patch_size': [8, 16, 8],
        'architecture': copy.deepcopy(fullres['architecture'])}
    plans['configurations'][CASCADE] = {'inherits_from': '3d_fullres', 'previous_stage': '3d_lowres'}
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans))
    with in_this_process():
        preprocess([int(preprocessed.name[7:10])], PLANS, ['3d_lowres'], [1])


def write_splits(raw: Path, preprocessed: Path, folds: int = 3) -> None:
    """Every case is held out in one of the folds."""
    cases = sorted(p.name.partition('.')[0] for p in (raw / 'labelsTr').iterdir())
    splits = [{'train': [c for c in cases if c not in cases[f::folds]], 'val': cases[f::folds]} for f in range(folds)]
    (preprocessed / 'splits_final.json').write_text(json.dumps(splits))


@pytest.fixture(scope='session')
def stock(workspace: Workspace, made_once) -> Workspace:
    """The workspace with trained stock folds 0, 1 and 2."""
    def make() -> None:
        for fold in range(3):
            make_trainer(STOCK, fold).run_training()

    made_once('stock', make, workspace.model(STOCK))
    return workspace


@pytest.fixture(scope='session')
def refined(stock: Workspace, made_once) -> Workspace:
    """The workspace with trained stock folds 0 to 2 and PDDDPM folds 0 (by the command, with validation) and 1."""
    def make() -> None:
        with redirect_stdout(io.StringIO()) as log:
            train_in_process(DATASET_ID, '3d_fullres', 0, REFINED)
        make_trainer(REFINED, 1).run_training()
        (stock.model(REFINED) / 'console.txt').write_text(log.getvalue())

    made_once('refined', make, stock.model(REFINED))
    return stock


@pytest.fixture(scope='session')
def predicted_by_nnunet(refined: Workspace, made_once) -> Path:
    """Masks and probabilities of the held-out cases by `nnUNetv2_predict`, fold 0, with mirroring."""
    folder = refined.root / 'predicted'
    made_once('predicted', lambda: predict(folder, REFINED, '--save_probabilities'), folder)
    return folder


@pytest.fixture
def scratch_results(stock: Workspace, tmp_path: Path, monkeypatch) -> Path:
    """An own results folder that holds a copy of the stock models, for tests that damage or retrain something."""
    results = tmp_path / 'nnUNet_results'
    shutil.copytree(stock.model(STOCK), results / DATASET / stock.model(STOCK).name)
    monkeypatch.setenv('nnUNet_results', str(results))
    return results
