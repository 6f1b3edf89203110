"""Trainers of `cells.py`, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

Six epochs of 250 iterations, stock and denoiser alike (on a GPU 25 times as many). One thread and fixed seeds:
trainings that differ in one setting see the same patches in the same order.
"""
import torch
from benchmark_trainers import (
    LONGER,
    CrossEntropyAlone,
    NoDiffusion,
    NoiseOnTruth,
    PDDDPMTrainerBenchmark,
    SeededEpochs,
    nnUNetTrainerBenchmark,
    nnUNetTrainerBenchmarkLonger,
)


class SixSeededEpochs(SeededEpochs):
    """Mixin: see the module's docstring."""

    epochs = 6 * LONGER

    def initialize(self):
        torch.set_num_threads(1)
        super().initialize()


class nnUNetTrainerCells(SixSeededEpochs, nnUNetTrainerBenchmark):
    pass


class nnUNetTrainerCellsLonger(SixSeededEpochs, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model of the fold, trained on for as many iterations as the denoisers."""


class PDDDPMTrainerCells(SixSeededEpochs, PDDDPMTrainerBenchmark):
    """The default: noise on the truth, which is here a rater's mask; half of the patches ask for the best mask."""


class PDDDPMTrainerCellsTruth(NoiseOnTruth, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerCellsDirect(NoDiffusion, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerCellsDirectCE(CrossEntropyAlone, PDDDPMTrainerCellsDirect):
    pass
