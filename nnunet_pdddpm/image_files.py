"""Which files of a folder are images, and what is wrong with one of them: the readers do not check.

SimpleITK reads a truncated .nii.gz without complaint and fills up with zeros, and writes one when the disk is full; and
a voxel size of 0 becomes 1 mm in it and in nibabel. Both would end in a wrong mask that nobody notices.
"""
from __future__ import annotations

import gzip
import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import Nifti1Header, Nifti2Header
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_pdddpm.file_names import SAMPLES

BLOCK_BYTES = 1 << 20
IMAGE_ENDINGS = tuple({ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings})
APPLE_DOUBLE = b'\x00\x05\x16\x07'
"""First bytes of what macOS writes beside each file of a foreign disk, as `._NAME`."""
READABLE_ERRORS = (RuntimeError, ValueError, ArithmeticError, AssertionError, OSError, EOFError)
"""Errors of readers and preprocessors whose text can stand alone; that of others is a key or nothing."""
LARGEST = float(np.finfo(float).max)
TRUNCATED = 'is truncated or damaged'
HEADER = 540
"""Bytes of the longer header, NIfTI-2's."""


def full_scale(ending: str, reader: Any) -> int:
    """Integer that stands for 1 in a map of values in [0, 1] that a reader and writer of nnU-Net's writes.

    They take 8 bits for what is below 255, and 16 bits else; bmp and SimpleITKIOWithReorient have 8 bits only.
    """
    return 254 if ending == '.bmp' or isinstance(reader, SimpleITKIOWithReorient) else 65535


class UnusableImage(ValueError):
    """A file is no image that a mask can be made of or compared with: the message names it and says why."""


@contextmanager
def as_unusable_image(what: str, how: str = 'cannot be read') -> Iterator[None]:
    """Within it every exception becomes an UnusableImage: readers and preprocessors raise anything for a damaged file.

    Only what reads or transforms an image belongs into it: an error anywhere else is one of the program.

    Args:
        what: names of the files.
        how: what is then wrong with them.

    Raises:
        UnusableImage: for any exception.
    """
    try:
        yield
    except UnusableImage:
        raise
    except MemoryError:
        raise UnusableImage(f'{what} {how}: there is not enough memory') from None
    except Exception as error:
        text = (str(error).strip().splitlines() or [''])[-1]
        kind = type(error).__name__
        reason = text if text and isinstance(error, READABLE_ERRORS) else \
            f'it is damaged, or not what its name says ({kind}{f": {text}" if text else ""})'
        raise UnusableImage(f'{what} {how}: {reason}') from error


def images_in(folder: Path, ending: str) -> list[Path]:
    """Files of a folder with an ending, links to nothing included, in order; without what macOS writes beside them."""
    return sorted(file for file in folder.glob(f'*{ending}')
                  if (file.is_file() or file.is_symlink()) and not is_apple_double(file))


def sample_files(folder: Path, case: str, ending: str) -> list[Path]:
    """The samples of a case in an output folder, by their number; empty if none were saved."""
    named = re.compile(re.escape(case) + r'_s(\d+)' + re.escape(ending))
    numbered = [(int(match[1]), file) for file in images_in(folder / SAMPLES, ending)
                if (match := named.fullmatch(file.name))]
    return [file for _, file in sorted(numbered)]


def other_images(folder: Path, ending: str) -> list[str]:
    """Names of a folder's files that nnU-Net has a reader for and that do not end as they should."""
    return [file.name for file in images_in(folder, '')
            if file.name.lower().endswith(IMAGE_ENDINGS) and not file.name.endswith(ending)]


def is_apple_double(file: Path) -> bool:
    """Whether a file is no image but what macOS has written beside one: `._NAME`."""
    if not file.name.startswith('._') or not file.is_file():
        return False
    with file.open('rb') as stream:
        return stream.read(4) == APPLE_DOUBLE


def damage(file: Path) -> str:
    """What is wrong with a file that its reader would take for whole; empty if nothing, or if the reader finds it.

    A .nii or .nii.gz that is truncated, its checksum or its voxel size wrong; a truncated .gipl, or .tif of several
    pages.

    Args:
        file: an image; the whole of a compressed .nii.gz is read.
    """
    looks = {'.nii': _damage_of_nifti, '.nii.gz': _damage_of_nifti, '.gipl': _damage_of_gipl, '.tif': _damage_of_tif,
             '.tiff': _damage_of_tif}
    look = next((look for ending, look in looks.items() if file.name.endswith(ending)), None)
    try:
        with as_unusable_image(file.name):  # a header holds any numbers
            return look(file) if look is not None else ''
    except UnusableImage as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, gzip.BadGzipFile):
            return f'cannot be read ({cause.strerror or cause})'
        if file.stat().st_size == 0:
            return 'is empty'
        return TRUNCATED + (f' ({cause})' if isinstance(cause, READABLE_ERRORS) else '')


