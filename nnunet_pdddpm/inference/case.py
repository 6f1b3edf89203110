"""One case on its way to its files: exported in the background, put in place when all of it is there, the mask last."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from nnunet_pdddpm.inference.export import CaseExport, as_numpy, label_channels
from nnunet_pdddpm.inference.preprocess import end_with_parent
from nnunet_pdddpm.inference.summary import CASES, FAILED, mean_of_known, versions, volumes, write_case
from nnunet_pdddpm.inference.volume import VolumePrediction

LOCK = '.lock'


class OutputInUse(ValueError):
    """Two processes predict the same case into the same folder: the message names both."""


class InThisProcess(Executor):
    """Runs what is submitted at once (`-nps 0`)."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The finished future."""
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future


class ExportQueue:
    """Background processes for export. Whoever submits faster than they work has to wait: memory stays bounded."""

    def __init__(self, processes: int) -> None:
        """`processes`: number of background processes, 0 for none."""
        self.limit = processes + 2
        self.executor: Executor = ProcessPoolExecutor(
            processes, get_context('spawn'), end_with_parent) if processes else InThisProcess()
        self.under_way: set[Future[Any]] = set()

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


def clear_leftover(folder: Path) -> None:
    """Take away the folder of a finished case that a run killed at the very end has left, unless one is at work."""
    if not folder.is_dir():
        return
    lock = FileLock(folder / LOCK)
    with suppress(Timeout):
        lock.acquire(timeout=0)
        shutil.rmtree(folder)
        lock.release()


class CaseUnderWay:
    """The exports of one case."""

    def __init__(self, export: CaseExport, output: Path, num_samples: int, num_folds: int,
                 settings: list[dict[str, Any]], interval_sd: Sequence[float | None], queue: ExportQueue) -> None:
        """
        Args:
            export: writes into its folder, a new one is made.
            output: folder in which the files are put in the end.
            num_samples: number of samples that will be added.
            num_folds: sample number i comes from model i modulo this.
            settings: of the models, for the summary.
            interval_sd: of the volumes of each channel, see `summary.volumes`.
            queue: where exports run.

        Raises:
            OutputInUse: if another process is at the same case.
        """
        self.export, self.output, self.queue, self.settings = export, output, queue, settings
        self.interval_sd = interval_sd
        self.folds = [i % num_folds for i in range(num_samples)]
        self.samples: dict[int, Future[dict[str, int]]] = {}
        export.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(export.folder / LOCK)
        try:
            self.lock.acquire(timeout=0)  # the system lets go of it when a process ends, however that ends
        except Timeout:
            raise OutputInUse(f'{export.case} is being predicted into {output} by another process: wait until that '
                              f'has ended, or name another output folder.') from None
        for left in export.folder.iterdir():  # of an earlier run that was cut off
            if left.is_dir():
                shutil.rmtree(left)
            elif left.name != LOCK:
                left.unlink()

    def add_sample(self, number: int, logits: Tensor) -> None:
        """Export a sample, logits (C, Z, Y, X)."""
        if number in self.samples:  # drawn again, after the device ran out of memory
            self.samples[number].result()
        self.samples[number] = self.queue.submit(self.export.sample, as_numpy(logits), number)

    def add_rest(self, prediction: VolumePrediction) -> None:
        """Export the rest, and note what the network's grid is enough for."""
        spread = prediction.spread
        self.channels = label_channels(self.export.dataset_json, self.export.plans_manager)
        self.pairwise = {name: spread.pairwise_dice(channel) for name, channel in self.channels.items()}
        self.unsure = {name: spread.unsure_share([channel]) for name, channel in self.channels.items()}
        estimated = spread.estimated_dice(prediction.logits)
        self.estimated = {name: estimated[channel] for name, channel in self.channels.items()}
        self.row = {'case': self.export.case, 'estimated_dice': mean_of_known(list(self.estimated.values())),
                    'uncertain_share': spread.unsure_share(list(self.channels.values())),
                    'num_samples': len(self.folds), 'settings': self.settings,
                    'network_calls': prediction.network_calls,
                    'refined_tiles': round(prediction.refined_tiles, 4), 'seconds': round(prediction.seconds, 3),
                    'versions': versions()}
        maps = {} if self.export.outputs.uncertainty == 'none' else spread.maps()
        self.rest = self.queue.submit(self.export.rest, as_numpy(prediction.logits),
                                      as_numpy(prediction.presegmentation),
                                      {name: as_numpy(values) for name, values in maps.items()})

    def done(self) -> bool:
        """Whether all exports are finished."""
        return self.rest.done() and all(future.done() for future in self.samples.values())

    def put_in_place(self) -> None:
        """Wait for the exports and move the files to where they belong."""
        ml, labels = self.export.voxel_volume_ml(), {}
        sizes = [self.samples[number].result() for number in range(len(self.folds))]
        for name, counts in self.rest.result().items():
            interval_sd = self.interval_sd[self.channels[name]]
            labels[name] = {'volume_ml': counts['voxels'] * ml,
                            **volumes([s[name] for s in sizes], self.folds, ml, interval_sd),
                            'interval_sd': interval_sd,
                            'volume_ml_stock': counts['voxels_stock'] * ml, 'components': counts['components'],
                            'estimated_dice': self.estimated[name], 'pairwise_dice': self.pairwise[name],
                            'uncertain_share': self.unsure[name]}
        folder, mask = self.export.folder, self.export.case + self.export.dataset_json['file_ending']
        write_case(folder / CASES, {**self.row, 'labels': labels})
        for file in self.export.earlier_files(self.output):
            file.unlink()
        files = [file.relative_to(folder) for file in folder.rglob('*') if file.is_file() and file.name != LOCK]
        for file in sorted(files, key=lambda file: file == Path(mask)):  # a mask in place says that the case is done
            (self.output / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(folder / file, self.output / file)
        (self.output / FAILED / f'{self.export.case}.json').unlink(missing_ok=True)
        self.discard()

    def discard(self) -> None:
        """Take away what is not in place."""
        wait([*self.samples.values(), *([self.rest] if hasattr(self, 'rest') else [])])
        shutil.rmtree(self.export.folder)
        self.lock.release()
