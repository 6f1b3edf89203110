"""What lies in the folders that are compared, and the reading of it, with the checks that need both sides."""
from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Union

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_pdddpm.evaluation.voxelwise import stored_channels, stored_shape
from nnunet_pdddpm.file_names import SUMMARY
from nnunet_pdddpm.files import matches_identity
from nnunet_pdddpm.image_files import (
    UnusableImage,
    as_unusable_image,
    damage,
    images_in,
    non_finite,
    other_images,
    spacing_damage,
)
from nnunet_pdddpm.texts import abbreviated

Label = Union[int, tuple[int, ...]]


class EvaluationError(ValueError):
    """The folders cannot be evaluated; the message says why and what to do."""


RATER = '__'
"""Between the name of a case and that of a rater in the name of a mask."""


@dataclass(frozen=True)
class Mask:
    """A label map (z, y, x), its spacing in mm along these axes, and the properties that nnU-Net's reader gives."""
    file: Path
    array: np.ndarray
    spacing: tuple[float, ...]
    properties: dict[str, Any]


@dataclass(frozen=True)
class Folders:
    """The folders, what their data set is, and the cases to compare.

    Attributes:
        labels: name to label value or, for a region-based data set, to the label values of the region, in the order of
            the model's channels; background and ignore label left out.
        known_values: every label value that a mask may hold, the ignore label excepted.
        summary: the entries of `pdddpm_summary.json` by case, of the masks that they were made of.
        foreign_masks: case -> what is wrong with its mask, if that is not known to be the one that the summary was made
            of; empty without a summary.
        unpredicted: case -> why it could not be predicted when that was last tried; its mask is of an earlier one.
        left_out: a sentence for each kind of files that are not compared.
        doubtful: a sentence for files that may not be what they are compared as.
    """
    predictions: Path
    references: Path
    raters: Path | None
    cases: list[str]
    ending: str
    labels: dict[str, Label]
    has_regions: bool
    known_values: list[int]
    ignore_label: int | None
    reader: BaseReaderWriter
    summary: dict[str, dict[str, Any]]
    foreign_masks: dict[str, str] = field(default_factory=dict)
    unpredicted: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    def rater_files(self, case: str) -> dict[str, Path]:
        """The case's masks by rater; empty without a folder of raters.

        Where the names of several references fit, as A and A__b to A__b__1, the mask is one of the longest.
        """
        return {rater: file for owner, rater, file in self._rater_masks if owner == case}

    @cached_property
    def _rater_masks(self) -> list[tuple[str | None, str, Path]]:
        """Case, rater and file of each of the raters' masks; the case is None if the mask belongs to none."""
        found: list[tuple[str | None, str, Path]] = []
        cases = {file.name[:-len(self.ending)] for file in images_in(self.references, self.ending)}
        for file in images_in(self.raters, self.ending) if self.raters is not None else ():
            stem = file.name[:-len(self.ending)]
            ends = [i for i in range(len(stem) - len(RATER)) if stem.startswith(RATER, i) and stem[:i] in cases]
            found.append((stem[:ends[-1]], stem[ends[-1] + len(RATER):], file) if ends else (None, '', file))
        return found

    def not_compared(self) -> Iterator[str]:
        """A sentence for each kind of masks that lie in the folders and are not compared with anything."""
        for folder in filter(None, (self.references, self.raters)):
            if others := other_images(folder, self.ending):
                yield f'{len(others)} files in {folder} do not end in {self.ending}: {abbreviated(others)}'
        if foreign := [file.name for case, _, file in self._rater_masks if case is None]:
            yield f'{len(foreign)} masks in {self.raters} belong to no reference: {abbreviated(foreign)}'
        references = {file.name for file in images_in(self.references, self.ending)}
        alone = [file.name for file in images_in(self.predictions, self.ending)
                 if file.name not in references]
        if alone:
            yield f'{len(alone)} masks in {self.predictions} have no reference: {abbreviated(alone)}'

    def ambiguous(self) -> Iterator[str]:
        """A sentence for raters' masks whose name can be read in two ways, if there are some: the longer of the cases
        that they may be of is no reference."""
        if found := [f'{file.name} (of {case}, by {rater})' for case, rater, file in self._rater_masks
                     if case is not None and RATER in rater]:
            yield (f'{len(found)} masks in {self.raters} have a rater with {RATER} in the name, unless a reference is '
                   f'missing: {abbreviated(found)}')

    def read_mask(self, file: Path, like: Mask | None = None) -> Mask:
        """A label map; raises EvaluationError if it is unreadable, not of `like`'s geometry, or has unknown labels."""
        values, properties = self._read(file, like)
        known = self.known_values + ([] if self.ignore_label is None else [self.ignore_label])
        unknown = values[~np.isin(values, known)]
        if unknown.size:  # written out: 0.9999999 is not 1
            raise EvaluationError(f'{file} has label values such as {np.format_float_positional(unknown[0], trim="-")} '
                                  f'that dataset.json does not know ({", ".join(map(str, known))}): correct the mask, '
                                  'or name its data set with -djfile.')
        array = values.astype(np.uint8 if max(known) < 256 else np.uint16)
        return Mask(file, array, tuple(map(float, properties['spacing'])), properties)

    def read_map(self, file: Path, like: Mask) -> np.ndarray:
        """A scalar image (z, y, x) float32; raises EvaluationError if it is unreadable or not of `like`'s geometry."""
        return self._read(file, like)[0]

    def _read(self, file: Path, like: Mask | None) -> tuple[np.ndarray, dict[str, Any]]:
        try:
            if wrong := damage(file):  # SimpleITK reads a part of a mask as the whole
                raise UnusableImage(f'{file} cannot be read: it {wrong}')
            if wrong := spacing_damage(self.reader, file, False):
                raise UnusableImage(f'{file.parent}: {wrong}')
            with as_unusable_image(str(file)):
                array, properties = self.reader.read_seg(str(file))
        except UnusableImage as error:
            raise EvaluationError(f'{error}.') from error
        if bad := non_finite(file) or int(np.count_nonzero(~np.isfinite(array))):  # SimpleITK reads them as 0
            raise EvaluationError(f'{file}: {bad} of {array.size} voxels are NaN or infinite: correct it.')
        if like is not None:
            _require_same_geometry(file, array[0], properties, like)
        return array[0], properties

    def read_probabilities(self, file: Path, like: Mask) -> Iterator[np.ndarray]:
        """Probabilities (z, y, x) float32 of each channel as --save_probabilities writes them.

        Raises:
            EvaluationError: if the file is not what that writes.
        """
        needed = (len(self.labels) if self.has_regions else 1 + max(self.known_values), *like.array.shape)
        try:
            with as_unusable_image(str(file), 'is not what --save_probabilities writes'):
                shape = stored_shape(file)
            if shape != needed:
                raise EvaluationError(f'{file} holds an array of shape {shape}, but dataset.json and {like.file} '
                                      f'need {needed}: predict the case again.')
            channels = stored_channels(file)
            for _ in range(shape[0]):
                with as_unusable_image(str(file), 'is not what --save_probabilities writes'):
                    channel = next(channels)
                if not (channel.min() >= 0 and channel.max() <= 1):  # so written, nan fails as well
                    raise EvaluationError(f'{file} has values outside of 0 to 1: predict the case again.')
                yield channel
        except UnusableImage as error:
            raise EvaluationError(f'{error}: predict the case again.') from error


