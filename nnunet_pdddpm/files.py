"""Files written whole, and why one could not be written."""
from __future__ import annotations

import errno
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

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


def write_atomically(folder: Path, contents: Mapping[str, bytes | str]) -> list[Path]:
    """Write files beside and rename them once all are written: under its name a file is whole or the old one.

    Args:
        folder: of the files, which exists.
        contents: name of a file -> what is in it; text in UTF-8, with question marks for what that cannot encode.

    Raises:
        OSError: if the folder cannot be written to.
    """
    own = uuid4().hex[:12]  # processes of several containers may have the same number
    beside = {name: folder / f'.{name}.{own}.partial' for name in contents}
    try:
        for name, content in contents.items():
            beside[name].write_bytes(content if isinstance(content, bytes) else content.encode('utf-8', 'replace'))
        for name, file in beside.items():
            os.replace(file, folder / name)
    finally:
        for file in beside.values():
            file.unlink(missing_ok=True)
    return [folder / name for name in contents]


def identity(file: Path) -> dict[str, Any]:
    """What tells a file from another one of the same name: its `file` name, size in `bytes` and CRC-32."""
    size, crc = 0, 0
    with file.open('rb') as content:
        while chunk := content.read(1 << 20):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {'file': file.name, 'bytes': size, 'crc32': f'{crc:08x}'}


def image_identity(files: Sequence[str], previous: str | None = None) -> list[dict[str, Any]] | None:
    """`identity` of what a case is predicted from; None if a file cannot be read.

    Args:
        files: the image's channels; the json beside them that holds the spacing of a tif belongs to them.
        previous: mask of the previous stage of a cascade.
    """
    images = [*files, *([previous] if previous else [])]
    beside = dict.fromkeys(re.sub((r'(_\d{4})?' if file in files else '') + r'\.[^.]+$', '.json', file)
                           for file in images)
    try:
        return [identity(Path(file)) for file in [*images, *(file for file in beside if os.path.isfile(file))]]
    except OSError:
        return None


def matches_identity(folder: Path, known: Any) -> bool:
    """Whether a folder still holds the file that an `identity` was taken of, unchanged."""
    if not isinstance(known, Mapping) or not isinstance(known.get('file'), str):
        return False
    file = folder / known['file']
    try:
        return file.stat().st_size == known.get('bytes') and identity(file) == known
    except FileNotFoundError:
        return False


def without_nan(value: Any) -> Any:
    """The value with None in the place of nan and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
