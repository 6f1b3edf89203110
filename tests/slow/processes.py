"""Processes that are killed or get too little memory, and disks that are full or cannot be written."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

if sys.platform != 'linux':
    pytest.skip('processes are forked, limited and given disks as on Linux', allow_module_level=True)

import resource
from multiprocessing.context import ForkProcess

PATIENCE = 1800  # seconds, of a process that hangs


class Run(ForkProcess):
    """Something done in a process of its own, for which nothing has to be imported again.

    Args:
        action: what is done.
        log: file for what it prints.
    """

    def __init__(self, action: Callable[[], object], log: Path) -> None:
        super().__init__()
        self.action, self.log = action, log
        self.start()

    def run(self) -> None:
        sys.stdout = sys.stderr = file = self.log.open('w', buffering=1)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        self.action()

    def end(self) -> int:
        """Exit status, or minus the signal."""
        self.join(PATIENCE)
        if self.is_alive():
            self.kill()
            pytest.fail(f'It hangs: {self.said[-4000:]}')
        return self.exitcode

    def succeed(self) -> None:
        assert self.end() == 0, self.said[-4000:]

    @property
    def said(self) -> str:
        return self.log.read_text(errors='replace')


def memory(what: str) -> int:
    """Of this process, in bytes: VmSize is its address space, VmPeak the most that has been, VmRSS what is in use."""
    return next(int(line.split()[1]) * 1024 for line in Path('/proc/self/status').read_text().splitlines()
                if line.startswith(what))


def measured(action: Callable[[], object], file: Path) -> Callable[[], None]:
    """The action, which then writes into a file by how many bytes its address space has grown at most."""
    def run() -> None:
        before = memory('VmSize')
        action()
        file.write_text(str(memory('VmPeak') - before))
    return run


def limited(action: Callable[[], object], more: int) -> Callable[[], None]:
    """The action with an address space of so many bytes more than the process has at its start."""
    def run() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory('VmSize') + more,) * 2)
        action()
    return run


@contextmanager
def own_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """An empty disk in the place of a folder; the function that is given mounts it again with other options."""
    def mount(*arguments: str) -> None:
        done = subprocess.run(['mount', *arguments, str(folder)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            pytest.skip(f'no disk can be mounted, which needs root: {done.stderr.strip()}')
    mount('-t', 'tmpfs', '-o', 'size=1g', 'tmpfs')
    try:
        yield lambda options: mount('-o', f'remount,{options}')
    finally:
        subprocess.run(['umount', str(folder)], check=True)
