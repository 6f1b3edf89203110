"""One case on its way to its files: exported in the background, then moved to the output folder, the mask last."""
from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from nnunet_pdddpm.file_names import UNCERTAINTY
from nnunet_pdddpm.files import identity
from nnunet_pdddpm.geometry import grid_voxel_ml, image_voxel_ml
from nnunet_pdddpm.inference.export import CaseExport, as_numpy
from nnunet_pdddpm.inference.intervals import ByMask
from nnunet_pdddpm.inference.preprocess import end_with_parent
from nnunet_pdddpm.inference.ranking import FOLDS, Ranking
from nnunet_pdddpm.inference.summary import (
    CASES,
    FAILED,
    interval,
    mean_of_known,
    missing_intervals,
    sample_volumes,
    versions,
    write_row,
)
from nnunet_pdddpm.inference.volume import VolumePrediction
from nnunet_pdddpm.labels import label_channels

logger = logging.getLogger(__name__)

LOCK = '.lock'
"""Ending of the lock, a file beside the folder of a case: Windows deletes no folder that holds an open file."""
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})
"""Errors of file systems that have no locks, such as NFS without a lock daemon."""


class OutputInUse(ValueError):
    """Two processes predict the same case into the same folder: the message names both."""


class SerialExecutor(Executor):
    """Runs what is submitted at once (`-nps 0`)."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished future."""
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


class ExportQueue:
    """Background processes for export. Submitting waits while too many exports are under way: memory stays bounded."""

    def __init__(self, processes: int) -> None:
        """`processes`: number of background processes, 0 for none."""
        self.limit = processes + 2
        self.executor: Executor = ProcessPoolExecutor(
            processes, get_context('spawn'), end_with_parent) if processes else SerialExecutor()
        self.under_way: set[Future[Any]] = set()
        self.locks: list[FileLock] = []
        """Of cases that are not finished."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run in the background, once not more than `limit` others are under way."""
        self.under_way = {future for future in self.under_way if not future.done()}
        while len(self.under_way) >= self.limit:
            self.under_way = wait(self.under_way, return_when=FIRST_COMPLETED).not_done
        future = self.executor.submit(function, *args)
        self.under_way.add(future)
        return future

    def __enter__(self) -> ExportQueue:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.executor.shutdown(cancel_futures=True)
        for lock in self.locks:  # of a run that was cut off: this process may predict again
            unlock(lock)


def clear_leftover(folder: Path) -> None:
    """Delete folder and lock of a finished case that a killed run has left, unless another run is at work on it."""
    if not folder.is_dir() and not lock_of(folder).is_file():
        return
    with suppress(Timeout):
        lock = locked(folder)
        if folder.is_dir():
            shutil.rmtree(folder)
        unlock(lock)


def lock_of(folder: Path) -> Path:
    """The lock of a case's folder."""
    return folder.with_name(folder.name + LOCK)


def locked(folder: Path) -> FileLock:
    """Lock the folder of a case. The system lets go of the lock when a process ends, however that ends.

    A file system without locks gives one that is not held, and a warning.

    Raises:
        Timeout: if another process has it.
    """
    lock = FileLock(lock_of(folder))
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _warn_without_locks(folder.parent, str(error.strerror))
    return lock


@lru_cache
def _warn_without_locks(folder: Path, error: str) -> None:
    logger.warning('The file system of %s has no locks (%s): predict a case from one process at a time.', folder, error)


def unlock(lock: FileLock) -> None:
    """Release the lock and delete its file."""
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


