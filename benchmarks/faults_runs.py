"""What faults.py does harm to: training, tuning, prediction, report as processes of their own, and their results.

Processes are forked from one that has imported nnU-Net, so that a run takes as long as its work. They call what the
commands call, in one process each.
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hippocampus import HERE, find_data
from integration import copy_cases

sys.path.insert(0, str(HERE.parent))  # this checkout, not an installed copy

PLANS = 'nnUNetPlansReduced'
STOCK, REFINED = 'nnUNetTrainerGlimpse', 'PDDDPMTrainerFaults'
NUM_TRAINING, NUM_TEST = 4, 3
LARGEST_PATCH = 32
IMAGES = ('.nii.gz', '.npz')
CHECKPOINTS = ('checkpoint_final.pth', 'checkpoint_best.pth')
SWEEP = ('sampling_sweep.json', 'sampling_sweep.csv', 'sampling_sweep.png')


@dataclass
class Ended:
    """How a process ended."""
    status: int
    """Exit status, or minus the signal."""
    said: str
    """All it printed."""
    seconds: float
    """From its start."""

    @property
    def last(self) -> str:
        """Its last words."""
        return (self.said.strip().splitlines() or [''])[-1]


@dataclass
class Child:
    """A forked process that does something, with what it prints in a file."""
    pid: int
    log: Path
    begin: float = field(default_factory=time.monotonic)

    def wait(self) -> Ended:
        """How it ends."""
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors='replace'),
                     time.monotonic() - self.begin)

    def running(self) -> bool:
        """Whether it has not ended yet; `wait` can still be called."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def start(log: Path, action: Callable[[], object]) -> Child:
    """Do something in a process of its own."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = 1
    try:
        action()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 the process ends here: its parent goes on in this very program otherwise
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(log: Path, action: Callable[[], object]) -> Ended:
    """Do something in a process of its own and wait for its end."""
    return start(log, action).wait()


def killed(log: Path, action: Callable[[], object], after: float, how: signal.Signals,
           once: Callable[[], bool] = lambda: True) -> Ended:
    """Do something in a process of its own and kill it some seconds after something is so, if it has not ended."""
    child = start(log, action)
    while child.running() and not once():
        time.sleep(0.002)
    end = time.monotonic() + after
    while child.running() and time.monotonic() < end:
        time.sleep(0.002)
    if child.running():
        os.kill(child.pid, how)
    return child.wait()


def address_space(what: str = 'VmSize') -> int:
    """Bytes of this process's address space, or with `VmPeak` the most it has been."""
    return next(int(line.split()[1]) * 1024 for line in Path('/proc/self/status').read_text().splitlines()
                if line.startswith(what))


def growing(file: Path, action: Callable[[], None]) -> Callable[[], None]:
    """The action, which then writes into a file by how many bytes its address space has grown at most."""
    def measured() -> None:
        before = address_space()
        action()
        file.write_text(str(address_space('VmPeak') - before))
    return measured


