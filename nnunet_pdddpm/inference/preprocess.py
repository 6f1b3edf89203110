"""Cases read and preprocessed one by one: what is wrong with one of them stops none of the others."""
from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_pdddpm.files import image_identity
from nnunet_pdddpm.image_files import UnusableImage, as_unusable_image, damage, spacing_damage
from nnunet_pdddpm.inference.remarks import geometry_remarks, intensity_remarks

EXAMPLES = 5
"""Cases that are read to find out whether a file holds several channels."""


@dataclass(frozen=True)
class FailedCase:
    """A case that could not be preprocessed."""
    output: str | None
    """Path of its mask without the ending, if it was to be a file."""
    reason: str


@dataclass(frozen=True)
class CasePreprocessor:
    """Reads and preprocesses a case as nnU-Net does, and refuses damaged images that nnU-Net would accept."""
    plans_manager: PlansManager
    configuration_manager: ConfigurationManager
    dataset_json: dict[str, Any]
    verbose: bool

    def __call__(self, files: Sequence[str], previous: str | None, output: str | None) -> dict[str, Any] | FailedCase:
        """The item that nnU-Net's predictor takes, with a numpy array as `data`; or why there is none.

        Beside what nnU-Net's items have, it has `remarks`: what is odd about the image, a sentence each; and `image`,
        the `image_identity` of its files.

        Args:
            files: the image's channels.
            previous: mask of the previous stage of a cascade.
            output: path of the mask without the ending.
        """
        try:
            return self.preprocess(files, previous, output)
        except UnusableImage as error:
            return FailedCase(output, str(error))
        except MemoryError:
            return FailedCase(output, f'{Path(files[0]).name}: not enough memory to preprocess it')

    def preprocess(self, files: Sequence[str], previous: str | None, output: str | None) -> dict[str, Any]:
        """As `__call__`; raises UnusableImage."""
        reader = self.plans_manager.image_reader_writer_class()
        names = [Path(file).name for file in files]
        for file in [*files, *([previous] if previous else [])]:
            if wrong := damage(Path(file)):
                raise UnusableImage(f'{Path(file).name} {wrong}')
        if wrong := spacing_damage(reader, Path(files[0]), True) or (
                spacing_damage(reader, Path(previous), False) if previous else ''):
            raise UnusableImage(wrong)
        image, properties = read_channels(reader, files)
        require_channels(len(image), num_channels(self.dataset_json), names)
        require_image(image, properties, names)
        self.require_thickness(image.shape[1:], properties['spacing'], names)
        mask = None
        if previous:
            with as_unusable_image(Path(previous).name):
                mask = reader.read_seg(previous)[0]
            known = [0, *self.plans_manager.get_label_manager(self.dataset_json).all_labels]
            if (unknown := mask[~np.isin(mask, known)]).size:  # nnU-Net takes them for background
                raise UnusableImage(f'{Path(previous).name} of the previous stage has label values such as '
                                    f'{np.format_float_positional(unknown[0], trim="-")} that the model does not know '
                                    f'({", ".join(map(str, sorted(set(known))))})')
        try:
            with as_unusable_image(', '.join(names), 'cannot be preprocessed'):
                data, mask, properties = self.run_nnunet(image, mask, properties)
        except UnusableImage:
            self.run_nnunet(*self.sound_case(len(image), previous is not None))  # raises if the program is at fault
            raise
        remarks = geometry_remarks(reader, files, properties)
        try:
            remarks += self.intensity_remarks(data)
        except UnusableImage as error:
            raise UnusableImage(f'{", ".join(names)}: {error}') from None
        if previous and mask is not None:
            labels = self.plans_manager.get_label_manager(self.dataset_json).foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(mask[0], labels, data.dtype)))
        return {'data': np.ascontiguousarray(data, np.float32), 'data_properties': properties, 'ofile': output,
                'remarks': remarks, 'image': image_identity(files, previous)}

    def run_nnunet(self, image: np.ndarray, mask: np.ndarray | None, properties: dict[str, Any]) -> tuple[Any, ...]:
        """Image (channels, Z, Y, X), mask and properties as nnU-Net's preprocessor makes them of those that were read.
        """
        preprocessor = self.configuration_manager.preprocessor_class(verbose=self.verbose)
        return preprocessor.run_case_npy(image, mask, properties, self.plans_manager, self.configuration_manager,
                                         self.dataset_json)

    def sound_case(self, channels: int, with_mask: bool) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
        """A sound image, as read: an error that it raises as well is not the fault of a case's image."""
        order = self.plans_manager.transpose_forward
        along = {axis: (n, step) for axis, n, step in zip(  # 2d: of slices
            order[::-1], self.configuration_manager.patch_size[::-1], self.configuration_manager.spacing[::-1],
            strict=False)}
        shape, spacing = zip(*(along.get(axis, (1, 1.0)) for axis in range(3)), strict=True)
        image = np.random.default_rng(0).uniform(1, 255, (channels, *shape)).astype(np.float32)
        # other voxels than the model's, which have to be resampled
        return image, np.zeros((1, *shape), np.float32) if with_mask else None, {'spacing': [1.25 * n for n in spacing]}

    def intensity_remarks(self, data: np.ndarray) -> list[str]:
        """Remarks on the normalised image (channels, Z, Y, X), see the function of that name."""
        channels = self.dataset_json.get('channel_names') or self.dataset_json['modality']
        return intensity_remarks(data, self.configuration_manager.normalization_schemes,
                                 self.plans_manager.foreground_intensity_properties_per_channel,
                                 list(channels.values()))

    def require_thickness(self, shape: Sequence[int], spacing: Sequence[float], names: Sequence[str]) -> None:
        """Refuse an image that would have no slice left at the model's voxel size; axes as read."""
        order = self.plans_manager.transpose_forward
        model_spacing = self.configuration_manager.spacing[::-1]
        for axis, voxel in zip(order[::-1], model_spacing, strict=False):  # 2d: slices
            thickness = shape[axis] * spacing[axis]
            if round(thickness / voxel) < 1:
                raise UnusableImage(f'{", ".join(names)}: the image is {thickness:g} mm thick along an axis, which is '
                                    f'thinner than half a voxel of the model ({voxel:g} mm)')


