"""What is harmed: training, tuning, prediction and report, as the commands do them, each in a folder of its own."""
from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import torch
from conftest import DATASET, DATASET_ID, PLANS, REFINED, STOCK, Workspace, in_this_process, train_in_process
from processes import Run, measured

from nnunet_pdddpm.commands import tune
from nnunet_pdddpm.commands.predict import main_modelfolder
from nnunet_pdddpm.network.checkpoint import check_weights, load_checkpoint
from nnunet_pdddpm.network.refiner import CALIBRATION, QUALITY
from nnunet_pdddpm.tuning import sweep

FINAL = 'checkpoint_final.pth'
PLACE = Path(DATASET, f'{REFINED}__{PLANS}__3d_fullres', 'fold_0')


class Job:
    """Something that is run in a folder, and what an uninterrupted run takes and leaves.

    Args:
        models: the workspace with the trained models.
        parent: of the job's folder.
    """

    flags_to_go_on: tuple[str, ...] = ()

    def __init__(self, models: Workspace, parent: Path) -> None:
        self.models, self.folder, self.log = models, parent / 'work', parent / 'log.txt'
        self.prepare()
        self.before, size = self.contents(), self.size()
        start = time.monotonic()
        Run(measured(self.run, parent / 'memory.txt'), self.log).succeed()
        self.seconds, self.memory = time.monotonic() - start, int((parent / 'memory.txt').read_text())
        self.expected, self.bytes = self.contents(), self.size() - size

    def prepare(self) -> None:
        """The folder as it is before the run."""
        shutil.rmtree(self.folder, ignore_errors=True)  # all but the folder itself where it is a disk
        self.folder.mkdir(exist_ok=True)

    def copy(self, trainer: str) -> None:
        """A trained model into the folder, as results; without mirroring, an eighth of the time."""
        model = self.models.model(trainer)
        copied = self.folder / DATASET / model.name
        shutil.copytree(model, copied, ignore=shutil.ignore_patterns('fold_[12]'))
        for file in copied.rglob('*.pth'):
            torch.save({**torch.load(file, weights_only=False), 'inference_allowed_mirroring_axes': None}, file)

    def size(self) -> int:
        return sum(file.stat().st_size for file in self.folder.rglob('*') if file.is_file())

    def run(self, *flags: str) -> None:
        """In a process of its own."""
        raise NotImplementedError

    def contents(self) -> dict[str, object]:
        """What is there, without what differs from run to run; an error for what is torn."""
        raise NotImplementedError

    def start(self, *flags: str) -> Run:
        return Run(lambda: self.run(*flags), self.log)


class Training(Job):
    """`nnUNetv2_train ... --c`, whether there is something to go on with or not."""

    def __init__(self, models: Workspace, parent: Path) -> None:
        super().__init__(models, parent)
        self.before = {name: bytes(len(self.expected[name])) for name in (CALIBRATION, QUALITY)}  # until validation

    def prepare(self) -> None:
        super().prepare()
        self.copy(STOCK)

    def run(self, *flags: str) -> None:
        os.environ['nnUNet_results'] = str(self.folder)
        train_in_process(DATASET_ID, '3d_fullres', 0, REFINED, '--c')

    def contents(self) -> dict[str, object]:
        return {file.name: weights(file) for file in (self.folder / PLACE).glob('*.pth')}.get(FINAL, {})


class Tuning(Job):
    """`nnUNetv2_pdddpm_tune`, with little to choose from."""

    def __init__(self, models: Workspace, parent: Path) -> None:
        super().__init__(models, parent)
        self.bytes += (self.folder / PLACE / FINAL).stat().st_size  # which is written beside the earlier one

    def prepare(self) -> None:
        super().prepare()
        self.copy(STOCK), self.copy(REFINED)

    def run(self, *flags: str) -> None:
        os.environ['nnUNet_results'] = str(self.folder)
        sweep.STARTS, sweep.FIRST_STEPS, sweep.MORE_STEPS, sweep.DEPENDENCES, sweep.DRAWS = (0.6,), (1,), (), (1.0,), 2
        with in_this_process():
            tune.main([str(DATASET_ID), '3d_fullres', '0', '-tr', REFINED, '-p', PLANS, '-device', 'cpu',
                       '--disable_progress_bar'])

    def contents(self) -> dict[str, object]:
        fold = self.folder / PLACE
        found: dict[str, object] = {file.name: file.read_bytes() for file in fold.glob('*sweep.[cp]*')}  # csv, png
        for file in fold.glob('*sweep.json'):
            found |= json.loads(file.read_text())
        for file in fold.glob('*.pth'):
            found |= {f'{file.name} {name}': value for name, value in weights(file).items()}
        return {name: value for name, value in found.items() if name not in ('seconds', 'log')}


class Prediction(Job):
    """`nnUNetv2_pdddpm_predict_from_modelfolder` with everything that it writes."""

    flags_to_go_on = ('--continue_prediction',)

    def __init__(self, models: Workspace, parent: Path) -> None:
        self.images = models.raw / 'imagesTs'
        super().__init__(models, parent)

    def run(self, *flags: str) -> None:
        with in_this_process():
            main_modelfolder(['-i', str(self.images), '-o', str(self.folder), '-m', str(self.models.model(REFINED)),
                              '-f', '0', '-device', 'cpu', '-npp', '0', '-nps', '0', '--disable_progress_bar',
                              '--disable_tta', '-step_size', '1', '-samples', '3', '--save_samples', '--uncertainty',
                              'all', '--save_probabilities', '--report', *flags])

    def contents(self) -> dict[str, object]:
        files = [file for file in self.folder.rglob('*') if '.partial' not in str(file)]
        found: dict[str, object] = {str(file.relative_to(self.folder)): file.read_bytes() for file in files
                                    if file.name.endswith(('.nii.gz', '.npz'))}
        content = {file.name: json.loads(file.read_text()) for file in files
                   if file.suffix == '.json' and (file.name.startswith('pdddpm') or file.parent.name == 'pdddpm_cases')}
        for row in content.get('pdddpm_summary.json', {'cases': []})['cases']:
            found[row['case']] = {key: value for key, value in row.items() if key != 'seconds'}
        assert all(file.read_text().rstrip().endswith('</html>') for file in files if file.suffix == '.html')
        return found


class Report(Prediction):
    """A report over finished cases, in the place of an earlier one."""

    def prepare(self) -> None:
        super().prepare()
        finished = self.folder.with_name('finished')
        if not finished.is_dir():
            Run(super().run, self.log).succeed()
            shutil.copytree(self.folder, finished)
        shutil.copytree(finished, self.folder, dirs_exist_ok=True)
        (self.folder / 'report.html').write_text('<html>earlier</html>')

    def run(self, *flags: str) -> None:
        super().run('--continue_prediction')

    def contents(self) -> dict[str, object]:
        return {**super().contents(), 'report': (self.folder / 'report.html').read_text()}


def weights(file: Path) -> dict[str, bytes]:
    """Of a checkpoint, which has to be whole, with numbers in it."""
    found = load_checkpoint(file)['network_weights']
    check_weights(found, str(file))
    return {name: value.numpy().tobytes() for name, value in found.items()}
