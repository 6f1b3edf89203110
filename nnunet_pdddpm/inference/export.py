"""From the network's grid to files in the geometry of the input image, and what is measured on them there."""
from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from scipy import ndimage

from nnunet_pdddpm.file_names import PRESEGMENTATION, SAMPLES, UNCERTAINTY
from nnunet_pdddpm.files import writing
from nnunet_pdddpm.image_files import damage, full_scale
from nnunet_pdddpm.inference.resampling import axes_of, resampled_classes, resampled_regions
from nnunet_pdddpm.labels import boxes_of, foreground_labels, label_channels


@dataclass(frozen=True)
class Outputs:
    """What is written beside the mask."""
    probabilities: bool = False
    uncertainty: str = 'none'
    """'none', 'entropy' or 'all'."""
    samples: bool = False
    presegmentation: bool = False


@dataclass(frozen=True)
class CaseExport:
    """Writes one case into a folder of its own. Its methods run in background processes."""
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    properties: dict[str, Any]
    """Of the preprocessed image, as nnU-Net's preprocessor gives them."""
    folder: Path
    case: str
    outputs: Outputs

    def files(self, samples: int) -> list[str]:
        """The files that tell whether a case is complete, relative to the output folder."""
        ending, case = self.dataset_json['file_ending'], self.case
        names = [f'{case}{ending}']
        names += [f'{case}.npz'] if self.outputs.probabilities else []
        names += [f'{PRESEGMENTATION}/{case}{ending}'] if self.outputs.presegmentation else []
        names += [f'{SAMPLES}/{case}_s{i:02d}{ending}' for i in range(samples)] if self.outputs.samples else []
        maps = {'none': [], 'entropy': [UNCERTAINTY], 'all': [UNCERTAINTY, 'variance']}[self.outputs.uncertainty]
        return names + [f'{UNCERTAINTY}/{case}_{name}{ending}' for name in maps]

    def earlier_files(self, output: Path) -> list[Path]:
        """What an earlier prediction has left of the case in the output folder, the mask first."""
        ending, case = self.dataset_json['file_ending'], self.case
        maps = [UNCERTAINTY, 'mutual_information', 'variance', 'variance_between_folds',
                *probability_maps(self.labels()).values()]
        names = [f'{case}{ending}', f'{case}.npz', f'{case}.pkl', f'{PRESEGMENTATION}/{case}{ending}',
                 *(f'{UNCERTAINTY}/{case}_{name}{ending}' for name in maps)]
        sample = re.compile(re.escape(case) + r'_s\d+' + re.escape(ending))
        samples = [file for file in (output / SAMPLES).glob(f'*{ending}') if sample.fullmatch(file.name)]
        files = [file for file in (output / name for name in names) if file.is_file()] + samples
        beside = [file.with_suffix('.json') for file in files if file.name.endswith(ending)]  # the voxel size of a tif
        return files + [file for file in beside if isinstance(self._reader(), Tiff3DIO) and file.is_file()]

    def sample(self, logits: np.ndarray, number: int) -> None:
        """The mask of one sample, logits (C, Z, Y, X) whose largest of classes is 0, as a file."""
        with writing(self.folder):
            self._write_labels(self.sample_segmentation(logits), self.folder / SAMPLES / f'{self.case}_s{number:02d}')

    def write_prediction(self, logits: np.ndarray, stock_logits: np.ndarray | None, maps: Mapping[str, np.ndarray]
             ) -> dict[str, dict[str, int | None]]:
        """Mask, and what else is to be written but for the samples.

        Args:
            logits: of the mask (C, Z, Y, X).
            stock_logits: of the stock model; None if its mask is not to be written.
            maps: name -> (Z, Y, X) in [0, 1].

        Returns:
            label -> voxels of the mask (`voxels`), of the stock model's mask (`voxels_stock`) if it was written, else
            None, and the mask's connected `components` (26-connected in 3D, 8-connected in 2D).

        Raises:
            OSError: if a file cannot be written, or is not whole afterwards.
        """
        with writing(self.folder):
            mask, stock = self._write(logits, stock_logits, maps)
        stock_voxels = {} if stock is None else {name: int(there.sum()) for name, there in places(stock, self.labels())}
        return {name: {'voxels': int(there.sum()), 'voxels_stock': stock_voxels.get(name),
                       'components': int(ndimage.label(there, np.ones((3, 3, 3)))[1])}
                for name, there in places(mask, self.labels())}

    def _write(self, logits: np.ndarray, stock_logits: np.ndarray | None, maps: Mapping[str, np.ndarray]
               ) -> tuple[np.ndarray, np.ndarray | None]:
        """The files of `write_prediction`; the mask as it was read back, and the stock model's."""
        file = self.folder / self.case
        all_maps = self.outputs.uncertainty == 'all'
        if all_maps and not self.outputs.probabilities:  # nnU-Net would compress them into a file first
            labels, probabilities = self._converted(logits, return_probabilities=True)
            self._write_labels(labels, file)
            self._write_probability_maps(probabilities)
            del labels, probabilities
        else:
            export_prediction_from_logits(logits, self.properties, self.configuration_manager, self.plans_manager,
                                          self.dataset_json, str(file), self.outputs.probabilities)
            check_written(Path(str(file) + self.dataset_json['file_ending']))
            if all_maps:
                self._write_probability_maps(np.load(f'{file}.npz')['probabilities'])
        mask = self._reader().read_seg(str(file) + self.dataset_json['file_ending'])[0][0]
        stock = None if stock_logits is None else self.segmentation(stock_logits)
        if stock is not None:
            self._write_labels(stock, self.folder / PRESEGMENTATION / self.case)
        if self.outputs.uncertainty != 'none':
            names = list(maps) if all_maps else [UNCERTAINTY]
            resampled = self._to_image(np.stack([maps[name] for name in names]))
            for name, values in zip(names, resampled, strict=True):
                self._write_map(values, name)
        return mask, stock

    def segmentation(self, logits: np.ndarray) -> np.ndarray:
        """Label map of the original image for logits (C, Z, Y, X), by nnU-Net's own rules."""
        labels: np.ndarray = self._converted(logits)
        return labels

    def _converted(self, logits: np.ndarray, **kwargs: bool) -> Any:
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, self.plans_manager, self.configuration_manager,
            self.plans_manager.get_label_manager(self.dataset_json), self.properties, **kwargs)

    def sample_segmentation(self, logits: np.ndarray) -> np.ndarray:
        """The same as `segmentation`, with little to compute, for the logits of a sample: see `resampling`."""
        properties, manager = self.properties, self.plans_manager.get_label_manager(self.dataset_json)
        axes = axes_of(self.configuration_manager.resampling_fn_probabilities, logits.shape[1:], *self._grid())
        if axes is None:
            return self.segmentation(logits)
        whole = np.zeros(properties['shape_before_cropping'],
                         np.uint8 if len(manager.foreground_labels) < 255 else np.uint16)
        if manager.has_regions:
            inside = np.zeros(properties['shape_after_cropping_and_before_resampling'], whole.dtype)
            for label, region in zip(manager.regions_class_order, resampled_regions(logits, axes), strict=True):
                inside[region] = label
        else:
            inside = resampled_classes(logits, axes)
        insert_crop_into_image(whole, inside, properties['bbox_used_for_cropping'])
        return whole.transpose(self.plans_manager.transpose_backward)

    def labels(self) -> dict[str, tuple[int, ...]]:
        """Name of each label or region -> the values that it has in a mask."""
        return foreground_labels(self.dataset_json)


    def _reader(self) -> Any:
        return self.plans_manager.image_reader_writer_class()

    def _write_labels(self, labels: np.ndarray, truncated: Path) -> None:
        truncated.parent.mkdir(exist_ok=True)
        file = Path(str(truncated) + self.dataset_json['file_ending'])
        self._reader().write_seg(labels, str(file), self.properties)
        check_written(file)

    def _grid(self) -> tuple[Any, list[float], list[float]]:
        """What nnU-Net resamples to: the crop's shape, spacing of the network's grid, and of the image."""
        original = [self.properties['spacing'][i] for i in self.plans_manager.transpose_forward]
        shape = self.properties['shape_after_cropping_and_before_resampling']
        spacing = list(self.configuration_manager.spacing)
        return shape, spacing if len(spacing) == len(shape) else [original[0], *spacing], original

    def _to_image(self, maps: np.ndarray) -> np.ndarray:
        """Maps (M, Z, Y, X) of the network's grid resampled as nnU-Net resamples probabilities; 0 outside the crop."""
        properties = self.properties
        resampled = self.configuration_manager.resampling_fn_probabilities(maps, *self._grid())
        whole = np.zeros((len(maps), *properties['shape_before_cropping']), np.float32)
        for map_, values in zip(whole, np.asarray(resampled, np.float32), strict=True):
            insert_crop_into_image(map_, values, properties['bbox_used_for_cropping'])
        return whole.transpose([0, *(1 + i for i in self.plans_manager.transpose_backward)])

    def _write_probability_maps(self, probabilities: np.ndarray) -> None:
        """Write the map of each label from probabilities (C, z, y, x)."""
        maps = probability_maps(self.labels())
        for name, channel in label_channels(self.dataset_json, self.plans_manager).items():
            self._write_map(probabilities[channel], maps[name])

    def _write_map(self, values: np.ndarray, name: str) -> None:
        """Values (z, y, x) in [0, 1] as float32 image `uncertainty/CASE_NAME` in the geometry of the input image.

        The map goes through the data set's own writer as integers, so that whatever that does about axes and affines
        holds for it too, and is then rewritten as float32. Endings that hold no float (png) keep the integers, of which
        `full_scale` is 1 (nnU-Net writes them as 8-bit if all are below 255).
        """
        (self.folder / UNCERTAINTY).mkdir(exist_ok=True)
        ending = self.dataset_json['file_ending']
        file = str(self.folder / UNCERTAINTY / f'{self.case}_{name}{ending}')
        reader = self._reader()
        scale = full_scale(ending, reader)
        integers = np.round(np.clip(values, 0, 1) * scale).astype(np.uint16)
        reader.write_seg(integers, file, self.properties)
        check_written(Path(file))
        if ending in ('.nii', '.nii.gz'):
            written: Any = nibabel.load(file)
            image = nibabel.Nifti1Image(np.asarray(written.dataobj, np.float32) / scale, None, written.header)
            image.set_data_dtype(np.float32)
            nibabel.save(image, file)
        elif ending in ('.nrrd', '.mha', '.gipl'):
            sitk.WriteImage(sitk.Cast(sitk.ReadImage(file), sitk.sitkFloat32) / scale, file, True)
        check_written(Path(file))


