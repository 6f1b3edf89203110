"""Short trainers for the benchmarks, found by nnU-Net through `nnUNet_extTrainer=benchmarks/trainers`.

On a CPU with instructions for bfloat16 all use autocast (nnU-Net trains in fp32 there), which halves the time of an
iteration. 250 iterations an epoch, as nnU-Net has them: ten epochs of stock training; four of refinement; and, as the
control, the stock model trained for those four epochs more. On a GPU (BENCHMARK_DEVICE=cuda) there are 25 times as many
epochs. Validation is left out, since the benchmark measures on its own cases.
"""
import os
from dataclasses import replace

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_pdddpm.cpu import cpu_has_bfloat16
from nnunet_pdddpm.training.presegmenters import TrainingContext
from nnunet_pdddpm.training.trainer import PDDDPMTrainer
from nnunet_pdddpm.training.variants import PDDDPMTrainerPaper

LONGER = 25 if os.environ.get('BENCHMARK_DEVICE', 'cpu') != 'cpu' else 1


class ShortCPUTraining:
    """Mixin: see the module's docstring."""

    epochs = 4 * LONGER

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs
        self.num_val_iterations_per_epoch = 10
        self.tuning_share = 0  # the benchmarks name their settings

    def train_step(self, batch: dict) -> dict:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.device.type == 'cpu' and cpu_has_bfloat16()):
            return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.device.type == 'cpu' and cpu_has_bfloat16()):
            return super().validation_step(batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        pass


class nnUNetTrainerBenchmark(ShortCPUTraining, nnUNetTrainer):
    epochs = 10 * LONGER


class nnUNetTrainerBenchmarkLonger(ShortCPUTraining, nnUNetTrainer):
    """The control: the trained stock model of the fold, trained on with a new learning rate schedule."""

    def initialize(self):
        super().initialize()
        context = TrainingContext(self.plans_manager.plans, self.configuration_name, self.dataset_json)
        self.network.load_state_dict(context.stock_checkpoint(self.fold)['network_weights'])


class SeededEpochs:
    """Mixin: data drawn alike in every run. Needs `nnUNet_n_proc_DA=0`: data workers have seeds of their own."""

    seed = 0

    def initialize(self):
        torch.manual_seed(1000 * self.seed)
        super().initialize()

    def on_epoch_start(self):
        np.random.seed(1000 * self.seed + self.current_epoch)
        torch.manual_seed(1000 * self.seed + self.current_epoch)
        super().on_epoch_start()


class OneThread(SeededEpochs):
    """Mixin: one thread, and the fold as the seed: trainings of a fold see the same patches in the same order."""

    iterations = 250

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


class PDDDPMTrainerBenchmark(ShortCPUTraining, PDDDPMTrainer):
    """The default."""


class PDDDPMTrainerBenchmarkSecond(NoDiffusion, PDDDPMTrainerBenchmark):
    pass


class PaperCPUTraining(ShortCPUTraining):
    """Mixin: the published method, from scratch as there, for as many iterations as the others. Two steps in training's
    own validation, which nothing here depends on: 1,500 network calls would take longer than the training."""

    def validation_step(self, batch: dict) -> dict:
        settings, self.refiner.settings = self.refiner.settings, replace(self.refiner.settings, steps=2, mask_samples=1)
        try:
            return super().validation_step(batch)
        finally:
            self.refiner.settings = settings


class PDDDPMTrainerBenchmarkPaper(PaperCPUTraining, PDDDPMTrainerPaper):
    pass
