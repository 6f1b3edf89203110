"""Trainers of `ambiguous.py` and `ablation.py`, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

Each fold has a seed of its own, so that three folds are three trainings. Within a fold, trainings that differ in one
setting see the same patches in the same order.
"""
from copy import deepcopy

import torch
from benchmark_trainers import (
    LONGER,
    CrossEntropyAlone,
    NoDiffusion,
    NoiseOnTruth,
    PaperCPUTraining,
    SeededEpochs,
    ShortCPUTraining,
    nnUNetTrainerBenchmark,
    nnUNetTrainerBenchmarkLonger,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_pdddpm.network.refiner import DiffusionDesign, Refiner
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper


class Ambiguous(SeededEpochs):
    """Mixin: see the module's docstring. Three epochs of `iterations` (on a GPU 25 times as many)."""

    epochs = 3 * LONGER
    iterations = 200

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


class nnUNetTrainerAmbiguous(Ambiguous, nnUNetTrainerBenchmark):
    pass


class nnUNetTrainerAmbiguousLonger(Ambiguous, nnUNetTrainerBenchmarkLonger):
    """The control: the trained stock model of the fold, trained on for as many iterations as the denoisers."""


class PDDDPMTrainerAmbiguous(Ambiguous, ShortCPUTraining, PDDDPMTrainer):
    """The default."""


class PDDDPMTrainerAmbiguousTruth(NoiseOnTruth, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousDirect(NoDiffusion, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousDirectCE(CrossEntropyAlone, PDDDPMTrainerAmbiguousDirect):
    pass


class PDDDPMTrainerAmbiguousPaper(Ambiguous, PaperCPUTraining, PDDDPMTrainerPaper):
    pass


# for ablation.py: a base with one thing changed


class PDDDPMTrainerAmbiguousBase(NoiseOnTruth, PDDDPMTrainerAmbiguous):
    """A quarter of the patches at level 0, the other levels uniform."""

    share = 0.25


class PDDDPMTrainerAmbiguousScratch(PDDDPMTrainerAmbiguousBase):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.warm_start = False


class PDDDPMTrainerAmbiguousConditioned(PDDDPMTrainerAmbiguousBase):
    design = DiffusionDesign(condition_on_presegmentation=True)


class PDDDPMTrainerAmbiguousInFold(PDDDPMTrainerAmbiguousBase):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.out_of_fold = False


class PDDDPMTrainerAmbiguousNoAverage(PDDDPMTrainerAmbiguousBase):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.averaging_decay = 0.0


class PDDDPMTrainerAmbiguousSGD(PDDDPMTrainerAmbiguousBase):
    """nnU-Net's optimiser, with its learning rate and weight decay."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr, self.weight_decay = 1e-2, 3e-5

    def configure_optimizers(self):
        return nnUNetTrainer.configure_optimizers(self)


class PDDDPMTrainerAmbiguousTenth(PDDDPMTrainerAmbiguousBase):
    share = 0.1


class PDDDPMTrainerAmbiguousHalf(PDDDPMTrainerAmbiguousBase):
    share = 0.5


class PDDDPMTrainerAmbiguousHigh(PDDDPMTrainerAmbiguousBase):
    power = 2


class PDDDPMTrainerAmbiguousHighNone(PDDDPMTrainerAmbiguousHigh):
    share = 0.0


class PDDDPMTrainerAmbiguousHigher(NoiseOnTruth, PDDDPMTrainerAmbiguous):
    """The default, with a density of levels that grows as their eighth power."""

    share, power = 0.5, 8


class PDDDPMTrainerAmbiguousNarrow(PDDDPMTrainerAmbiguousScratch):
    """A denoiser with half of the features, which no stock weights fit."""

    width = 0.5

    @classmethod
    def build_network_architecture(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        other = ConfigurationManager(deepcopy(configuration_manager.configuration))
        network = other.configuration['architecture']['arch_kwargs']
        network['features_per_stage'] = [int(cls.width * features) for features in network['features_per_stage']]
        stock, unet = (nnUNetTrainer.build_network_architecture(plans_manager, configuration, num_input_channels,
                                                                num_output_channels, deep_supervision)
                       for configuration, deep_supervision in ((configuration_manager, False),
                                                               (other, enable_deep_supervision)))
        return Refiner(stock, unet, num_output_channels, cls.design)


class PDDDPMTrainerAmbiguousWide(PDDDPMTrainerAmbiguousNarrow):
    width = 2
