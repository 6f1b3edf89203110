"""Trainers of a few iterations, for integration.py, compatibility.py and faults.py."""
import torch
from benchmark_trainers import SeededEpochs
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.trainer import PDDDPMTrainer


class FewIterations:
    """Mixin: two epochs of `iterations`, in fp32."""

    iterations = 40

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 2
        self.num_iterations_per_epoch = self.iterations
        self.num_val_iterations_per_epoch = 2
        self.tuning_share = 0


class nnUNetTrainerHandful(FewIterations, nnUNetTrainer):
    """With AdamW: after so few iterations nnU-Net's SGD would still give empty masks."""

    def configure_optimizers(self):
        self.initial_lr = 3e-3
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)


class PDDDPMTrainerHandful(FewIterations, PDDDPMTrainer):
    iterations = 8


class nnUNetTrainerIntegration(nnUNetTrainerHandful):
    """Without mirroring, an eighth of the time of prediction; PDDDPM does as its stock model."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        configured = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return *configured[:-1], None


class PDDDPMTrainerIntegration(PDDDPMTrainerHandful):
    pass


class nnUNetTrainerGlimpse(nnUNetTrainerIntegration):
    iterations = 8


class PDDDPMTrainerGlimpse(PDDDPMTrainerHandful):
    iterations = 4


class nnUNetTrainerToken(nnUNetTrainerHandful):
    iterations = 50


class PDDDPMTrainerToken(FewIterations, PDDDPMTrainer):
    iterations = 25


class RepeatableEpochs(SeededEpochs, FewIterations):
    """Mixin: a checkpoint after each of four short epochs, and data drawn alike whether interrupted or not."""

    iterations = 6

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 4
        self.save_every = 1


class PDDDPMTrainerFaults(RepeatableEpochs, PDDDPMTrainer):
    """For faults.py, with few samples to tune."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.sampling = SamplingSettings(samples=2)