class PendingCase:
    """One case whose files are being written."""

    def __init__(self, export: CaseExport, output: Path, num_samples: int, num_folds: int,
                 settings: list[dict[str, Any]], calibrated: Mapping[str, ByMask], ranking: Ranking, queue: ExportQueue,
                 image: list[dict[str, Any]] | None = None,
                 remarks: Sequence[str] = ()) -> None:
        """
        Args:
            export: writes into its folder, a new one is made.
            output: folder in which the files are put in the end.
            num_samples: number of samples that will be added.
            num_folds: sample number i comes from model i modulo this.
            settings: of the models, for the summary.
            calibrated: label -> what its intervals are made of, or why there are none.
            ranking: what cases are sorted by.
            queue: where exports run.
            image: `identity` of its files, for the summary; None if not known.
            remarks: what is odd about the image, for the summary.

        Raises:
            OutputInUse: if another process is at the same case.
        """
        self.export, self.output, self.queue, self.settings = export, output, queue, settings
        self.calibrated, self.ranking, self.image, self.remarks = calibrated, ranking, image, list(remarks)
        self.folds = [i % num_folds for i in range(num_samples)]
        self.samples: dict[int, Future[None]] = {}
        export.folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = locked(export.folder)
        except Timeout:
            raise OutputInUse(f'{export.case} is being predicted into {output} by another process: wait until that '
                              f'has ended, or name another output folder.') from None
        queue.locks.append(self.lock)
        if export.folder.exists():  # of an earlier run that was cut off
            shutil.rmtree(export.folder)
        export.folder.mkdir()

    def add_sample(self, number: int, logits: Tensor) -> None:
        """Export a sample, logits (C, Z, Y, X)."""
        if number in self.samples:  # drawn again, after the device ran out of memory
            self.samples[number].result()
        self.samples[number] = self.queue.submit(self.export.sample, as_numpy(logits), number)

    def add_prediction(self, prediction: VolumePrediction) -> None:
        """Export mask and maps, and keep the numbers that are counted in the network's grid."""
        spread = prediction.spread
        self.channels = label_channels(self.export.dataset_json, self.export.plans_manager)
        self.counts = prediction.counts
        self.grid_voxel_ml = grid_voxel_ml(self.export.properties, self.export.plans_manager.transpose_backward,
                                           prediction.logits.shape[1:])
        judged = self.ranking.judge(prediction.quality)
        estimated = {name: judged.labels.get(name, (prediction.quality.expected[channel], None))
                     for name, channel in self.channels.items()}
        folds = {name: {'folds_dice': quality.folds_dice} for name, quality in prediction.quality.items()
                 } if self.ranking.by == FOLDS else {}
        self.labels = {name: {'estimated_dice': estimated[name][0], 'estimated_dice_low': estimated[name][1],
                              'pairwise_dice': spread.pairwise_dice(channel), **folds.get(name, {}),
                              'uncertain_share': spread.uncertain_share([channel])}
                       for name, channel in self.channels.items()}
        self.flags = list(judged.flags)
        self.row = {'case': self.export.case, 'remarks': self.remarks,
                    'order': {'by': self.ranking.key, 'statement': self.ranking.describe()},
                    'estimated_dice': judged.estimate if judged.estimate is not None else mean_of_known(
                        [values['estimated_dice'] for values in self.labels.values()]),
                    'estimated_dice_low': judged.low,
                    **({'folds_dice': mean_of_known([fold['folds_dice'] for fold in folds.values()])} if folds else {}),
                    'uncertain_share': spread.uncertain_share(list(self.channels.values())),
                    'num_samples': len(self.folds), 'settings': self.settings,
                    'network_calls': prediction.network_calls, 'seconds': round(prediction.seconds, 3),
                    'versions': versions()}
        maps = {} if self.export.outputs.uncertainty == 'none' else spread.maps()
        if self.export.outputs.uncertainty == 'entropy':
            maps = {UNCERTAINTY: maps[UNCERTAINTY]}
        stock = prediction.presegmentation if self.export.outputs.presegmentation else None
        self.mask_export = self.queue.submit(self.export.write_prediction, as_numpy(prediction.logits),
                                             None if stock is None else as_numpy(stock),
                                             {name: as_numpy(values) for name, values in maps.items()})

    def done(self) -> bool:
        """Whether all exports are finished."""
        return self.mask_export.done() and all(future.done() for future in self.samples.values())

    def move_to_output(self) -> None:
        """Wait for the exports and move the files to where they belong."""
        for future in self.samples.values():
            future.result()
        labels = self._volumes(self.mask_export.result())
        folder, mask = self.export.folder, self.export.case + self.export.dataset_json['file_ending']
        flags = [*self.flags, *missing_intervals(labels)]
        write_row(folder / CASES, {**self.row, 'flags': flags, 'image': self.image, 'mask': identity(folder / mask),
                                   'labels': labels})
        for file in self.export.earlier_files(self.output):
            file.unlink()
        files = [file.relative_to(folder) for file in folder.rglob('*') if file.is_file()]
        for file in sorted(files, key=lambda file: file == Path(mask)):  # a mask in place says that the case is done
            (self.output / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / file, self.output / file)
        (self.output / FAILED / f'{self.export.case}.json').unlink(missing_ok=True)
        self.discard()

    def _volumes(self, counted: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """Label -> its part of the summary; `counted`: in the original image, see `CaseExport.write_prediction`."""
        ml = image_voxel_ml(self.export.properties, self.export.plans_manager.transpose_backward)
        mask_ml = np.array([counted[name]['voxels'] * ml for name in self.labels])
        sizes = self.counts.sample_sizes() * self.grid_voxel_ml
        masks = self.counts.mask_volumes(mask_ml, self.grid_voxel_ml)
        return {name: {'volume_ml': counted[name]['voxels'] * ml,
                       **interval(self.calibrated[name].select(masks[i]), masks[i]),
                       **sample_volumes(sizes[:, i], self.folds),
                       'volume_ml_stock': None if (stock := counted[name]['voxels_stock']) is None else stock * ml,
                       'components': counted[name]['components'], **values}
                for i, (name, values) in enumerate(self.labels.items())}

    def discard(self) -> None:
        """Delete what has not been moved."""
        wait([*self.samples.values(), *([self.mask_export] if hasattr(self, 'mask_export') else [])])
        shutil.rmtree(self.export.folder)
        self.queue.locks.remove(self.lock)
        unlock(self.lock)
