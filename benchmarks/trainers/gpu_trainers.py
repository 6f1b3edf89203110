"""Trainers of `gpu.py`: it says how long they train, and they stop between two epochs when their time is over."""
import math
import time

from benchmark_trainers import NoDiffusion, ShortCPUTraining, nnUNetTrainerBenchmarkLonger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.training.trainer import PDDDPMTrainer


class OutOfTime(Exception):
    """Training stopped early, after an epoch: `checkpoint_latest.pth` goes on from there."""


class UntilDeadline(ShortCPUTraining):
    """Mixin: see the module's docstring. No curves and no best checkpoint, which are not used and take seconds."""

    deadline = math.inf
    """Of `time.monotonic()`."""

    def on_train_start(self) -> None:
        self.num_val_iterations_per_epoch = 1
        self.logger.plot_progress_png = lambda output_folder: None
        super().on_train_start()

    def save_checkpoint(self, filename: str) -> None:
        if not filename.endswith('checkpoint_best.pth'):
            super().save_checkpoint(filename)

    def on_epoch_end(self) -> None:
        stop = time.monotonic() > self.deadline and self.current_epoch + 1 < self.num_epochs
        self.save_every = 1 if stop else self.num_epochs
        super().on_epoch_end()
        if stop:
            raise OutOfTime(f'{type(self).__name__} stopped after epoch {self.current_epoch} of {self.num_epochs}.')


class nnUNetTrainerGPU(UntilDeadline, nnUNetTrainer):
    pass


class nnUNetTrainerGPULonger(UntilDeadline, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model, trained on for as many iterations as the others."""


class PDDDPMTrainerGPU(UntilDeadline, PDDDPMTrainer):
    """The default."""


class PDDDPMTrainerGPUSecond(NoDiffusion, PDDDPMTrainerGPU):
    """The second network without diffusion, trained with cross-entropy alone."""
