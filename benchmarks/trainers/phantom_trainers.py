"""Trainers of `phantom.py`, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

Three epochs of 700 iterations for the stock model, of 2,000 for the others. One thread and fixed seeds: trainings of a
fold that differ in one setting see the same patches in the same order, and each fold has a seed of its own.
"""
from benchmark_trainers import (
    LONGER,
    NoDiffusion,
    OneThread,
    ShortCPUTraining,
    nnUNetTrainerBenchmark,
    nnUNetTrainerBenchmarkLonger,
)

from nnunet_pdddpm.training.trainer import PDDDPMTrainer


class Phantom(OneThread):
    """Mixin: see the module's docstring."""

    epochs = 3 * LONGER
    iterations = 2000


class nnUNetTrainerPhantom(Phantom, nnUNetTrainerBenchmark):
    iterations = 700


class nnUNetTrainerPhantomLonger(Phantom, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model of the fold, trained on for as many iterations as the denoisers."""


class PDDDPMTrainerPhantom(Phantom, ShortCPUTraining, PDDDPMTrainer):
    """The default."""


class PDDDPMTrainerPhantomSecond(NoDiffusion, PDDDPMTrainerPhantom):
    """The second network without diffusion, trained with cross-entropy alone."""
