"""Trainers of `gpu.py`, which says how long they train."""
from benchmark_trainers import NoDiffusion, ShortCPUTraining, nnUNetTrainerBenchmarkLonger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.training.trainer import PDDDPMTrainer


class Hurried(ShortCPUTraining):
    """Mixin: no curves and no best checkpoint, which are not used and take seconds."""

    def on_train_start(self) -> None:
        self.num_val_iterations_per_epoch = 1
        self.logger.plot_progress_png = lambda output_folder: None
        super().on_train_start()

    def save_checkpoint(self, filename: str) -> None:
        if not filename.endswith('checkpoint_best.pth'):
            super().save_checkpoint(filename)


class nnUNetTrainerGPU(Hurried, nnUNetTrainer):
    pass


class nnUNetTrainerGPULonger(Hurried, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model, trained on for as many iterations as the others."""


class PDDDPMTrainerGPU(Hurried, PDDDPMTrainer):
    """The default."""


class PDDDPMTrainerGPUSecond(NoDiffusion, PDDDPMTrainerGPU):
    """The second network without diffusion, trained with cross-entropy alone."""
