"""Image, masks and uncertainty map of one case, turned so that the page shows them as radiologists look at them."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_pdddpm.file_names import PRESEGMENTATION, UNCERTAINTY
from nnunet_pdddpm.image_files import UnusableImage, as_unusable_image, damage, full_scale, sample_files

MAX_SAMPLES = 16
"""Samples of a case that the page shows."""
TOWARDS = {'L': (0, -1), 'R': (0, 1), 'P': (1, -1), 'A': (1, 1), 'I': (2, -1), 'S': (2, 1)}
"""Letter of an orientation -> axis and sign, as `io_orientation` gives them."""


@dataclass(frozen=True)
class DisplayAxes:
    """How arrays (z, y, x) in a file's order become arrays that go to superior, posterior and left along their axes.

    Attributes:
        order: the array's axis for each displayed axis.
        flipped: which displayed axes run against those of the array that the reader gives.
        counted_back: which run against those of the file itself: a reader may turn the image.
        anatomical: False where the file says nothing of the patient; then both orders are the same.
    """
    order: tuple[int, int, int] = (0, 1, 2)
    flipped: tuple[bool, bool, bool] = (False, False, False)
    counted_back: tuple[bool, bool, bool] = (False, False, False)
    anatomical: bool = False

    @classmethod
    def from_properties(cls, properties: dict[str, Any]) -> DisplayAxes:
        """The turn to the nearest anatomical axes, from what an nnU-Net reader says of a file's geometry."""
        affine, in_file = np.eye(4), None
        if len(properties.get('sitk_stuff', {}).get('direction', ())) == 9:
            to_ras = np.diag([-1.0, -1.0, 1.0])
            affine[:3, :3] = to_ras @ np.reshape(properties['sitk_stuff']['direction'], (3, 3))
            if 'original_orientation' in properties['sitk_stuff']:
                in_file = [TOWARDS[letter] for letter in properties['sitk_stuff']['original_orientation']]
        elif 'nibabel_stuff' in properties:
            geometry = properties['nibabel_stuff']
            affine = np.asarray(geometry.get('reoriented_affine', geometry['original_affine']))
            in_file = io_orientation(geometry['original_affine'])
        else:
            return cls()
        order, flipped = _turn(io_orientation(affine))
        return cls(order, flipped, flipped if in_file is None else _turn(in_file)[1], True)

    def reorient(self, array: np.ndarray) -> np.ndarray:
        """An array (z, y, x) in the file's order as (inferior-superior, anterior-posterior, right-left), a view."""
        return array.transpose(self.order)[tuple(slice(None, None, -1 if flip else 1) for flip in self.flipped)]


def _turn(nearest: Any) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Order and flips from (axis, sign) of x, y, z; axis: 0 left-right, 1 posterior-anterior, 2 inferior-superior."""
    axes, signs = zip(*((int(axis), int(sign)) for axis, sign in nearest), strict=True)
    z, y, x = ((axes.index(world), sign) for world, sign in ((2, 1), (1, -1), (0, -1)))
    return ((2 - z[0], 2 - y[0], 2 - x[0]),
            (signs[z[0]] != z[1], signs[y[0]] != y[1], signs[x[0]] != x[1]))


@dataclass(frozen=True)
class CaseVolumes:
    """One case, all arrays of one shape and in the order of display.

    Attributes:
        image: the first channel, float32.
        consensus: label map.
        stock: label map of the stock model.
        uncertainty: in [0, 1].
        samples: label maps of the samples, of the first `MAX_SAMPLES`; none if they are not in the folder.
        spacing: mm along the three axes.
        axes: the turn that was made.
        unit: what a length is in: mm; px where the file has no voxel size.
    """
    image: np.ndarray
    consensus: np.ndarray
    stock: np.ndarray
    uncertainty: np.ndarray
    samples: tuple[np.ndarray, ...]
    spacing: tuple[float, float, float]
    axes: DisplayAxes
    unit: str = 'mm'


def required_file(file: Path) -> Path:
    """The file itself, or a ValueError that names it and the remedy."""
    if not file.is_file():
        raise UnusableImage(f'The report needs {file}, which is not there; predict again with --report')
    return file


def read_case(folder: Path, case: str, images: Sequence[Path], ending: str, reader: Any) -> CaseVolumes:
    """Read one case of an output folder of `nnUNetv2_pdddpm_predict`.

    Args:
        folder: the output folder.
        case: name of the case.
        images: its image files, of which the first is read; colours in it become their mean.
        ending: file ending, with the dot.
        reader: instance of the plans' reader and writer class.

    Raises:
        UnusableImage: a file is missing or unreadable, the shapes differ, or the map is not within [0, 1].
    """
    if not images:
        raise UnusableImage(f'The report needs an image of case {case!r}, and none was given')
    map_file = folder / UNCERTAINTY / f'{case}_{UNCERTAINTY}{ending}'
    consensus, properties = _read(reader, folder / f'{case}{ending}')
    stock, _ = _read(reader, folder / PRESEGMENTATION / f'{case}{ending}')
    uncertainty, _ = _read(reader, map_file)
    samples = [_read(reader, file)[0] for file in sample_files(folder, case, ending)[:MAX_SAMPLES]]
    first = str(required_file(Path(images[0])))
    with as_unusable_image(first):
        image, _ = reader.read_images((first,))
    image = image[:3].mean(0) if isinstance(reader, NaturalImage2DIO) and len(image) > 2 else image[0]
    if isinstance(reader, NaturalImage2DIO | Tiff3DIO):
        uncertainty = uncertainty / full_scale(ending, reader)
    for name, array in (('stock mask', stock[0]), ('uncertainty map', uncertainty[0]), ('image', image),
                        *((f'sample {i}', sample[0]) for i, sample in enumerate(samples))):
        if array.shape != consensus[0].shape:
            raise UnusableImage(f'Case {case!r}: the {name} has shape {array.shape}, the mask {consensus[0].shape}; '
                                f'predict into an empty folder')
    if not (uncertainty.min() >= -1e-3 and uncertainty.max() <= 1 + 1e-3):  # catches NaN as well
        raise UnusableImage(f'{map_file} holds values outside [0, 1] ({uncertainty.min()} to {uncertainty.max()}), '
                            f'which is no uncertainty map; predict again with --report')
    axes = DisplayAxes.from_properties(properties)
    spacing = [float(properties['spacing'][axis]) for axis in axes.order]
    return CaseVolumes(axes.reorient(np.nan_to_num(image, posinf=0, neginf=0)), axes.reorient(_labels(consensus)),
                       axes.reorient(_labels(stock)), axes.reorient(uncertainty[0]),
                       tuple(axes.reorient(_labels(sample)) for sample in samples),
                       (spacing[0], spacing[1], spacing[2]), axes,
                       'px' if isinstance(reader, NaturalImage2DIO) else 'mm')


def _read(reader: Any, file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """A mask or map, with its geometry; raises ValueError if it is missing, damaged or unreadable."""
    if wrong := damage(required_file(file)):
        raise UnusableImage(f'{file} {wrong}; predict again with --report')
    with as_unusable_image(str(file)):
        return reader.read_seg(str(file))


def _labels(segmentation: np.ndarray) -> np.ndarray:
    return np.rint(segmentation[0]).astype(np.uint16)
