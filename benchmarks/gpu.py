"""What only a GPU shows, in stages that can be taken up again: see "On a GPU" in docs/design.md.

`tests`: the suite's CUDA tests. `speed`: prediction at nnU-Net's own plans with 2, 25 and 117 classes. `iterations`: of
training, against stock's. `hippocampus`: trainings of equal length, and scores of the test cases. `page`: all of it.
"""
from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

HERE = Path(__file__).resolve().parent
STAGES = ('tests', 'speed', 'iterations', 'hippocampus', 'page')


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within it when the time is over; where not even that helps, the process ends a minute later.
    """
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f'not done within {seconds:.0f} s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + 60, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Run:
    """One call of the command."""
    results: Path
    """Files of a few kB, one a cell. What is there is not measured again."""
    work: Path
    """Data and checkpoints: gigabytes."""
    data: str | None
    """Folder of the data sets."""
    device: torch.device
    tiny: bool
    """Networks and data of a size for a CPU."""
    on: str
    """Machine and commit, in words."""
    deadline: float = 0.0
    """Of the stage, of `time.monotonic()`."""

    @property
    def left(self) -> float:
        """Seconds of the stage."""
        return self.deadline - time.monotonic()

    @staticmethod
    def attempt(do: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """What it returns, or the error that it raised, in words."""
        try:
            return do()
        except (Exception, SystemExit) as error:  # noqa: BLE001 what goes wrong on a new machine is a result
            return {'error': ' '.join(f'{type(error).__name__}: {error}'.split())[:500]}

    def cell(self, name: str, limit: float, do: Callable[[], dict[str, Any] | None], resumed: bool = False) -> None:
        """Measure a cell and write its file, unless that is there or fewer than `limit` seconds are left.

        Args:
            name: of the file.
            limit: seconds after which it is given up.
            do: gives numbers for the file; None if there is to be none yet.
            resumed: whether it looks at the time itself, and goes on in a later call where the process was killed.
        """
        if (self.results / f'{name}.json').is_file():
            return
        if not resumed:
            if self.left < limit:
                return print(f'{name}: no time left in this call')
            self.write(name, {'error': f'the process ended in it (limit: {limit:.0f} s)'})
        print(f'{name} ...', flush=True)
        start = time.monotonic()
        with at_most(limit):
            result = self.attempt(do)
        if result is not None:
            self.write(name, result)
        print(f'{name}: {time.monotonic() - start:.0f} s {(result or {}).get("error", "")}', flush=True)
        gc.collect()
        if self.device.type == 'cuda':
            self._free()

    def write(self, name: str, result: dict[str, Any]) -> None:
        """The file of a cell."""
        partial = self.results / f'{name}.partial'
        partial.write_text(json.dumps({**result, 'on': self.on, 'tiny': self.tiny}))
        partial.replace(self.results / f'{name}.json')

    def _free(self) -> None:
        """Give unused memory back. After some errors a process cannot use the GPU any more: it begins anew."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f'The GPU is lost to this process ({error}): the command starts again after this cell.', flush=True)
            os.execv(sys.executable, [sys.executable, *sys.argv])


def suite(run: Run) -> None:
    """The tests that have cuda in their name or parameters; without a GPU they are skipped."""
    def do() -> dict[str, Any]:
        tests, report = HERE.parent / 'tests', run.work / 'tests.xml'
        report.unlink(missing_ok=True)
        files = [tests / 'test_network.py'] if run.tiny else [
            file for file in sorted(tests.glob('test_*.py')) if 'cuda' in file.read_text() and 'gpu' not in file.stem]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(('PYTEST_', 'nnUNet_'))}
        ended = subprocess.run([sys.executable, '-m', 'pytest', *map(str, files), '-k', 'cuda', '-p',
                                'no:cacheprovider', '--continue-on-collection-errors', f'--junitxml={report}'],
                               cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, timeout=run.left - 5)
        if not report.is_file():
            raise RuntimeError(f'pytest ended with {ended.returncode}: {ended.stdout[-300:]}')
        found: dict[str, list[str]] = {'passed': [], 'failed': [], 'skipped': []}
        for test in ElementTree.parse(report).iter('testcase'):
            bad = [child.get('message', '') for child in test if child.tag in ('failure', 'error')]
            name = f'{test.get("classname")}::{test.get("name")}'
            found['failed' if bad else 'skipped' if test.find('skipped') is not None else 'passed'].append(
                f'{name}: {" ".join(bad[0].split())[:200]}' if bad else name)
        return found
    run.cell('tests', run.left - 1, do)


def machine(device: torch.device, commit: str | None) -> str:
    """GPU, driver, versions and commit, in words."""
    import scale  # says which device the benchmarks use, and refuses one that is not there
    driver = 'unknown'
    try:
        commit = commit or scale.commit()
    except OSError:  # there is no git
        pass
    try:
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    gpu = f', driver {driver}, CUDA {torch.version.cuda}' if device.type == 'cuda' else ''
    return f'{scale.machine()}{gpu}; commit {commit or "unknown (name it with -commit)"}'


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', required=True, help='results, a few kB each; what is there is not measured again')
    parser.add_argument('-work', help='data and checkpoints, gigabytes (default: the folder of -o with _work)')
    parser.add_argument('-data', help='folder of the data sets (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('-scale', default='full', choices=('full', 'tiny'), help='tiny: a dry run, made-up data')
    parser.add_argument('-minutes', type=float, default=7, help='of each stage (default: %(default)g)')
    parser.add_argument('-table', help='the page (default: docs/results/gpu.md; of a dry run, gpu.md in -o)')
    parser.add_argument('-commit', help='of the checkout, where git cannot say it')
    parser.add_argument('--stages', nargs='+', choices=STAGES, default=list(STAGES))
    return parser.parse_args(arguments)


def prepared(args: argparse.Namespace) -> Run:
    """Environment and folders of a call that measures."""
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        sys.exit('torch finds no GPU: run it where there is one, or dry with -device cpu -scale tiny.')
    os.environ['BENCHMARK_DEVICE'] = args.device
    results = Path(args.o).resolve()
    run = Run(results, Path(args.work).resolve() if args.work else results.with_name(f'{results.name}_work'),
              args.data, device, args.scale == 'tiny', machine(device, args.commit))
    run.results.mkdir(parents=True, exist_ok=True)
    run.work.mkdir(parents=True, exist_ok=True)
    if device.type == 'cuda':  # as nnU-Net's commands
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    from hippocampus import nnunet_environment
    os.environ.update(nnunet_environment(run.work), nnUNet_compile='false')
    if run.tiny:
        os.environ['nnUNet_n_proc_DA'] = '0'
    sys.path.append(str(HERE / 'trainers'))
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if measured := [stage for stage in STAGES[:-1] if stage in args.stages]:
        run = prepared(args)
        import gpu_stages
        for stage in measured:
            run.deadline = time.monotonic() + 60 * args.minutes
            {'tests': suite, 'speed': gpu_stages.speed, 'iterations': gpu_stages.iterations,
             'hippocampus': gpu_stages.hippocampus}[stage](run)
    if 'page' in args.stages:
        from gpu_table import write_table
        default = Path(args.o) / 'gpu.md' if args.scale == 'tiny' else HERE.parent / 'docs' / 'results' / 'gpu.md'
        write_table(Path(args.o), Path(args.table) if args.table else default)


if __name__ == '__main__':
    main()
