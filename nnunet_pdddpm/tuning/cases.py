"""The validation cases of a fold, as nnU-Net preprocessed them, and several raters' masks on the same grid."""
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import Tensor

from nnunet_pdddpm.evaluation.folders import Folders, open_folders
from nnunet_pdddpm.geometry import voxel_volume_ml
from nnunet_pdddpm.image_files import UnusableImage, as_unusable_image, damage
from nnunet_pdddpm.labels import foreground_labels
from nnunet_pdddpm.network.seen import split_overlap, stored_seen
from nnunet_pdddpm.tuning.budget import enough_cases
from nnunet_pdddpm.tuning.errors import TuningError
from nnunet_pdddpm.tuning.fold import FoldData


@dataclass(frozen=True)
class Case:
    """One case in the network's grid."""
    image: Tensor
    """(image channels, Z, Y, X), with the previous stage's channels for a cascade."""
    labels: np.ndarray
    """(Z, Y, X)"""
    raters: list[np.ndarray]
    """Several people's label maps (Z, Y, X); empty without them."""
    properties: dict[str, Any]
    """Of the preprocessed image, as nnU-Net's preprocessor gives them."""
    name: str


class ValidationCases:
    """Reads them as nnU-Net's `perform_actual_validation` does."""

    def __init__(self, data: FoldData, raters: Path | None = None) -> None:
        """
        Args:
            data: of the fold.
            raters: folder of several people's masks, `CASE__RATER` with the data set's file ending.

        Raises:
            TuningError: if there are no validation cases, or they are not preprocessed.
            EvaluationError: if the raters' folder or a mask in it cannot be used.
        """
        names, folder = data.validation, str(data.preprocessed)
        if not names:
            raise TuningError(f'Fold {data.fold} has no validation cases: the sampling settings need a fold with them.')
        if missing := sorted(set(names) - set(data.dataset_class.get_identifiers(folder))):
            raise TuningError(f'{len(missing)} of {len(names)} validation cases are missing in {folder} (such as '
                              f'{missing[0]}): run nnUNetv2_preprocess first.')
        self.data, self.training = data, data.training
        self.dataset = data.dataset_class(folder, names, data.previous_stage)
        self.names: list[str] = list(self.dataset.identifiers)
        self.label_manager = data.plans.get_label_manager(data.dataset_json)
        self._reader = data.plans.image_reader_writer_class()
        self.log = data.log
        self.raters = None if raters is None else self._open_raters(raters)
        self._require_raters()

    def _open_raters(self, raters: Path) -> Folders:
        truth, model = self.data.truth, self.data.output.parent
        folders = open_folders(truth, truth, raters, model / 'dataset.json', model / 'plans.json')
        for line in folders.left_out:
            self.log(f'Not compared: {line}')
        for line in folders.doubtful:
            self.log(f'Look at this: {line}')
        return folders

    def restrict_to(self, names: Collection[str]) -> None:
        """Leave out all cases but these; raises TuningError if raters were named and have no mask of any of them."""
        self.names = [name for name in self.names if name in names]
        self._require_raters()

    def _require_raters(self) -> None:
        if self.raters is not None and not any(self.raters.rater_files(name) for name in self.names):
            raise TuningError(f'{self.raters.raters} has no mask of any validation case of fold {self.data.fold} that '
                              f'can be measured on: name them CASE__RATER{self.raters.ending}, such as '
                              f'{self.names[0]}__1{self.raters.ending}.')

    def voxels(self, name: str) -> int:
        """Size of a case."""
        return int(np.prod(self.dataset.load_case(name)[0].shape[1:]))

    def load(self, name: str) -> Case:
        """Read a case."""
        data, seg, previous, properties = self.dataset.load_case(name)
        image = np.asarray(data[:])
        if self.data.previous_stage is not None:
            image = np.vstack((image, convert_labelmap_to_one_hot(
                previous[:], self.label_manager.foreground_labels, output_dtype=image.dtype)))
        return Case(torch.from_numpy(np.array(image)), np.asarray(seg[:])[0],
                    self._raters_of(name, properties, image.shape[1:]), properties, name)

    def true_volumes(self, name: str) -> dict[str, float] | None:
        """True volume of each label or region in ml, from the original truth.

        None if voxels of the truth are to be ignored, or, with a line in the log, if it is damaged.

        Its voxels are those of the image: nnU-Net copies the truth, and not the json that gives the size in a tif.
        """
        properties = self.dataset.load_case(name)[3]
        file = self.data.truth / f'{name}{self.data.dataset_json["file_ending"]}'
        try:
            if wrong := damage(file):  # SimpleITK reads a part of a mask as the whole
                raise UnusableImage(f'{file} {wrong}')
            with as_unusable_image(str(file)):
                labels, _ = self._reader.read_seg(str(file))
        except UnusableImage as error:
            self.log(f'The true volume of {name} is not known: {error}.')
            return None
        if self.label_manager.ignore_label is not None and (labels == self.label_manager.ignore_label).any():
            return None
        voxel = voxel_volume_ml(labels.shape[1:], properties['spacing'])
        return {label: float(np.isin(labels, values).sum()) * voxel
                for label, values in foreground_labels(self.data.dataset_json).items()}

    def _raters_of(self, name: str, properties: dict[str, Any], shape: tuple[int, ...]) -> list[np.ndarray]:
        """The raters' masks, transposed, cropped and resampled as nnU-Net's preprocessor does with a truth."""
        if self.raters is None:
            return []
        reference = self.raters.read_mask(self.raters.references / f'{name}{self.raters.ending}')
        if isinstance(self.raters.reader, Tiff3DIO):  # nnU-Net copies the truth, and not the json with its voxel size
            reference = replace(reference, spacing=tuple(properties['spacing']),
                                properties={**reference.properties, 'spacing': properties['spacing']})
        forward, box = self.data.plans.transpose_forward, properties['bbox_used_for_cropping']
        spacing = [properties['spacing'][i] for i in forward]
        configuration = self.data.configuration
        target = list(configuration.spacing)
        target = target if len(target) == len(spacing) else [spacing[0], *target]
        masks = []
        for file in self.raters.rater_files(name).values():
            mask = self.raters.read_mask(file, reference).array.transpose(forward)[tuple(slice(*b) for b in box)]
            masks.append(np.asarray(configuration.resampling_fn_seg(mask[None].astype(np.float32), shape, spacing,
                                                                    target))[0].round().astype(np.int16))
        return masks


