"""Further ways to train one network for mask and samples: the default with one thing changed, for `ablation.py` (the
phantom) and `candidates.py` (real data)."""
from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from ambiguous_trainers import PDDDPMTrainerAmbiguous
from benchmark_trainers import CrossEntropyAlone
from cells_trainers import PDDDPMTrainerCells
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_pdddpm.diffusion.coding import harden, logits_to_probabilities
from nnunet_pdddpm.diffusion.process import ForwardProcess, GaussianProcess, Level, at_level
from nnunet_pdddpm.network.refiner import DiffusionDesign, NoisyBatch, Refiner

TOLD = 2000
"""Added to the level of an x_t that is said to come from the pre-segmentation."""


class OnPresegmentation(GaussianProcess):
    """The DDPM process; in training the noise is on the pre-segmentation, not on the truth, where `where` says."""

    def where(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(B,) bool."""
        raise NotImplementedError

    def marginal(self, x0: Tensor, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        if not isinstance(t, Tensor):  # a chain that redraws
            return super().marginal(x0, x_pre, t, noise)
        chosen = self.where(x0, t, noise).to(x0.device).reshape(-1, *[1] * (x0.ndim - 1))
        return super().marginal(torch.where(chosen, x_pre, x0), x_pre, t, noise)


class HalfOnPresegmentation(OnPresegmentation):
    """In half of the patches, drawn by the sign of a number of the noise."""

    def where(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise.flatten(1)[:, 0] > 0


class LowOnPresegmentation(OnPresegmentation):
    """Split by level: up to t = 500 (a signal-to-noise ratio of 1)."""

    def where(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return t <= 500


class BridgeProcess:
    """From the truth to the pre-segmentation, as ResShift does for images (Yue et al., arXiv 2307.12348, eqs. 1 to 7):

        x_t = x0 + eta_t (x_pre - x0) + kappa sqrt(eta_t) eps,    eta_t = 1 - abar_t

    and its exact posterior as the reverse step. The state is kept divided by sqrt(1 + kappa^2 eta_t).
    """

    stochastic = True

    def __init__(self, abar: Tensor, kappa: float) -> None:
        self.eta, self.kappa = 1 - abar, kappa
        self.size = (1 + kappa ** 2 * self.eta).sqrt()

    def marginal(self, x0: Tensor, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        eta = at_level(self.eta, t, x0)
        return (x0 + eta * (x_pre - x0) + self.kappa * eta.sqrt() * noise) / at_level(self.size, t, x0)

    def start(self, x_pre: Tensor, t: Level, noise: Tensor) -> Tensor:
        return self.marginal(x_pre, x_pre, t, noise)

    def step(self, x: Tensor, x0_hat: Tensor, x_pre: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor:
        of_t, of_s = (at_level(self.eta, level, x) for level in (t, s))
        mean = of_s / of_t * x * at_level(self.size, t, x) + (of_t - of_s) / of_t * x0_hat
        return (mean + self.kappa * (of_s * (of_t - of_s) / of_t).sqrt() * noise) / at_level(self.size, s, x)


class OtherProcess:
    """Mixin: the default with another forward process."""

    presegments_every_patch = True

    @staticmethod
    def new_process(abar: Tensor, eta: float) -> ForwardProcess:
        """In training and prediction."""
        raise NotImplementedError

    @classmethod
    def build_network_architecture(cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager,
                                   num_input_channels: int, num_output_channels: int,
                                   enable_deep_supervision: bool = True) -> nn.Module:
        refiner = super().build_network_architecture(plans_manager, configuration_manager, num_input_channels,
                                                     num_output_channels, enable_deep_supervision)

        def process(eta: float) -> ForwardProcess:
            return cls.new_process(refiner.abar, eta)
        refiner.process = process
        cls.change(refiner)
        return refiner

    @staticmethod
    def change(refiner: Refiner) -> None:
        """Whatever else is different."""


class NoiseOnHalf(OtherProcess):
    new_process = HalfOnPresegmentation


class NoiseOnLow(OtherProcess):
    new_process = LowOnPresegmentation


class Recycling:
    """Mixin: in half of the steps the denoiser's own result is shown in the place of the pre-segmentation."""

    def presegment(self, image: Tensor, keys: Sequence[str]) -> Tensor:
        logits = super().presegment(image, keys)
        if torch.rand((), generator=self.level_generator) < 0.5:
            x = self.design.coding.encode(harden(logits, self.refiner.regions))
            own = self.refiner.denoise(image, x, 0, logits_to_probabilities(logits, self.refiner.regions))
            logits = own.to(logits.dtype)  # coded probabilities: what is above is above
        return logits


class ToldEmbedding(nn.Module):
    """The embedding of the noise level, with a learned vector where the level is given as t + TOLD."""

    def __init__(self, of_level: nn.Module) -> None:
        super().__init__()
        self.of_level = of_level
        self.told = nn.Parameter(torch.zeros(of_level.layers[-2].out_features))

    def forward(self, t: Tensor) -> Tensor:
        told = t >= TOLD
        return self.of_level(t - TOLD * told) + told[:, None] * self.told


class Told(NoiseOnHalf):
    """Mixin: the network is told whether noise is on the pre-segmentation, as in half of the noisy patches, or on the
    truth. Where it is on the pre-segmentation the best mask is asked for, with the loss of level 0.

    In prediction the environment says which of the two x_t is to be taken for, by BENCHMARK_FOR_MASK=1 or none.
    """

    @staticmethod
    def change(refiner: Refiner) -> None:
        refiner.denoiser.embedding = ToldEmbedding(refiner.denoiser.embedding)
        told, denoise = TOLD * int(os.environ.get('BENCHMARK_FOR_MASK', 0)), refiner.denoise
        refiner.denoise = lambda image, x, t, seen: denoise(image, x, t + told * (t > 0), seen)

    def make_noisy_batch(self, image: Tensor, target: Tensor, keys: Sequence[str]) -> tuple[NoisyBatch, Tensor]:
        batch, noise = super().make_noisy_batch(image, target, keys)
        told = (batch.t > 0) & self.refiner.process(0.0).where(noise, batch.t, noise)
        self.denoising_loss.noisy &= ~told.cpu()
        return batch._replace(t=batch.t + TOLD * told), noise


class Bridge2(OtherProcess):
    @staticmethod
    def new_process(abar: Tensor, eta: float) -> ForwardProcess:
        return BridgeProcess(abar, 2.0)


class Bridge8(OtherProcess):
    @staticmethod
    def new_process(abar: Tensor, eta: float) -> ForwardProcess:
        return BridgeProcess(abar, 8.0)


class PDDDPMTrainerAmbiguousHalfOnPresegmentation(NoiseOnHalf, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousSplit(NoiseOnLow, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousBridge2(Bridge2, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousBridge8(Bridge8, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerAmbiguousRecycling(Recycling, PDDDPMTrainerAmbiguous):
    pass


class PDDDPMTrainerCellsSplit(NoiseOnLow, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerCellsRecycling(Recycling, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerCellsTold(Told, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerCellsHalfOnPresegmentation(NoiseOnHalf, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerCellsBridge8(Bridge8, PDDDPMTrainerCells):
    pass


class PDDDPMTrainerAmbiguousCE(CrossEntropyAlone, PDDDPMTrainerAmbiguous):
    """No Dice loss where the pre-segmentation is shown, either."""


class PDDDPMTrainerAmbiguousSeen(PDDDPMTrainerAmbiguous):
    design = DiffusionDesign(condition_on_presegmentation=True)


class PDDDPMTrainerAmbiguousSeenCE(CrossEntropyAlone, PDDDPMTrainerAmbiguousSeen):
    pass


class PDDDPMTrainerAmbiguousBridge8CE(CrossEntropyAlone, PDDDPMTrainerAmbiguousBridge8):
    pass
