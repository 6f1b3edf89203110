"""Short trainers for the benchmarks, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

The environment variables `benchmark_epochs` and `benchmark_iterations` (of an epoch) say how long they train. On a CPU
with instructions for bfloat16 all use autocast (nnU-Net trains in fp32 there), which halves the time of an iteration.
Validation is left out: the benchmarks measure on cases of their own.

A family has, under its name, stock nnU-Net, the control (the trained stock model, trained on for as many iterations as
the denoiser), the denoiser, a second network without diffusion, the published method, and a stochastic segmentation
network.
"""
import os

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from ssn import StochasticSegmentationTraining

from nnunet_pdddpm.cpu import cpu_has_bfloat16
from nnunet_pdddpm.training.presegmenters import TrainingContext
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper


class ShortTraining:
    """Mixin: see the module's docstring."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = int(os.environ.get('benchmark_epochs', 1))
        self.num_iterations_per_epoch = int(os.environ.get('benchmark_iterations', 250))
        self.num_val_iterations_per_epoch = 1
        self.save_every = 1  # an interrupted training goes on with the epoch that it was in
        self.tuning_share = 0  # the benchmarks name their settings
        self.logger.plot_progress_png = lambda output_folder: None  # would take a seventh of the time

    def train_step(self, batch: dict) -> dict:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.device.type == 'cpu' and cpu_has_bfloat16()):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.device.type == 'cpu' and cpu_has_bfloat16()):
            return super().validation_step(batch)

    def save_checkpoint(self, filename: str) -> None:
        if not filename.endswith('checkpoint_best.pth'):  # nothing uses it
            super().save_checkpoint(filename)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        pass


class OneThread:
    """Mixin: one thread, and the fold as the seed: trainings of a fold see the same patches in the same order.

    Needs `nnUNet_n_proc_DA=0`: data workers have seeds of their own.
    """

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        if isinstance(self, PDDDPMTrainer):
            self.noise_seed += fold

    def initialize(self):
        torch.set_num_threads(1)
        torch.manual_seed(1000 * self.fold)
        super().initialize()

    def on_epoch_start(self):
        np.random.seed(1000 * self.fold + self.current_epoch)
        torch.manual_seed(1000 * self.fold + self.current_epoch)
        super().on_epoch_start()


class FromStock:
    """Mixin: the trained stock model of the fold, trained on with a new learning rate schedule."""

    def initialize(self):
        super().initialize()
        context = TrainingContext(self.plans_manager.plans, self.configuration_name, self.dataset_json)
        self.network.load_state_dict(context.stock_checkpoint(self.fold)['network_weights'])


class NoDiffusion:
    """Mixin: a second network without diffusion, which never sees a mask, trained with cross-entropy alone."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.blind_share = 1.0

    def make_noisy_batch(self, image, target):
        batch = super().make_noisy_batch(image, target)
        self.denoising_loss.set_noisy(torch.ones(len(image), dtype=torch.bool))
        return batch

    def measure_levels(self, log_snr):
        pass


def add(name: str, *bases: type) -> None:
    """A trainer that nnU-Net finds by its name."""
    globals()[name] = type(name, bases, {'__module__': __name__})


for family, *mixins in (('Benchmark', ShortTraining), ('GPU', ShortTraining), ('Phantom', OneThread, ShortTraining),
                        ('Raters', OneThread, ShortTraining)):
    add(f'nnUNetTrainer{family}', *mixins, nnUNetTrainer)
    add(f'nnUNetTrainer{family}Longer', *mixins, FromStock, nnUNetTrainer)
    add(f'nnUNetTrainer{family}SSN', *mixins, StochasticSegmentationTraining, nnUNetTrainer)
    add(f'PDDDPMTrainer{family}', *mixins, PDDDPMTrainer)
    add(f'PDDDPMTrainer{family}Second', NoDiffusion, *mixins, PDDDPMTrainer)
    add(f'PDDDPMTrainer{family}Paper', *mixins, PDDDPMTrainerPaper)
