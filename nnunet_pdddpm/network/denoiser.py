"""The conditional denoiser: nnU-Net's planned U-Net that also sees a noisy mask and a noise level."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class SplitConv(nn.Module):
    """A first convolution whose weights are in two parts, for the image channels and for the mask channels behind them.

    The part for the image is the stock network's layer as it is, under its name. Without a mask, and with `mask_conv`
    at zero, the output is that of the stock layer.
    """

    def __init__(self, image_conv: nn.Module, mask_channels: int) -> None:
        """`image_conv`: the planned first convolution (nn.Conv2d or nn.Conv3d), kept as it is."""
        super().__init__()
        self.image_conv: Any = image_conv
        conv: Any = image_conv
        self.mask_conv = type(conv)(mask_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                                    conv.dilation, bias=False)
        nn.init.kaiming_normal_(self.mask_conv.weight, a=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, image channels + mask channels, ...) -> (B, features, ...); without the mask as if it were zeros."""
        if x.shape[1] == self.image_conv.in_channels:
            return self.image_conv(x)
        conv, convolve = self.image_conv, functional.conv2d if x.ndim == 4 else functional.conv3d
        weight = torch.cat([conv.weight, self.mask_conv.weight], 1)  # one convolution is faster than two and their sum
        return convolve(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation)


class LevelEmbedding(nn.Module):
    """Log SNR to a feature vector: sinusoids (Vaswani et al. 2017, section 3.5) and a two-layer perceptron."""

    frequencies: Tensor

    def __init__(self, num_features: int, num_frequencies: int = 16) -> None:
        super().__init__()
        frequencies = torch.linspace(math.log(0.05), math.log(3), num_frequencies).exp()  # periods of 2 to 126
        self.register_buffer('frequencies', frequencies, persistent=False)
        self.layers = nn.Sequential(nn.Linear(2 * num_frequencies, num_features), nn.SiLU(),
                                    nn.Linear(num_features, num_features), nn.SiLU())

    def forward(self, log_snr: Tensor) -> Tensor:
        """(B,) log SNRs -> (B, num_features)."""
        angles = log_snr.float()[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


class Modulation(nn.Module):
    """Feature-wise scale and shift of one U-Net stage by the noise level; the identity until trained.

    h -> (1 + scale) h + shift: FiLM (Perez et al., arXiv 1709.07871, eq. 2).
    """

    def __init__(self, num_embedding: int, num_features: int) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(num_embedding, 2 * num_features)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h (B, num_features, ...), embedding (B, num_embedding) -> shape of h."""
        scale, shift = self.scale_shift(embedding).chunk(2, 1)
        trailing = [1] * (h.ndim - 2)
        return torch.addcmul(shift.reshape(*shift.shape, *trailing), h, 1 + scale.reshape(*scale.shape, *trailing))


class Denoiser(nn.Module):
    """The planned U-Net with the noisy mask beside the image and the noise level in every stage.

    Works on any nnU-Net U-Net (PlainConvUNet, ResidualEncoderUNet: whatever has `encoder.stages`, `decoder.stages`,
    `transpconvs` and `seg_layers`), 2D and 3D. With deep supervision on it returns a list, finest first, as nnU-Net
    networks do.
    """

    def __init__(self, unet: nn.Module, mask_channels: int) -> None:
        """
        Args:
            unet: the planned network as nnU-Net builds it for the image channels; it is taken over and extended.
            mask_channels: number of channels of the noisy mask, behind the image.

        Raises:
            NotImplementedError: if the planned network is no U-Net of this form.
        """
        super().__init__()
        net: Any = unet
        if not (hasattr(net, 'keys_to_in_proj') and hasattr(getattr(net, 'encoder', None), 'stages')
                and hasattr(getattr(net, 'decoder', None), 'transpconvs')):
            raise NotImplementedError(f'PDDDPM refines U-Nets such as PlainConvUNet and ResidualEncoderUNet; the plans '
                                      f'name {type(unet).__name__}, which is none. Use plans with one of these.')
        self.unet: Any = net
        replace_first_convolution(unet, mask_channels)
        width = 128
        self.embedding = LevelEmbedding(width)
        features = list(net.encoder.output_channels)
        self.encoder_modulations = nn.ModuleList(Modulation(width, f) for f in features)
        self.decoder_modulations = nn.ModuleList(Modulation(width, f) for f in features[-2::-1])

    def forward(self, image: Tensor, mask: Tensor | None, log_snr: Tensor) -> Tensor | list[Tensor]:
        """
        Args:
            image: (B, image channels, ...) preprocessed patch.
            mask: (B, mask channels, ...) noisy mask; zeros where none is shown, None if none is shown at all, which is
                the same in less time.
            log_snr: (B,) noise levels.

        Returns:
            (B, C, ...) logits of the clean mask, or the predicted noise; a list of them with deep supervision.
        """
        embedding = self.embedding(log_snr)
        encoder, decoder = self.unet.encoder, self.unet.decoder
        x = image if mask is None else torch.cat([image, mask.to(image.dtype)], 1)
        if getattr(encoder, 'stem', None) is not None:
            x = encoder.stem(x)
        skips = []
        for stage, modulation in zip(encoder.stages, self.encoder_modulations, strict=True):
            x = modulation(stage(x), embedding)
            skips.append(x)
        outputs = []
        for i, modulation in enumerate(self.decoder_modulations):
            x = torch.cat([decoder.transpconvs[i](x), skips[-(i + 2)]], 1)
            x = modulation(decoder.stages[i](x), embedding)
            if decoder.deep_supervision or i == len(decoder.stages) - 1:
                outputs.append(decoder.seg_layers[i](x))
        return outputs[::-1] if decoder.deep_supervision else outputs[-1]

    def warm_start(self, stock_weights: dict[str, Tensor]) -> None:
        """Start from the stock network: its weights, and zeros for the mask channels.

        With the modulations still the identity, the denoiser's output is then the stock network's own, bit for bit.

        Args:
            stock_weights: state dict of the stock network of the same plans.
        """
        in_proj = self.unet.keys_to_in_proj
        renamed = {}
        for key, value in stock_weights.items():
            module, _, parameter = key.rpartition('.')
            renamed[f'{module}.image_conv.{parameter}' if module.removeprefix('decoder.') in in_proj else key] = value
        mask_weights = {k: torch.zeros_like(v) for k, v in self.unet.state_dict().items() if '.mask_conv.' in k}
        self.unet.load_state_dict({**renamed, **mask_weights})


def replace_first_convolution(unet: nn.Module, mask_channels: int) -> None:
    """Put a `SplitConv` in the place of the network's first convolution, under all the names it goes by."""
    keys: Any = unet.keys_to_in_proj
    split = SplitConv(unet.get_submodule(keys[0]), mask_channels)
    for key in keys:
        parent, _, name = key.rpartition('.')
        setattr(unet.get_submodule(parent), name, split)
