"""Time and memory of `nnUNetv2_pdddpm_predict` with eight samples against `nnUNetv2_predict`, on the models of
`hippocampus.py`: both with their defaults, one after the other on the same machine, several times."""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from hippocampus import CONFIGURATION, DATASET, HERE, PDDDPM_TRAINER, PLANS, STOCK_TRAINER, nnunet_environment

COMMANDS = {'stock': ('nnUNetv2_predict', '-tr', STOCK_TRAINER),
            'PDDDPM': ('nnUNetv2_pdddpm_predict', '-tr', PDDDPM_TRAINER, '-samples', '8', '--uncertainty')}


def run(work: Path, name: str, images: Path, device: str) -> tuple[float, float]:
    """Seconds a case with everything, and GiB of the largest process, of a command on a folder of images."""
    output = work / 'speed' / name
    shutil.rmtree(output, ignore_errors=True)
    command = [*COMMANDS[name], '-i', str(images), '-o', str(output), '-d', DATASET, '-c', CONFIGURATION, '-p', PLANS,
               '-f', '0', '-device', device, '--disable_progress_bar']
    print('$', *command, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([str(Path(sys.executable).parent / command[0]), *command[1:]],
                               env=nnunet_environment(work), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f'{" ".join(command)} failed.')
    return (time.perf_counter() - start) / len(list(images.iterdir())), usage.ru_maxrss / 1024 ** 2


def network(work: Path) -> tuple[float, int, int]:
    """Seconds a case of pre-segmentation and sampling in PDDDPM's last run, and calls of either network."""
    cases = json.loads((work / 'speed' / 'PDDDPM' / 'pdddpm_summary.json').read_text())['cases']
    calls = [sum(case['network_calls'][of] for case in cases) for of in ('stock', 'denoiser')]
    return float(np.mean([case['seconds'] for case in cases])), calls[0], calls[1]


def spread(values: list[float]) -> str:
    """Median and range."""
    return f'{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-o', required=True, help='work folder of hippocampus.py, with its trained models')
    parser.add_argument('-device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('-repeats', type=int, default=3)
    parser.add_argument('-cases', type=int, default=10)
    parser.add_argument('-table', default=str(HERE.parent / 'docs' / 'results' / 'speed.md'))
    args = parser.parse_args()
    work = Path(args.o).resolve()
    images = work / 'speed' / 'images'
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    for file in sorted((work / 'nnUNet_raw' / DATASET / 'imagesTs').iterdir())[:args.cases]:
        shutil.copyfile(file, images / file.name)
    runs = [{name: run(work, name, images, args.device) for name in COMMANDS} for _ in range(args.repeats)]
    seconds, stock_calls, denoiser_calls = network(work)
    columns = {name: [[r[name][i] for r in runs] for i in (0, 1)] for name in COMMANDS}
    ratios = [[r['PDDDPM'][i] / r['stock'][i] for r in runs] for i in (0, 1)]
    device = torch.cuda.get_device_name() if args.device == 'cuda' else f'{os.cpu_count()} CPU cores'
    Path(args.table).write_text(f"""# Speed: eight samples with uncertainty against stock nnU-Net

    .venv/bin/python benchmarks/speed.py -o WORK        # after benchmarks/hippocampus.py -o WORK

Machine: {platform.machine()}, {device}, torch {torch.__version__}. Hippocampus, reduced plans, {args.cases} cases in
one call of each command, {args.repeats} times in turn; both with their defaults (mirroring), start of the program,
preprocessing and export included. Median (range).

| | s/case | GiB of the largest process |
|---|---|---|
""" + '\n'.join(f'| `{" ".join(COMMANDS[name])}` | {spread(values[0])} | {spread(values[1])} |'
                for name, values in columns.items()) + f"""
| ratio | {spread(ratios[0])} | {spread(ratios[1])} |

Network part of PDDDPM: {seconds:.2f} s a case, with {stock_calls / args.cases:.0f} calls of the stock network and
{denoiser_calls / args.cases:.0f} of the denoiser a case.
""")


if __name__ == '__main__':
    main()