def exclude_seen_cases(cases: ValidationCases, weights: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Leave out validation cases that a model or its stock model may have been trained on.

    Args:
        cases: the validation cases, those of a split.
        weights: state dict of the model.
        log: told what is left out, and what is not known.

    Raises:
        TuningError: if too few cases remain.
    """
    seen, names = stored_seen(weights), cases.names
    leak, both = seen.leaks(names, cases.training), split_overlap(names, cases.training)
    wrong = '; '.join([f'by the present splits_final.json {leak}'] * bool(leak) + [both] * bool(both))
    wrong = wrong[:1].upper() + wrong[1:]
    left = set(names) - {*cases.training, *seen.leaked_into_denoiser(names), *seen.leaked_into_stock(names)}
    if not enough_cases(len(left), len(names)):
        raise TuningError(f'{wrong}: nothing can be measured on them, and {len(left)} others are too few. Put back the '
                          f'splits_final.json that the models were trained with, or train both again with one that '
                          f'validates on other cases than it trains on.')
    if wrong:
        log(f'WARNING: {wrong}. Nothing is measured on them here, but on the {len(left)} others.')
    if unknown := seen.unknown():
        log(f'{unknown} If splits_final.json was changed since, what is measured on the validation cases is wrong.')
    cases.restrict_to(left)