@dataclass
class Workspace:
    """nnU-Net's folders with a data set, a trained stock model, and images to predict."""
    root: Path
    dataset: str

    @property
    def images(self) -> Path:
        return self.root / 'nnUNet_raw' / self.dataset / 'imagesTs'

    def results(self, name: str) -> Path:
        """A results folder of its own, with the stock model in it."""
        folder = self.root / 'runs' / name
        shutil.rmtree(folder, ignore_errors=True)
        stock = f'{STOCK}__{PLANS}__3d_fullres'
        shutil.copytree(self.root / 'nnUNet_results' / self.dataset / stock, folder / self.dataset / stock)
        return folder

    def fold(self, results: Path) -> Path:
        """Folder of the refined model's fold 0."""
        return results / self.dataset / f'{REFINED}__{PLANS}__3d_fullres' / 'fold_0'

    def trained(self, model: Path, name: str) -> Path:
        """A copy of a results folder under another name."""
        folder = self.root / 'runs' / name
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(model, folder))

    def train(self, results: Path, trainer: str = REFINED) -> Callable[[], None]:
        """`nnUNetv2_train ... --c`, but for the validation."""
        def action() -> None:
            os.environ['nnUNet_results'] = str(results)
            torch.set_num_threads(1)
            from nnunetv2.run import run_training
            made = run_training.get_trainer_from_args(self.dataset, '3d_fullres', 0, trainer, PLANS, True,
                                                      device=torch.device('cpu'))
            run_training.maybe_load_checkpoint(made, True, False)
            made.run_training()
        return action

    def predict(self, results: Path, output: Path, *flags: str, images: Path | None = None) -> Callable[[], None]:
        """`nnUNetv2_pdddpm_predict_from_modelfolder` with everything it writes."""
        def action() -> None:
            from nnunet_pdddpm.commands.predict import main_modelfolder
            main_modelfolder(['-i', str(images or self.images), '-o', str(output), '-m', str(self.fold(results).parent),
                              '-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar',
                              '--disable_tta', '-step_size', '1', '-samples', '3', '--save_samples', '--uncertainty',
                              'all', '--save_probabilities', '--report', *flags])
        return action


    def tune(self, results: Path) -> Callable[[], None]:
        """`nnUNetv2_pdddpm_tune` with one start and up to two steps, in one thread."""
        def action() -> None:
            os.environ['nnUNet_results'] = str(results)
            torch.set_num_threads(1)
            from nnunet_pdddpm.commands import tune
            from nnunet_pdddpm.tuning import sweep
            tune.prepare_device = torch.device
            sweep.STARTS, sweep.MORE_STEPS = (0.6,), ()
            tune.main([self.dataset, '3d_fullres', '0', '-tr', REFINED, '-p', PLANS, '-device', 'cpu',
                       '--disable_progress_bar'])
        return action


def prepare(work: Path, data: str | None, dataset: str | None) -> Workspace:
    """Make the phantoms, or copy the first cases of a data set; plan for a small network; train the stock model."""
    torch.set_num_threads(1)  # threads would not survive the fork
    name = dataset or 'Dataset790_FaultPhantoms'
    space = Workspace(work, name)
    raw, preprocessed = work / 'nnUNet_raw' / name, work / 'nnUNet_preprocessed' / name
    folders = {folder: str(work / folder) for folder in ('nnUNet_raw', 'nnUNet_preprocessed', 'nnUNet_results')}
    os.environ.update(folders, nnUNet_extTrainer=str(HERE / 'trainers'), nnUNet_n_proc_DA='0', nnUNet_def_n_proc='1',
                      nnUNet_pdddpm_presegmenter=STOCK, nnUNet_compile='f')

    import nnunet_pdddpm.commands.predict
    import nnunet_pdddpm.commands.tune  # noqa: F401 imported once, here
    if dataset:
        source = find_data(data, dataset)
        cases = len(list((source / 'labelsTr').glob('*.nii.gz')))
        tested = NUM_TEST if cases >= NUM_TRAINING + NUM_TEST else 1
        copy_cases(source, raw, min(NUM_TRAINING, cases - tested), tested)
    else:
        from nnunet_pdddpm.demo.phantom import write_dataset
        write_dataset(raw, NUM_TRAINING, NUM_TEST, (20, 26, 22))
    number = int(name[7:10])
    ended = run(work / 'plan.log', lambda: plan(number))
    if ended.status:
        sys.exit(f'Planning failed: {ended.last}')
    reduce(preprocessed)
    cases = sorted(file.name.partition('.')[0] for file in (raw / 'labelsTr').iterdir())
    (preprocessed / 'splits_final.json').write_text(json.dumps([{'train': cases[1:], 'val': cases[:1]}]))
    ended = run(work / 'stock.log', space.train(work / 'nnUNet_results', STOCK))
    if ended.status:
        sys.exit(f'Training of the stock model failed: {ended.last}')
    return space