def _require_same_geometry(file: Path, array: np.ndarray, properties: dict[str, Any], like: Mask) -> None:
    """Raise EvaluationError unless voxels of equal index lie at the same place, within a tenth of a voxel."""
    def geometry(shape: tuple[int, ...], properties: dict[str, Any]) -> dict[str, Any]:
        sitk, nibabel = properties.get('sitk_stuff', {}), properties.get('nibabel_stuff', {})
        affine = nibabel.get('reoriented_affine', nibabel.get('original_affine', np.zeros((4, 4))))
        return {'shape': shape, 'spacing': properties['spacing'], 'origin': sitk.get('origin', affine[:3, 3]),
                'direction': sitk.get('direction', affine[:3, :3])}

    tolerances = {'shape': 0.0, 'spacing': 1e-3, 'origin': 0.1 * min(like.spacing), 'direction': 1e-3}
    its = geometry(like.array.shape, like.properties)
    for name, value in geometry(array.shape, properties).items():
        if np.shape(value) != np.shape(its[name]) or not np.allclose(value, its[name], rtol=0, atol=tolerances[name]):
            raise EvaluationError(f'{file} and {like.file} differ in {name} ({np.round(value, 4).tolist()} and '
                                  f'{np.round(its[name], 4).tolist()}): bring both onto the grid of the same image.')


