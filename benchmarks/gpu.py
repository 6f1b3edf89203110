"""What only a GPU shows, in stages that can be taken up again: see "On a GPU" in docs/dev/benchmarks.md.

`prepare`: the hippocampus, on any machine. `tests`: those of CUDA. `speed`: prediction, and iterations of training, at
nnU-Net's own plans with 2, 25 and 117 classes. `hippocampus`: trainings of equal length, scored. `page`: all of it.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu_run import DEADLINE, Run, at_most

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / 'tests' / 'test_cuda.py'
STAGES = ('prepare', 'tests', 'speed', 'hippocampus', 'page')


def suite(run: Run) -> None:
    """The CUDA tests; without a GPU those of them that a CPU can run."""
    limit = 300 if run.tiny else 120

    def do() -> dict[str, Any]:
        report = run.work / 'tests.xml'
        report.unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(('PYTEST_', 'nnUNet_'))}
        ended = subprocess.run(  # interrupted, pytest still writes what it has found
            ['timeout', '-s', 'INT', '-k', '9', f'{min(limit - 20, run.left):.0f}', sys.executable, '-m', 'pytest',
             str(TESTS), '-p', 'no:cacheprovider', f'--junitxml={report}'],
            cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found: dict[str, Any] = {'passed': [], 'failed': [], 'skipped': []}
        for test in ElementTree.parse(report).iterfind('.//testcase[@name]') if report.is_file() else ():
            bad = [child.get('message', '') for child in test if child.tag in ('failure', 'error')]
            name = f'{test.get("classname")}::{test.get("name")}'
            found['failed' if bad else 'skipped' if test.find('skipped') is not None else 'passed'].append(
                f'{name}: {" ".join(bad[0].split())[:200]}' if bad else name)
        if ended.returncode not in (0, 1):
            found['error'] = f'pytest ended with {ended.returncode}: {ended.stdout[-300:]}'
        return found
    run.cell('tests', limit, do)


def machine(device: torch.device, commit: str | None) -> str:
    """GPU, driver, versions and commit, in words."""
    import machine as this  # says which device the benchmarks use, and refuses one that is not there
    driver = 'unknown'
    try:
        commit = commit or this.commit()
    except OSError:  # there is no git
        pass
    try:
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    gpu = f', driver {driver}, CUDA {torch.version.cuda}' if device.type == 'cuda' else ''
    return f'{this.machine()}{gpu}; commit {commit or "unknown (name it with -commit)"}'


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-o', required=True, help='results, a .json; what is in it is not measured again')
    parser.add_argument('-work', default=str(Path(tempfile.gettempdir()) / 'pdddpm_gpu'),
                        help='data and checkpoints, gigabytes (default: %(default)s)')
    parser.add_argument('-data', help='folder of the data sets (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('-scale', default='full', choices=('full', 'tiny'), help='tiny: a dry run, made-up data')
    parser.add_argument('-minutes', type=float, default=12, help='of all stages together (default: %(default)g)')
    parser.add_argument('-commit', help='of the checkout, where git cannot say it')
    parser.add_argument('--stages', nargs='+', choices=STAGES, default=list(STAGES),
                        help='page: the name of -o with .md')
    return parser.parse_args(arguments)


def prepared(args: argparse.Namespace, file: Path) -> Run:
    """Environment and folders of a call that measures."""
    device = torch.device(args.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        sys.exit('torch finds no GPU: run it where there is one, or dry with -device cpu -scale tiny.')
    os.environ['BENCHMARK_DEVICE'] = args.device
    deadline = float(os.environ.get(DEADLINE, time.monotonic() + 60 * args.minutes))
    run = Run(file, Path(args.work).resolve(), args.data, device, args.scale == 'tiny',
              machine(device, args.commit), deadline, json.loads(file.read_text()) if file.is_file() else {})
    if device.type == 'cuda':  # as nnU-Net's commands
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    from datasets.hippocampus import HIPPOCAMPUS
    prepares = 'prepare' in args.stages or HIPPOCAMPUS.is_prepared(run.work)
    if 'hippocampus' in args.stages and not prepares:
        sys.exit(f'{run.work} holds no prepared {HIPPOCAMPUS.title}: name another folder with -work, or add the stage '
                 'prepare.')
    os.environ.update(HIPPOCAMPUS.environment(run.work), nnUNet_compile='false')
    if run.tiny:
        os.environ['nnUNet_n_proc_DA'] = '0'
    sys.path.append(str(HERE / 'trainers'))
    from nnunet_pdddpm.commands.check import find_trainer
    if problem := find_trainer('PDDDPMTrainer'):
        sys.exit(problem)
    run.file.parent.mkdir(parents=True, exist_ok=True)
    run.work.mkdir(parents=True, exist_ok=True)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    file = Path(args.o).resolve()
    if measured := [stage for stage in STAGES[:-1] if stage in args.stages]:
        run = prepared(args, file)
        import gpu_stages
        for stage in measured:
            with at_most(run.left) if stage == 'prepare' else nullcontext():  # the others look at the time
                {'prepare': gpu_stages.prepare, 'tests': suite, 'speed': gpu_stages.speed,
                 'hippocampus': gpu_stages.hippocampus}[stage](run)
    if 'page' in args.stages:
        from gpu_table import write_table
        write_table(file)


if __name__ == '__main__':
    main()
