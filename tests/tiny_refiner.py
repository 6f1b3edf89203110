"""Refiners of tiny networks with random weights."""
from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunet_pdddpm.diffusion.coding import MaskCoding
from nnunet_pdddpm.diffusion.levels import LevelTable
from nnunet_pdddpm.network.refiner import DiffusionDesign, NoisyBatch, Refiner
from nnunet_pdddpm.network.settings import SamplingSettings

CHANNELS, CLASSES = 2, 3
KINDS = [(architecture, dims, isotropic) for architecture in ('PlainConvUNet', 'ResidualEncoderUNet')
         for dims in (2, 3) for isotropic in (True, False)]
KIND_NAMES = [f'{kind[0]}-{kind[1]}D-{"iso" if kind[2] else "aniso"}tropic' for kind in KINDS]
kinds = pytest.mark.parametrize('kind', KINDS, ids=KIND_NAMES)
two_kinds = pytest.mark.parametrize('kind', [KINDS[0], KINDS[-1]], ids=[KIND_NAMES[0], KIND_NAMES[-1]])
heads = pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
PLAIN_2D = KINDS[0]
X0, EPS = DiffusionDesign(), DiffusionDesign(MaskCoding(0, 1), 'eps', paper_levels=300)
designs = pytest.mark.parametrize('design', [X0, EPS], ids=['x0', 'eps'])
SETTINGS = SamplingSettings(start=0.8, steps=3, mask_blind=0.0, mask_samples=2, seed=4)  # the mean of two samples
NO_MASK = -19.0  # the blind level of a table that begins at -14


def unet(kind, seed, deep_supervision=False):
    """A network of three stages as nnU-Net builds it, with every parameter off its initial value."""
    architecture, dims, isotropic = kind
    first = 0 if isotropic else 1  # anisotropic: the first axis is neither convolved nor strided at the top
    convs = 'n_conv_per_stage' if architecture == 'PlainConvUNet' else 'n_blocks_per_stage'
    torch.manual_seed(seed)
    network = get_network_from_plans(
        f'dynamic_network_architectures.architectures.unet.{architecture}',
        {'n_stages': 3, 'features_per_stage': [4, 6, 8], 'conv_op': f'torch.nn.modules.conv.Conv{dims}d',
         'kernel_sizes': [[1] * first + [3] * (dims - first), [3] * dims, [3] * dims],
         'strides': [[1] * dims, [1] * first + [2] * (dims - first), [2] * dims],
         convs: [1, 2, 1], 'n_conv_per_stage_decoder': [1, 1], 'conv_bias': True,
         'norm_op': f'torch.nn.modules.instancenorm.InstanceNorm{dims}d',
         'norm_op_kwargs': {'eps': 1e-5, 'affine': True}, 'dropout_op': None, 'dropout_op_kwargs': None,
         'nonlin': 'torch.nn.LeakyReLU', 'nonlin_kwargs': {'inplace': True}},
        ['conv_op', 'norm_op', 'dropout_op', 'nonlin'], CHANNELS, CLASSES, deep_supervision=deep_supervision)
    return shaken(network)


def shaken(module):
    """The module with noise on every parameter, as after training: nothing is zero or the identity any more."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / (2 * parameter[0].numel() ** 0.5))  # fan-in: nothing explodes
    return module


def patch(kind, channels=CHANNELS, batch=2, seed=0):
    size = {2: (16, 12), 3: (8, 12, 8)}[kind[1]]
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def make_refiner(kind=PLAIN_2D, design=X0, settings=SETTINGS, regions=False, trained=True, seed=1,
                 deep_supervision=False):
    """A refiner as in prediction; untrained it is as the trainer warm-starts it."""
    stock = unet(kind, seed)
    refiner = Refiner(stock, unet(kind, seed + 1, deep_supervision), CLASSES, design)
    refiner.denoiser.warm_start(unet(kind, seed, deep_supervision).state_dict())
    if trained:
        shaken(refiner.denoiser)
    refiner.configure(settings, regions)
    return refiner.eval()


def probabilities(logits, regions=False):
    return torch.sigmoid(logits) if regions else torch.softmax(logits, 1)


def noisy_batch(kind=PLAIN_2D, levels=(2.5, -7.0)):
    return NoisyBatch(patch(kind), patch(kind, CLASSES, seed=1), torch.tensor(levels))


def spied(refiner):
    """What the networks of the refiner are called with from now on: [(mask, log SNR)], 'stock' for that network."""
    calls = []
    refiner.presegmenter.register_forward_pre_hook(lambda module, args: calls.append('stock'))
    refiner.denoiser.register_forward_pre_hook(lambda module, args: calls.append(args[1:]))
    return calls


def measured_table(lowest=-12.0, half=-3.7, decided=0.01):
    """A table as a meter measures it: the share falls as a logistic function of the log SNR."""
    log_snr = torch.linspace(lowest, 4, 41, dtype=torch.float64)
    share = torch.sigmoid(1.7 * (half - log_snr)) + decided * torch.rand(41, generator=torch.Generator().manual_seed(0))
    share = share.sort(descending=True).values
    share = (share - share[-1]) / (share[0] - share[-1])
    share = 0.999 * share + 0.001 * torch.linspace(1, 0, 41, dtype=torch.float64)
    return LevelTable(tuple(log_snr.tolist()), (1.0, *share[1:-1].tolist(), 0.0))