def open_folders(predictions: Path, references: Path, raters: Path | None = None, dataset_json: Path | None = None,
                 plans: Path | None = None, chill: bool = False) -> Folders:
    """Look into the folders; of images only the checksums are looked at.

    Args:
        predictions: output folder of nnUNetv2_predict or nnUNetv2_pdddpm_predict.
        references: folder of label maps of the same names; each needs a prediction unless `chill`.
        raters: folder of `<case>__<rater><ending>`.
        dataset_json: by default the one in `predictions`; `plans` likewise.
        plans: the model's plans.json.
        chill: compare the cases that have a prediction, as nnUNetv2_evaluate_folder does with --chill.

    Raises:
        EvaluationError: naming what is missing or cannot be used, with what to do.
    """
    for folder in filter(None, (predictions, references, raters)):
        if not folder.is_dir():
            raise EvaluationError(f'There is no folder {folder}.')
    dataset = _read_json(dataset_json or predictions / 'dataset.json', '-djfile')
    plans_content = _read_json(plans or predictions / 'plans.json', '-pfile')
    try:
        manager = PlansManager(plans_content).get_label_manager(dataset)
        ending = str(dataset['file_ending'])
        values = {name: value for name, value in dataset['labels'].items() if name not in ('background', 'ignore')}
        labels: dict[str, Label] = {name: tuple(map(int, value)) if manager.has_regions and isinstance(value, list)
                                    else int(np.ravel(value)[0]) for name, value in values.items()}
    except Exception as error:  # of whatever type: it lies in the files
        raise EvaluationError(f'dataset.json and plans.json do not fit together or are not those of a model '
                              f'({type(error).__name__}: {_in_one_line(error)}): name them with -djfile and -pfile.'
                              ) from error
    cases = _cases(predictions, references, ending, chill)
    entries, failed = _read_summary(predictions / SUMMARY)
    summary = {case: entries[case] for case in cases
               if case in entries and matches_identity(predictions, entries[case].get('mask'))}
    others = {case: f'is not the one that {SUMMARY} was made of' for case in cases if case not in summary}
    folders = Folders(predictions, references, raters, cases, ending, labels, manager.has_regions,
                      [int(v) for v in manager.all_labels], manager.ignore_label,
                      _reader(dataset, [references / f'{case}{ending}' for case in cases]), summary,
                      others if (predictions / SUMMARY).is_file() else {},
                      {case: failed[case] for case in cases if case in failed})
    if raters is not None and not any(folders.rater_files(case) for case in cases):
        raise EvaluationError(f'{raters} has no mask of any of the cases: name them CASE__RATER{ending}, such as '
                              f'{cases[0]}__1{ending}.')
    folders.left_out.extend(folders.not_compared())
    folders.doubtful.extend(folders.ambiguous())
    return folders


def _cases(predictions: Path, references: Path, ending: str, chill: bool) -> list[str]:
    cases = [file.name[:-len(ending)] for file in images_in(references, ending)]
    predicted = [case for case in cases if (predictions / f'{case}{ending}').is_file()]
    if not predicted:
        raise EvaluationError(f'{predictions} and {references} have no *{ending} files of the same name.')
    missing = sorted(set(cases) - set(predicted))
    if missing and not chill:
        raise EvaluationError(f'{predictions} lacks the prediction of {len(missing)} of {len(cases)} references '
                              f'({abbreviated(missing)}): predict them, or evaluate the others with --chill.')
    return predicted


def _reader(dataset: dict[str, Any], examples: list[Path]) -> BaseReaderWriter:
    """The first of nnU-Net's that can read one of the examples: some may be damaged."""
    with contextlib.redirect_stderr(io.StringIO()):  # tracebacks of the readers that do not suit
        for example in examples:
            with contextlib.suppress(RuntimeError):
                return determine_reader_writer_from_dataset_json(dataset, str(example), verbose=False)()
    raise EvaluationError(f"None of nnU-Net's readers can read {examples[0]}"
                          f'{", nor another of the references" if len(examples) > 1 else ""}.')


def _read_json(file: Path, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise EvaluationError(f'{file} cannot be read ({_in_one_line(error)}): name the one of the model with {flag}.'
                              ) from error
    except ValueError:
        raise EvaluationError(f'{file} is empty or damaged: name the one of the model with {flag}.') from None
    if not isinstance(content, dict):
        raise EvaluationError(f'{file} is not a {file.stem} of nnU-Net: name the one of the model with {flag}.')
    return content


def _read_summary(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Case -> its entry, and of cases that could not be predicted why not."""
    if not file.is_file():
        return {}, {}
    try:
        content = json.loads(file.read_text())
        return ({str(entry['case']): entry for entry in content['cases']},
                {str(entry['case']): str(entry['error']) for entry in content.get('failed', [])})
    except ValueError:
        raise EvaluationError(f'{file} is empty or damaged: predict again, or take it away.') from None
    except (OSError, KeyError, TypeError) as error:
        raise EvaluationError(f'{file} is not what nnUNetv2_pdddpm_predict writes ({type(error).__name__}: '
                              f'{_in_one_line(error)}): predict again, or take it away.') from error


def _in_one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())[:300]
