"""Variants of PDDDPMTrainer: lengths as nnU-Net has them for its own trainer, and the paper's settings."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunet_pdddpm.diffusion.coding import MaskCoding
from nnunet_pdddpm.network.refiner import DiffusionDesign
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.training.trainer import PDDDPMTrainer

__all__ = ['PDDDPMTrainer_1epoch', 'PDDDPMTrainer_5epochs', 'PDDDPMTrainer_10epochs', 'PDDDPMTrainer_20epochs',
           'PDDDPMTrainer_50epochs', 'PDDDPMTrainer_100epochs', 'PDDDPMTrainer_250epochs', 'PDDDPMTrainer_500epochs',
           'PDDDPMTrainerPaper']


class PDDDPMTrainer_1epoch(PDDDPMTrainer):
    epochs = 1


class PDDDPMTrainer_5epochs(PDDDPMTrainer):
    epochs = 5


class PDDDPMTrainer_10epochs(PDDDPMTrainer):
    epochs = 10


class PDDDPMTrainer_20epochs(PDDDPMTrainer):
    epochs = 20


class PDDDPMTrainer_50epochs(PDDDPMTrainer):
    epochs = 50


class PDDDPMTrainer_100epochs(PDDDPMTrainer):
    epochs = 100


class PDDDPMTrainer_250epochs(PDDDPMTrainer):
    epochs = 250


class PDDDPMTrainer_500epochs(PDDDPMTrainer):
    epochs = 500


class PDDDPMTrainerPaper(PDDDPMTrainer):
    """As the paper (Guo et al., arXiv 2210.17408): the noise is predicted with MSE, masks are 0/1, the noise is added
    to the truth, T' = 300 with every step taken, five samples. A prediction makes 1,500 denoiser calls a tile and
    mirroring."""

    design = DiffusionDesign(coding=MaskCoding(0.0, 1.0), parameterisation='eps', paper_levels=300)

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.blind_share = 0.0
        self.sampling = SamplingSettings(start=1.0, steps=300, samples=5, start_mask='hard', redraw=0, mask_blind=0.0,
                                         mask_samples=5)
        self.tuning_share = 0.0  # the settings are the paper's
        self.warm_start = False  # the stock weights give logits, not noise
        self.enable_deep_supervision = False  # nothing in the paper; noise has no coarser version
        # validation during training takes a sample per patch: 50 patches an epoch would cost more than the training
        self.num_val_iterations_per_epoch = 1

    def draw_levels(self, number: int) -> Tensor:
        """(number,) log SNRs of the levels t = 1..300, uniform in t."""
        nodes = torch.tensor(self.refiner.table.log_snr[:-1])
        return nodes[torch.randint(len(nodes), (number,), generator=self.level_generator)]

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_ignore_label:
            raise NotImplementedError(f'{type(self).__name__} predicts the noise everywhere and cannot leave '
                                      f'out voxels with the ignore label. Use PDDDPMTrainer for this data set.')
        return super()._build_loss()
