"""Whether an image file is whole and says how large its voxels are: the readers do not ask.

SimpleITK reads a truncated .nii.gz without complaint and fills up with zeros, and writes one when the disk is full; and
a voxel size of 0 becomes 1 mm in it and in nibabel. Both would end in a wrong mask that nobody notices.
"""
from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import Nifti1Header, Nifti2Header

CHUNK = 1 << 20
HEADER = 540
"""Bytes of the longer header, NIfTI-2's."""


def damage(file: Path) -> str:
    """What is wrong with a .nii or .nii.gz: truncated, its checksum or its voxel size wrong. Empty for all others.

    Args:
        file: an image; the whole of a compressed one is read.
    """
    if not file.name.endswith(('.nii', '.nii.gz')):
        return ''
    try:
        compressed = file.name.endswith('.gz')
        with (gzip.open(file) if compressed else file.open('rb')) as stream:
            start = stream.read(HEADER)
            if not start:
                return 'is empty'
            header = read_header(start)
            if header is None:
                return 'is no NIfTI image'
            size = len(start) + _rest(stream) if compressed else file.stat().st_size
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            return f'cannot be read ({error.strerror or error})'
        return f'is truncated or damaged ({error})'
    shape = [int(n) for n in header['dim'][1:1 + int(header['dim'][0])]]
    needed = int(header['vox_offset']) + int(np.prod(shape, dtype=np.int64)) * int(header['bitpix']) // 8
    if size < needed:
        return f'is truncated: it has {size} bytes of {needed}'
    sizes = [float(value) for value in header['pixdim'][1:1 + min(len(shape), 3)]]
    if not all(np.isfinite(value) and value > 0 for value in sizes):
        return f'gives a voxel size of {" x ".join(f"{value:g}" for value in sizes)} mm: correct its pixdim'
    return ''


def read_header(start: bytes) -> Any:
    """The NIfTI header at the start of a file, as it is, without nibabel's corrections; None if there is none."""
    for kind, length in ((Nifti1Header, 348), (Nifti2Header, 540)):
        for endianness, format_ in (('<', '<i'), ('>', '>i')):
            if len(start) >= length and struct.unpack(format_, start[:4])[0] == length:
                header = kind(start[:length], endianness, check=False)
                return header if 1 <= int(header['dim'][0]) <= 7 else None
    return None


def _rest(stream: Any) -> int:
    """Bytes to the end of the stream; reading there compares a compressed file's checksum."""
    total = 0
    while block := stream.read(CHUNK):
        total += len(block)
    return total
