"""Trainers of a few iterations for the tests, found through nnUNet_extTrainer."""
import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper


class FewIterations:
    """Mixin: two epochs of eight iterations, a checkpoint after each, and data drawn alike in every run."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = 8
        self.num_val_iterations_per_epoch = 2
        self.save_every = 1
        self.tuning_share = 0

    def initialize(self):
        torch.manual_seed(0)
        super().initialize()

    def on_epoch_start(self):
        np.random.seed(self.current_epoch + 1000 * self.local_rank)
        torch.manual_seed(self.current_epoch)
        super().on_epoch_start()


class Brief(FewIterations):
    """Mixin: one epoch of three iterations."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1
        self.num_iterations_per_epoch = 3


class nnUNetTrainerTiny(FewIterations, nnUNetTrainer):
    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = 30


class nnUNetTrainerUnmirrored(nnUNetTrainerTiny):
    """Without mirroring, an eighth of the time of prediction; with AdamW, which finds some foreground sooner."""

    def configure_optimizers(self):
        self.initial_lr = 3e-3
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        configured = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return *configured[:-1], None


class PDDDPMTrainerTiny(FewIterations, PDDDPMTrainer):
    pass


class PDDDPMTrainerMeasured(FewIterations, PDDDPMTrainer):
    """Sees 30 noisy patches an epoch, which is enough for a measured table of levels."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = 20
        self.blind_share = 0.25


class PDDDPMTrainerTinyPaper(FewIterations, PDDDPMTrainerPaper):
    pass


class PDDDPMTrainerTuned(Brief, PDDDPMTrainer):
    """Tunes its sampling settings, two samples each, with more time than it needs."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.tuning_share = 10_000
        self.sampling = SamplingSettings(samples=2)


class nnUNetTrainerBrief(Brief, nnUNetTrainer):
    pass


class PDDDPMTrainerBrief(Brief, PDDDPMTrainer):
    pass


class PDDDPMTrainerOnCPU(FewIterations, PDDDPMTrainer):
    """Stays on the CPU in a distributed training, where nnU-Net's own trainer takes the GPU of its rank."""
    device = property(lambda self: torch.device('cpu'), lambda self, device: None)
