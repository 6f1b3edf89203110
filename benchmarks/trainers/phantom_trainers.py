"""Trainers of `phantom.py`, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

Three epochs of 700 iterations for the stock model, of 2,000 for the others. One thread and fixed seeds: trainings of a
fold that differ in one setting see the same patches in the same order, and each fold has a seed of its own.
"""
import torch
from benchmark_trainers import (
    LONGER,
    NoDiffusion,
    SeededEpochs,
    ShortCPUTraining,
    nnUNetTrainerBenchmark,
    nnUNetTrainerBenchmarkLonger,
)

from nnunet_pdddpm.training.trainer import PDDDPMTrainer


class Phantom(SeededEpochs):
    """Mixin: see the module's docstring."""

    epochs = 3 * LONGER
    iterations = 2000

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = self.iterations
        self.num_val_iterations_per_epoch = 1
        self.seed = fold
        if isinstance(self, PDDDPMTrainer):
            self.noise_seed += fold

    def initialize(self):
        torch.set_num_threads(1)
        self.logger.plot_progress_png = lambda output_folder: None  # would take a seventh of the time
        super().initialize()


class nnUNetTrainerPhantom(Phantom, nnUNetTrainerBenchmark):
    iterations = 700


class nnUNetTrainerPhantomLonger(Phantom, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model of the fold, trained on for as many iterations as the denoisers."""


class PDDDPMTrainerPhantom(Phantom, ShortCPUTraining, PDDDPMTrainer):
    """The default."""


class PDDDPMTrainerPhantomSecond(NoDiffusion, PDDDPMTrainerPhantom):
    """The second network without diffusion, trained with cross-entropy alone."""
