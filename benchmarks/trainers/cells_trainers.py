"""Trainers of `cells.py`, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

Six epochs of 250 iterations, stock and denoiser alike. One thread and fixed seeds: trainings that differ in one
setting see the same patches in the same order.
"""
import numpy as np
import torch
from benchmark_trainers import (
    PDDDPMTrainerBenchmark,
    nnUNetTrainerBenchmark,
    nnUNetTrainerBenchmarkLonger,
)


class SixSeededEpochs:
    """Mixin: see the module's docstring. Needs `nnUNet_n_proc_DA=0`: data workers have seeds of their own."""

    epochs = 6

    def initialize(self):
        torch.set_num_threads(1)
        torch.manual_seed(0)
        super().initialize()

    def on_epoch_start(self):
        np.random.seed(self.current_epoch)
        torch.manual_seed(self.current_epoch)
        super().on_epoch_start()


class nnUNetTrainerCells(SixSeededEpochs, nnUNetTrainerBenchmark):
    pass


class nnUNetTrainerCellsLonger(SixSeededEpochs, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model of the fold, trained on for as many iterations as the denoisers."""


class PDDDPMTrainerCells(SixSeededEpochs, PDDDPMTrainerBenchmark):
    """The default: noise on the truth, which is here a rater's mask; a quarter of the patches ask for the best mask."""


class PDDDPMTrainerCellsTruth(PDDDPMTrainerCells):
    """Noise on the truth in every patch."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.presegmentation_share = 0.0


class PDDDPMTrainerCellsDirect(PDDDPMTrainerCells):
    """No diffusion: the same second network always sees the pre-segmentation itself."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.presegmentation_share = 1.0
