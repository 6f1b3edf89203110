"""Short CPU trainers for the benchmarks, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

They differ from their parents in two things only: ten epochs of 250 iterations, and bf16 autocast on the CPU
(nnU-Net trains in fp32 there), which halves the time of an iteration. Stock and PDDDPM are treated alike.
"""
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class ShortCPUTraining:
    """Mixin: see the module's docstring."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 10

    def train_step(self, batch: dict) -> dict:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.device.type == 'cpu'):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.device.type == 'cpu'):
            return super().validation_step(batch)


class nnUNetTrainerBenchmark(ShortCPUTraining, nnUNetTrainer):
    pass
