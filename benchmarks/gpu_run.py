"""One call of `gpu.py`: cells that are measured within its time, into one file."""
from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DEADLINE = 'BENCHMARK_DEADLINE'
"""Environment variable of a call that began anew: when its time is over."""


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
    file: Path
    """The results, a few dozen kB."""
    work: Path
    """Data and checkpoints: gigabytes."""
    data: str | None
    """Folder of the data sets."""
    device: torch.device
    tiny: bool
    """Networks and data of a size for a CPU."""
    on: str
    """Machine and commit, in words."""
    deadline: float
    """Of `time.monotonic()`."""
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What has been measured, by name: it is not measured again."""
    cases: list[Any] = field(default_factory=list)
    """Preprocessed test cases of the hippocampus, once they have been read."""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @staticmethod
    def attempt(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What it returns, or the error that it raised, in words."""
        try:
            return do()
        except (Exception, SystemExit) as error:  # noqa: BLE001 what goes wrong on a new machine is a result
            return {'error': ' '.join(f'{type(error).__name__}: {error}'.split())[:500]}

    def cell(self, name: str, limit: float, do: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell, unless that has been done or hardly any time is left. `limit`: seconds after which it is
        given up, if the time of the call is not over sooner."""
        if name in self.cells:
            return
        if self.left < 20:
            return print(f'{name}: no time left in this call')
        limit = min(limit, self.left + 30)
        self.write(name, {'error': f'the process ended in it (limit: {limit:.0f} s)'})
        print(f'{name} ...', flush=True)
        start = time.monotonic()
        with at_most(limit):
            result = self.attempt(do)
        self.write(name, result)
        print(f'{name}: {time.monotonic() - start:.0f} s {result.get("error", "")}', flush=True)
        gc.collect()
        if self.device.type == 'cuda':
            self._free()

    def write(self, name: str, result: dict[str, Any]) -> None:
        """Keep a cell in the file."""
        self.cells[name] = {**result, 'on': self.on, 'tiny': self.tiny}
        partial = self.file.with_suffix('.partial')
        partial.write_text(json.dumps(self.cells))
        partial.replace(self.file)

    def _free(self) -> None:
        """Give unused memory back. After some errors a process cannot use the GPU any more: it begins anew."""
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            print(f'The GPU is lost to this process ({error}): the command starts again after this cell.', flush=True)
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, DEADLINE: str(self.deadline)})
