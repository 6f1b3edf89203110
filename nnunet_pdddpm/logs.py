"""Where the package's log goes: to the console in its commands, to nnU-Net's log in training, nowhere by default."""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger('nnunet_pdddpm')


class Console(logging.Handler):
    """Progress on stdout, warnings and errors on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, on the stream that is in place at the time."""
        print(self.format(record), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout, flush=True)


class Forward(logging.Handler):
    """Hands every line to a function."""

    def __init__(self, log: Callable[[str], None]) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One line."""
        self.log(self.format(record))


def log_to_console() -> None:
    """For commands: show the package's log from INFO on."""
    if not any(isinstance(handler, Console) for handler in PACKAGE.handlers):
        PACKAGE.addHandler(Console())
    PACKAGE.setLevel(logging.INFO)


@contextmanager
def log_forwarded_to(log: Callable[[str], None]) -> Iterator[None]:
    """Within it the package's log goes to a function, and not to the console."""
    handlers, level = PACKAGE.handlers, PACKAGE.level
    PACKAGE.handlers = [Forward(log)]
    PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        PACKAGE.handlers = handlers
        PACKAGE.setLevel(level)
