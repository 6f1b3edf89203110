"""What is odd about an image that is predicted all the same: a sentence each, for the summary, the report and the user.

nnU-Net reads such images on. Whether their masks can be trusted is for a person to say, who has to be told.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_pdddpm.image_files import HEADER, UnusableImage, as_unusable_image, non_finite, open_bytes, read_header

OUTLIER_RARITY = 1000
"""One voxel in so many, at either end of the intensities, may be an outlier."""
SQUEEZE_FACTOR, NARROW_FACTOR, DISTANCE_FACTOR = 2.0, 4.0, 10.0
"""Factors from which on a distribution is far from that of the training cases, see `_intensity_remark`."""
NORMAL_WIDTH = 5.15
"""Distance of the 0.5th and 99.5th percentile of a normal distribution in its standard deviations."""
NIFTI = ('.nii', '.nii.gz')
ORIGIN_KEYS = {'.nrrd': (b'space origin:',), '.mha': (b'Offset =', b'Position =', b'Origin =')}


def intensity_remarks(data: np.ndarray, schemes: Sequence[str], training: Mapping[str, Mapping[str, float]],
                      names: Sequence[str]) -> list[str]:
    """How the intensities that the networks get differ from those of the training cases.

    Args:
        data: (channels, Z, Y, X), normalised.
        schemes: the plans' normalisation of each channel.
        training: channel number as text -> statistics of the training cases' foreground before normalisation, which
            nnU-Net's fingerprint holds, and the plans a copy of it.
        names: of the channels.

    Raises:
        UnusableImage: if no channel holds anything.
    """
    empty = [bool(np.ptp(channel) <= 1e-6 * max(1.0, float(np.abs(channel).max()))) for channel in data]
    if all(empty):
        raise UnusableImage('after normalisation all voxels are alike, there is nothing to segment')
    found = []
    for i, (channel, name) in enumerate(zip(data, names, strict=True)):
        remark = 'after normalisation all its voxels are alike: it holds nothing' if empty[i] else \
            _intensity_remark(channel, schemes[i], training.get(str(i), {}))
        if remark:
            found.append(f'channel {i} ({name}): {remark}')
    return found


def _intensity_remark(channel: np.ndarray, scheme: str, training: Mapping[str, float]) -> str:
    """How a normalised channel is far from the training cases; empty if it is not.

    Where an image is normalised by its own statistics, a few extreme voxels squeeze all others: the standard deviation
    (or the range) of all is compared with that of all but the extremes, see `OUTLIER_RARITY`, and this ratio with that
    of the training cases' foreground. Where it is normalised by fixed numbers, its range is compared with that of this
    foreground.
    """
    every = channel.ravel()[::max(1, channel.size // 2_000_000)]
    few = min(every.size // OUTLIER_RARITY + 1, (every.size - 1) // 2)
    bulk = np.sort(every)[few:every.size - few].astype(np.float64)
    low, high = float(bulk[0]), float(bulk[-1])
    known = {'percentile_00_5', 'percentile_99_5', 'std', 'mean', 'min', 'max'} <= training.keys()
    fixed = _as_normalised(scheme, training) if known else None
    if fixed is not None:
        first, last = fixed
        width = last - first
        if high < first or low > last or high - low < width / NARROW_FACTOR or \
                low < first - DISTANCE_FACTOR * width or high > last + DISTANCE_FACTOR * width:
            return (f'its values after normalisation, {low:.3g} to {high:.3g}, are far from those of the foreground of '
                    f'the training cases, {first:.3g} to {last:.3g}: other units?')
        return ''
    width = training['percentile_99_5'] - training['percentile_00_5'] if known else 0.0
    if scheme == 'RescaleTo01Normalization':
        ratio, least = _ratio(np.ptp(channel), high - low), 2 * SQUEEZE_FACTOR
        usual = (training['max'] - training['min']) / width if width > 0 else 1.0
    else:
        ratio, least = _ratio(_deviation(channel), bulk.std()), SQUEEZE_FACTOR
        usual = training['std'] * NORMAL_WIDTH / width if width > 0 else 1.0
    if ratio > least * max(1.0, usual):
        return (f'a few extreme voxels squeeze all others to 1/{ratio:.3g} of their contrast, which no training case '
                f'prepares for: look at its intensities')
    return ''


def _deviation(channel: np.ndarray) -> float:
    """Standard deviation, slice by slice: in double precision a whole volume would take twice its memory."""
    mean = channel.mean(dtype=np.float64)
    return float(np.sqrt(sum(np.square(plane - mean, dtype=np.float64).sum() for plane in channel) / channel.size))


def _as_normalised(scheme: str, training: Mapping[str, float]) -> tuple[float, float] | None:
    """The training cases' 0.5th and 99.5th percentile as a scheme of fixed numbers normalises them, else None."""
    ends = np.array([training['percentile_00_5'], training['percentile_99_5']])
    if scheme == 'CTNormalization':
        ends = (ends - training['mean']) / max(training['std'], 1e-8)
    elif scheme == 'RGBTo01Normalization':
        ends = ends / 255
    elif scheme != 'NoNormalization':
        return None
    return float(ends[0]), float(ends[1])


