"""Why a file could not be written."""
from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEARLY_FULL = 1 << 16
"""Free bytes below which a failed writing is put down to a full disk."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within it, errors of libraries that come of a full disk or a deleted folder say so, as OSError.

    SimpleITK and torch.save tell of neither.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, 'The folder was deleted while it was written to', str(folder)
                                    ) from error
        if shutil.disk_usage(folder).free < NEARLY_FULL:
            raise OSError(errno.ENOSPC, 'The disk is full', str(folder)) from error
        raise