def plan(number: int) -> None:
    """As `nnUNetv2_plan_and_preprocess -c 3d_fullres`."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api as api
    os.environ['nnUNet_n_proc_DA'] = '1'  # the planner takes it for its number of threads
    api.extract_fingerprints([number], num_processes=1)
    api.preprocess([number], api.plan_experiments([number]), ('3d_fullres',), [1])


def reduce(preprocessed: Path) -> None:
    """A copy of the plans with a small patch and network."""
    plans = json.loads((preprocessed / 'nnUNetPlans.json').read_text())
    plans['plans_name'] = PLANS
    configuration = plans['configurations']['3d_fullres']
    configuration.update(patch_size=[min(n, LARGEST_PATCH) // 4 * 4 for n in configuration['patch_size']], batch_size=2)
    configuration['architecture']['arch_kwargs'].update(
        n_stages=3, features_per_stage=[8, 16, 16], kernel_sizes=[[3] * 3] * 3, strides=[[1] * 3, [2] * 3, [2] * 3],
        n_conv_per_stage=[1, 1, 1], n_conv_per_stage_decoder=[1, 1])
    (preprocessed / f'{PLANS}.json').write_text(json.dumps(plans))


def files(output: Path) -> dict[str, bytes]:
    """Images and arrays of a prediction: relative path -> content; nothing that is not under its final name."""
    return {str(file.relative_to(output)): file.read_bytes() for file in output.rglob('*')
            if file.is_file() and file.name.endswith(IMAGES) and '.partial' not in str(file)}


def rows(output: Path) -> dict[str, dict]:
    """Rows of the summary, without the time that they took."""
    file = output / 'pdddpm_summary.json'
    found = json.loads(file.read_text())['cases'] if file.is_file() else []
    return {row['case']: {key: value for key, value in row.items() if key != 'seconds'} for row in found}


def torn(output: Path) -> list[str]:
    """Files of this project under final names that are not whole."""
    from nnunet_pdddpm.image_files import damage
    bad = [file.name for file in output.rglob('*.nii.gz') if '.partial' not in str(file) and damage(file)]
    for file in [*output.glob('pdddpm_*.json'), *output.glob('pdddpm_cases/**/*.json')]:
        try:
            json.loads(file.read_text())
        except json.JSONDecodeError:
            bad.append(file.name)
    page = output / 'report.html'
    if page.is_file() and not page.read_text().rstrip().endswith('</html>'):
        bad.append(page.name)
    return bad


def torn_checkpoints(fold: Path) -> list[str]:
    """Checkpoints that are not whole, or whose checksums or weights are wrong."""
    from nnunet_pdddpm.network.checkpoint import CheckpointError, check_weights, load_checkpoint
    bad = []
    for file in fold.glob('*.pth'):
        try:
            check_weights(load_checkpoint(file)['network_weights'], str(file))
        except CheckpointError:
            bad.append(file.name)
    return bad


def weights(fold: Path, name: str = 'checkpoint_final.pth') -> dict[str, torch.Tensor]:
    """Of a checkpoint."""
    from nnunet_pdddpm.network.checkpoint import load_checkpoint
    return load_checkpoint(fold / name)['network_weights']


def tuned(fold: Path) -> dict[str, object]:
    """What tuning writes, as far as it is there: files of the sweep, without the time it took, and checkpoints."""
    found: dict[str, object] = {name: (fold / name).read_bytes() for name in SWEEP[1:] if (fold / name).is_file()}
    if (fold / SWEEP[0]).is_file():
        found[SWEEP[0]] = {key: value for key, value in json.loads((fold / SWEEP[0]).read_text()).items()
                           if key != 'seconds'}
    for checkpoint in CHECKPOINTS:
        found |= {f'{checkpoint} {name}': value.numpy().tobytes() for name, value in weights(fold, checkpoint).items()}
    return found


def differing(one: dict, other: dict) -> list[str]:
    """Names that are in only one of two dictionaries, or whose values differ."""
    same = torch.equal if one and isinstance(next(iter(one.values())), torch.Tensor) else lambda a, b: a == b
    return [name for name in one.keys() | other.keys()
            if name not in one or name not in other or not same(one[name], other[name])]