def read_channels(reader: Any, files: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """An image (channels, Z, Y, X) with its properties, as nnU-Net's reader gives them.

    Raises:
        UnusableImage: names the channel that cannot be read, or how the channels differ.
    """
    names = ', '.join(Path(file).name for file in files)
    try:
        with as_unusable_image(names):
            image, properties = reader.read_images(files)
            dimensions = len(properties.get('sitk_stuff', {}).get('spacing', ()))
        if dimensions > 3:
            raise UnusableImage(f'{names} has {dimensions} dimensions, which no mask is written with: save every '
                                f'volume in it as a file of its own')
        return image, properties
    except UnusableImage:
        if len(files) == 1:
            raise
        seen = {}
        for file in files:  # is it one of the channels, or do they not fit together?
            with as_unusable_image(Path(file).name):
                image, properties = reader.read_images((file,))
                seen[file] = {'shape': list(image.shape[1:]), 'voxel size': [float(n) for n in properties['spacing']]}
        for key in ('shape', 'voxel size'):
            values = [f'{Path(file).name} has {what[key]}' for file, what in seen.items()]
            if len({str(what[key]) for what in seen.values()}) > 1:
                raise UnusableImage(f'the channels differ in {key} (z, y, x): {", ".join(values)}') from None
        raise


def num_channels(dataset_json: Mapping[str, Any]) -> int:
    """Channels of an image that a model takes."""
    return len(dataset_json.get('channel_names') or dataset_json['modality'])


def require_channels(found: int, needed: int, names: Sequence[str]) -> None:
    """Refuse an image with another number of channels than the model's: files may hold several, as pictures do."""
    if found != needed:
        kind = {1: 'grey', 3: 'colour', 4: 'colour and transparency'}.get(found, '') if len(names) == 1 else ''
        raise UnusableImage(f'{", ".join(names)}: {found} channels{f" ({kind})" if kind else ""}, the model needs '
                            f'{needed}')


def files_per_case(cases: Iterable[Sequence[str]], needed: int, reader: Any) -> set[int]:
    """How many files a case may have: one for each channel, or fewer that may hold several, as colour pictures do.

    Where some are left that were not read, or cannot be, what they hold shows when they are predicted.

    Args:
        cases: the files of each; of those with fewer files than channels some are read.
        needed: channels of the model.
        reader: nnU-Net's.
    """
    found, unclear = {needed}, [files for files in cases if len(files) < needed]
    for number in {len(files) for files in unclear}:
        alike = [files for files in unclear if len(files) == number]
        read: list[int] = []
        for files in alike[:EXAMPLES]:
            with suppress(UnusableImage):
                read.append(len(read_channels(reader, files)[0]))
            if needed in read:
                break
        if needed in read or len(read) < len(alike):
            found.add(number)
    return found


def require_image(image: np.ndarray, properties: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse an image whose mask would mean nothing.

    Args:
        image: (channels, Z, Y, X).
        properties: from nnU-Net's reader.
        names: of the channels' files, one of them if all channels are in one.

    Raises:
        UnusableImage: there are no voxels, NaN or infinite ones, all are alike, or their size is not positive.
    """
    what = ', '.join(names)
    if image.size == 0:
        raise UnusableImage(f'{what}: the image has no voxels')
    bad = int(np.count_nonzero(~np.isfinite(image)))
    if bad:
        raise UnusableImage(f'{what}: {bad} of {image.size} voxels are NaN or infinite')
    if all(channel.min() == channel.max() for channel in image):
        raise UnusableImage(f'{what}: all voxels have the value {image.flat[0]:g}, there is nothing to segment')
    with as_unusable_image(what):
        spacing = [float(value) for value in properties['spacing']]
    if not all(np.isfinite(value) and value > 0 for value in spacing):
        raise UnusableImage(f'{what}: the voxel size is {" x ".join(f"{value:g}" for value in spacing)}')


def end_with_parent() -> None:
    """End this background process when the one that started it was killed: it would wait for work for ever."""
    def wait_and_end() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)
    threading.Thread(target=wait_and_end, daemon=True).start()


def preprocessed(preprocess: CasePreprocessor, cases: Sequence[tuple[Any, ...]], processes: int
                 ) -> Iterator[dict[str, Any] | FailedCase]:
    """Preprocess cases ahead in background processes and yield them in order; with 0 processes, one by one in this one.

    Args:
        preprocess: of one case.
        cases: its arguments.
        processes: their number; as many cases, and one more, are kept in memory.

    Raises:
        BrokenProcessPool: if a background process was killed.
    """
    if processes == 0:
        for case in cases:
            yield with_tensor(preprocess(*case))
        return
    pool = ProcessPoolExecutor(min(processes, len(cases)), get_context('spawn'), end_with_parent)
    try:
        under_way: deque[Future[dict[str, Any] | FailedCase]] = deque()
        for case in cases:
            under_way.append(pool.submit(preprocess, *case))
            if len(under_way) > processes:
                yield with_tensor(under_way.popleft().result())
        while under_way:
            yield with_tensor(under_way.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


def with_tensor(item: dict[str, Any] | FailedCase) -> dict[str, Any] | FailedCase:
    """The item with its image as a tensor."""
    return item if isinstance(item, FailedCase) else {**item, 'data': torch.from_numpy(item['data'])}
