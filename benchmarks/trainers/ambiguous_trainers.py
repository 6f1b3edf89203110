"""Trainers of `ambiguous.py` and `ablation.py`, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

Each fold has a seed of its own, so that three folds are three trainings. Within a fold, trainings that differ in one
setting see the same patches in the same order.
"""
import torch
from benchmark_trainers import (
    HighLevels,
    NoDiffusion,
    NoiseOnTruth,
    PaperCPUTraining,
    SeededEpochs,
    ShortCPUTraining,
    nnUNetTrainerBenchmark,
    nnUNetTrainerBenchmarkLonger,
)
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.network.refiner import DiffusionDesign
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper


class Ambiguous(SeededEpochs):
    """Mixin: see the module's docstring. Three epochs of `iterations`."""

    epochs = 3
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


class PDDDPMTrainerAmbiguousPaper(Ambiguous, PaperCPUTraining, PDDDPMTrainerPaper):
    pass


# for ablation.py: the default with one thing changed


class PDDDPMTrainerAmbiguousScratch(PDDDPMTrainerAmbiguous):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.warm_start = False


class PDDDPMTrainerAmbiguousConditioned(PDDDPMTrainerAmbiguous):
    design = DiffusionDesign(condition_on_presegmentation=True)


class PDDDPMTrainerAmbiguousInFold(PDDDPMTrainerAmbiguous):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.out_of_fold = False


class PDDDPMTrainerAmbiguousNoAverage(PDDDPMTrainerAmbiguous):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.averaging_decay = 0.0


class PDDDPMTrainerAmbiguousSGD(PDDDPMTrainerAmbiguous):
    """nnU-Net's optimiser, with its learning rate and weight decay."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr, self.weight_decay = 1e-2, 3e-5

    def configure_optimizers(self):
        return nnUNetTrainer.configure_optimizers(self)


class PDDDPMTrainerAmbiguousTenth(NoiseOnTruth, PDDDPMTrainerAmbiguous):
    share = 0.1


class PDDDPMTrainerAmbiguousHalf(NoiseOnTruth, PDDDPMTrainerAmbiguous):
    share = 0.5


class PDDDPMTrainerAmbiguousHigh(HighLevels, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousHighHalf(HighLevels, PDDDPMTrainerAmbiguousHalf):
    pass