def places(mask: np.ndarray, labels: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Each label or region, and where it is (z, y, x) bool in a box around it: whole masks for each of a hundred labels
    would take minutes.

    Args:
        mask: (z, y, x), whole numbers of any type.
        labels: name -> the values that it has in the mask.
    """
    values_at, nowhere = mask.astype(np.int32), (slice(0, 0),) * mask.ndim
    for (name, values), box in zip(labels.items(), boxes_of(values_at, labels.values()), strict=True):
        yield name, np.isin(values_at[box or nowhere], values)


def check_written(file: Path) -> None:
    """Raise OSError if an image just written is not whole: SimpleITK says nothing when the disk is full."""
    if wrong := damage(file):
        raise OSError(errno.EIO, f'What was written {wrong}', str(file))


def probability_maps(labels: Iterable[str]) -> dict[str, str]:
    """Label -> name of its probability map, with nothing in it that a file's name could not hold.

    Names that differ in such letters only, or in upper and lower case, which some file systems do not tell apart, get
    numbers.
    """
    named: dict[str, str] = {}
    plain = {label: re.sub('[^A-Za-z0-9.-]+', '_', label) for label in labels}
    often = Counter(name.casefold() for name in plain.values())
    taken = {name for name, number in often.items() if number == 1}
    for label, name in plain.items():
        unique, number = name, 1
        while often[name.casefold()] > 1 and (unique == name or unique.casefold() in taken):
            unique, number = f'{name}_{number}', number + 1
        taken.add(unique.casefold())
        named[label] = f'probability_{unique}'
    return named


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """To hand over to another process, as nnU-Net does: half precision."""
    return tensor.half().cpu().numpy()
