"""Stochastic segmentation networks (Monteiro et al. 2020, arXiv 2006.06015), a baseline of the benchmarks."""
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal
from torch.optim.swa_utils import AveragedModel

from nnunet_pdddpm.training.averaging import average_weights, swap_parameters
from nnunet_pdddpm.training.presegmenters import TrainingContext
from nnunet_pdddpm.training.warm_up import WarmUpPolyLRScheduler

RANK = 10


class StochasticSegmentation(nn.Module):
    """Mean logits, a factor of low rank and a diagonal of the logits' covariance, by one network of the plan."""

    def __init__(self, unet: nn.Module, num_classes: int):
        super().__init__()
        self.unet, self.num_classes = unet, num_classes

    @property
    def decoder(self):
        return self.unet.decoder

    def distribution(self, output: Tensor) -> LowRankMultivariateNormal:
        """Of the logits (B, C * pixels) in float64, of the network's output (B, (2 + RANK) * C, ...): in float32 the
        factorization of the covariance fails now and then."""
        mean, diagonal, *factors = output.double().flatten(2).split(self.num_classes, 1)
        return LowRankMultivariateNormal(mean.flatten(1), torch.stack([of.flatten(1) for of in factors], -1),
                                         diagonal.flatten(1).exp() + 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """All in training, else the mean logits (B, C, ...)."""
        output = self.unet(x)
        return output if self.training else output[:, :self.num_classes]


class StochasticLoss(nn.Module):
    """Negative log of the mean likelihood of samples, a pixel (eq. 4 and 5 there, 20 samples)."""

    def __init__(self, network: StochasticSegmentation):
        super().__init__()
        self._distribution, self.num_classes = network.distribution, network.num_classes

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        target = target[:, 0].long().flatten(1)
        if output.shape[1] == self.num_classes:  # validation
            return nn.functional.cross_entropy(output.float().flatten(2), target)
        with torch.autocast(output.device.type, enabled=False):
            logits = self._distribution(output).rsample((20,)).float()
            logits = logits.reshape(20 * len(target), self.num_classes, -1)
            of_pixels = nn.functional.cross_entropy(logits, target.repeat(20, 1), reduction='none')
            likelihood = -of_pixels.sum(1).reshape(20, -1)
            return -(torch.logsumexp(likelihood, 0) - torch.log(torch.tensor(20.0))).mean() / target.shape[1]


class StochasticSegmentationTraining:
    """Mixin: a network of rank 10, from stock's weights, with the denoiser's optimiser, learning rates
    and averaged weights."""

    def __init__(self, plans: dict, configuration: str, fold: int, dataset_json: dict,
                 device: torch.device = torch.device('cuda')):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False
        self.initial_lr, self.weight_decay = 1e-3, 1e-2

    @classmethod
    def build_network_architecture(cls, plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        return StochasticSegmentation(nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, (2 + RANK) * num_output_channels, False),
            num_output_channels)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        self.averaged = AveragedModel(self.network, multi_avg_fn=average_weights(0.999))
        return optimizer, WarmUpPolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def train_step(self, batch):
        losses = super().train_step(batch)
        self.averaged.update_parameters(self.network)
        return losses

    def save_checkpoint(self, filename):
        swap_parameters(self.network, self.averaged.module)
        super().save_checkpoint(filename)
        swap_parameters(self.network, self.averaged.module)

    def initialize(self):
        super().initialize()
        context = TrainingContext(self.plans_manager.plans, self.configuration_name, self.dataset_json)
        stock, own = context.stock_checkpoint(self.fold)['network_weights'], self.network.unet.state_dict()
        for name, values in own.items():
            if values.shape == stock[name].shape:
                values.copy_(stock[name])
            else:  # the last layer: the mean is stock's, the deviation small
                values.mul_(0.1)[:len(stock[name])] = stock[name]
                values[len(stock[name]):2 * len(stock[name])] -= 2 if values.ndim == 1 else 0
        self.averaged.module.load_state_dict(self.network.state_dict())

    def _build_loss(self):
        return StochasticLoss(self.network)
