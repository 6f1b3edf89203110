"""How large the benchmarks are run: reduced on a CPU, or in full on the GPU that BENCHMARK_DEVICE=cuda stands for."""
from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunet_pdddpm.cpu import cpu_has_bfloat16

DEVICE = os.environ.get('BENCHMARK_DEVICE', 'cpu')
FULL = DEVICE != 'cpu'
PLANS = 'nnUNetPlans' if FULL else 'nnUNetPlansReduced'
PLANS_IN_WORDS = 'Full plans' if FULL else 'Reduced plans'
AUTOCAST = "nnU-Net's autocast" if FULL else 'bf16 autocast' if cpu_has_bfloat16() else 'fp32'

if FULL and not torch.cuda.is_available():
    sys.exit(f'BENCHMARK_DEVICE={DEVICE}, but torch finds no GPU: unset it to run the reduced benchmarks on the CPU.')


def machine() -> str:
    """In words."""
    processor = f'one {torch.cuda.get_device_name()}' if FULL else 'no GPU'
    return f'{platform.machine()}, {os.cpu_count()} CPU cores, {processor}, torch {torch.__version__}'


def commit() -> str:
    """Of the checkout, with a word if files differ from it."""
    changed = _git('status', '--porcelain', '../nnunet_pdddpm')
    return _git('rev-parse', '--short', 'HEAD') + (' and changes' if changed else '')


def date(commit: str) -> str:
    """Of a commit, year first; empty if it is not in the checkout's history."""
    return _git('show', '--no-patch', '--format=%cs', commit)


def _git(*arguments: str) -> str:
    return subprocess.run(['git', *arguments], cwd=Path(__file__).parent, capture_output=True, text=True
                          ).stdout.strip()


def results() -> Path:
    """Folder of the tables; those of a GPU lie in one of its name."""
    folder = Path(__file__).resolve().parent.parent / 'docs' / 'results'
    return folder / re.sub(r'\W+', '_', torch.cuda.get_device_name()) if FULL else folder


def timed(device: torch.device, do: Callable[[], Any]) -> float:
    """Seconds, until the device is done."""
    synchronise = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    synchronise()
    start = time.perf_counter()
    do()
    synchronise()
    return time.perf_counter() - start