def _damage_of_gipl(file: Path) -> str:
    """Whether a .gipl has fewer bytes than its header says, in words; SimpleITK fills up."""
    with file.open('rb') as stream:
        *shape, kind = struct.unpack('>5H', stream.read(10))
    bytes_ = {15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}.get(kind, 1)
    needed = 256 + bytes_ * int(np.prod([max(1, n) for n in shape], dtype=np.int64))
    return TRUNCATED if file.stat().st_size < needed else ''


def _damage_of_tif(file: Path) -> str:
    """Whether a page of a .tif lies beyond the file's end, or is one before it, in words: tifffile gives the pages up
    to there. Empty if it is no .tif."""
    size = file.stat().st_size
    with file.open('rb') as stream:
        start = stream.read(16)
        if start[:4] not in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+'):
            return ''  # the reader says so
        order, big = ('<' if start[:2] == b'II' else '>'), 43 in start[2:4]
        number, entry, link = ('Q', 20, 'Q') if big else ('H', 12, 'I')
        offset, = struct.unpack(order + link, start[8:16] if big else start[4:8])
        seen: set[int] = set()
        while 0 < offset < size and offset not in seen:
            seen.add(offset)
            stream.seek(offset)
            entries, = struct.unpack(order + number, stream.read(struct.calcsize(number)))
            stream.seek(entries * entry, 1)
            offset, = struct.unpack(order + link, stream.read(struct.calcsize(link)))
    return TRUNCATED if offset != 0 else ''


def _damage_of_nifti(file: Path) -> str:
    """What is wrong with a .nii or .nii.gz; empty if nothing."""
    with open_bytes(file) as stream:
        start = stream.read(HEADER)
        if not start:
            return 'is empty'
        header = read_header(start)
        if header is None:
            return 'is no NIfTI image'
        size = len(start) + _rest(stream) if file.name.endswith('.gz') else file.stat().st_size
    shape = [int(n) for n in header['dim'][1:1 + int(header['dim'][0])]]
    needed = int(header['vox_offset']) + int(np.prod(shape, dtype=np.int64)) * int(header['bitpix']) // 8
    if size < needed:
        return f'is truncated: it has {size} bytes of {needed}'
    sizes = [float(value) for value in header['pixdim'][1:1 + min(len(shape), 3)]]
    if not all(np.isfinite(value) and value > 0 for value in sizes):
        return f'gives a voxel size of {" x ".join(f"{value:g}" for value in sizes)} mm: correct its pixdim'
    return ''


def spacing_damage(reader: Any, file: Path, channel: bool) -> str:
    """What is wrong with the file that gives a 3D tif its voxel size; empty if there is none, or nothing is wrong.

    Args:
        reader: nnU-Net's, of which only that of 3D tif looks for such a file.
        file: the tif.
        channel: whether its name ends in a channel's number, which that of the file beside has not.
    """
    beside = file.with_name(f'{file.name[:-len(file.suffix) - (5 if channel else 0)]}.json')
    if not isinstance(reader, Tiff3DIO) or not beside.is_file():
        return ''
    whose = f'{beside.name}, which gives the voxel size of {file.name},'
    try:
        with as_unusable_image(whose):
            content = json.loads(beside.read_text())
    except UnusableImage as error:
        return f'{whose} is empty' if beside.stat().st_size == 0 else str(error)
    spacing = content.get('spacing') if isinstance(content, dict) else None
    if not (isinstance(spacing, list) and len(spacing) == 3
            and all(type(value) in (int, float) and 0 < value <= LARGEST for value in spacing)):
        return f'{whose} needs "spacing": three numbers above 0, in mm, and has {json.dumps(spacing)}'
    return ''


def non_finite(file: Path) -> int:
    """Voxels of a .nii or .nii.gz that are NaN or infinite, which SimpleITK reads as 0; 0 for all other files."""
    if not file.name.endswith(('.nii', '.nii.gz')):
        return 0
    with open_bytes(file) as stream:
        header = read_header(stream.read(HEADER))
        size = 0 if header is None else {16: 4, 64: 8}.get(int(header['datatype']), 0)
        if size == 0:
            return 0
        stream.seek(int(header['vox_offset']))
        bad, left = 0, size * int(np.prod(header['dim'][1:1 + int(header['dim'][0])], dtype=np.int64))
        while block := stream.read(min(BLOCK_BYTES, left)):
            values = np.frombuffer(block, f'{header.endianness}f{size}')
            bad, left = bad + int(np.count_nonzero(~np.isfinite(values))), left - len(block)
    return bad


def open_bytes(file: Path) -> Any:
    """A file's content as a stream of bytes, of a .gz what is compressed in it."""
    return gzip.open(file) if file.name.endswith('.gz') else file.open('rb')


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
    while block := stream.read(BLOCK_BYTES):
        total += len(block)
    return total