def _ratio(whole: float, part: float) -> float:
    return float(whole / part) if part > 0 else float('inf')


def geometry_remarks(reader: Any, files: Sequence[str], properties: Mapping[str, Any]) -> list[str]:
    """What is odd about where an image lies, how large its voxels are, and about voxels that are no numbers.

    Args:
        reader: nnU-Net's.
        files: the channels.
        properties: from the reader.

    Raises:
        UnusableImage: if a file cannot be read again.
    """
    found = [f'{Path(file).name}: {remark}' for file in files for remark in _file_remarks(reader, Path(file))]
    if not files[0].endswith(NIFTI):
        found += [f'{Path(files[0]).name}: {remark}' for remark in _itk_remarks(properties.get('sitk_stuff', {}))]
    return found


def _file_remarks(reader: Any, file: Path) -> Iterator[str]:
    if isinstance(reader, Tiff3DIO):
        beside = f'{file.name[:-len(file.suffix) - 5]}.json'
        if not file.with_name(beside).is_file():
            yield f'no {beside} gives its voxel size: it counts as 1 mm, volumes are in 1000 voxels and not in ml'
    elif isinstance(reader, NaturalImage2DIO):
        yield 'pictures have no voxel size: a pixel counts as 1 mm, volumes are in 1000 pixels and not in ml'
    elif file.name.endswith(NIFTI):
        yield from _nifti_remarks(file)
        with as_unusable_image(file.name):
            bad = non_finite(file) if isinstance(reader, SimpleITKIO) else 0
        if bad:
            yield f'{bad} voxels are NaN or infinite: they are read as 0'
    elif file.suffix in ORIGIN_KEYS:
        with as_unusable_image(file.name), file.open('rb') as stream:
            header = stream.read(1 << 16).partition(b'\n\n')[0] if file.suffix == '.nrrd' else stream.read(1 << 12)
        if not any(key in header for key in ORIGIN_KEYS[file.suffix]):
            yield 'it does not say where it lies: its origin counts as 0, a viewer may show the mask elsewhere'


def _nifti_remarks(file: Path) -> Iterator[str]:
    with as_unusable_image(file.name), open_bytes(file) as stream:
        header = read_header(stream.read(HEADER))
    if header is None:
        return
    if header['pixdim'][0] != -1:  # 0 is read as 1, which nibabel does only where it corrects a header
        header['pixdim'][0] = 1
    forms = {}
    for name, code, affine in (('sform', int(header['sform_code']), header.get_sform), ('qform', int(
            header['qform_code']), header.get_qform)):
        if code > 0:
            try:
                with as_unusable_image(file.name):
                    forms[name] = np.asarray(affine(), np.float64)
            except UnusableImage:  # it can be used: the reader has read it
                yield f'its {name} is damaged: a viewer may show the mask elsewhere'
    if int(header['sform_code']) <= 0 and int(header['qform_code']) <= 0:
        yield 'it does not say where it lies (no sform, no qform): which side is left is not known'
    for name, affine in forms.items():
        if not np.isfinite(affine[:3, 3]).all():
            yield f'the origin in its {name} is no number: a viewer may show the mask elsewhere'
        elif wrong := _axes_problem(affine[:3, :3]):
            yield f'the axes of its {name} {wrong}'
    if len(forms) == 2 and all(np.isfinite(affine).all() for affine in forms.values()):
        corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [
            *(max(1, int(n)) - 1 for n in header['dim'][1:4]), 1]
        away = float(np.abs(corners @ (forms['sform'] - forms['qform']).T).max())
        if away > 0.5 * float(np.min(np.abs(header['pixdim'][1:4]))):
            yield (f'its sform and qform disagree by up to {away:.3g} mm: a viewer that goes by the other one may show '
                   f'the mask on the other side')


def _itk_remarks(stated: Mapping[str, Any]) -> Iterator[str]:
    """Remarks on the geometry as SimpleITK reads it, for formats whose header is not looked at."""
    if not np.isfinite(stated.get('origin', 0)).all():
        yield 'its origin is no number: a viewer may show the mask elsewhere'
    direction = np.asarray(stated.get('direction', (1,)), np.float64)
    if wrong := _axes_problem(direction.reshape(int(len(direction) ** 0.5), -1)):
        yield f'its axes {wrong}'


def _axes_problem(axes: np.ndarray) -> str:
    """What is wrong with the directions of axes, of any length, in columns; empty if they are at right angles."""
    if not np.isfinite(axes).all():
        return 'are no numbers: a viewer may show the mask elsewhere'
    lengths = np.linalg.norm(axes, axis=0)
    if not (lengths > 0).all():
        return 'have no length: a viewer may show the mask elsewhere'
    unit = axes / lengths
    if np.abs(unit.T @ unit - np.eye(len(axes))).max() > 1e-3:
        return 'are not at right angles: distances and volumes are computed as if they were'
    return ''
