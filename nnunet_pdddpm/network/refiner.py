"""The one network that nnU-Net sees: the frozen stock network, the denoiser, and how to sample."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nnunet_pdddpm.diffusion.coding import MaskCoding, harden, logits_to_probabilities, probabilities_to_logits
from nnunet_pdddpm.diffusion.drawing import draw_shifts, drawn_logits
from nnunet_pdddpm.diffusion.process import ForwardProcess, GaussianProcess, Level, Redrawing, x0_from_eps
from nnunet_pdddpm.diffusion.sampling import refine, seeded_noise
from nnunet_pdddpm.diffusion.schedule import NUM_TIMESTEPS, SCHEDULES, truncated_levels
from nnunet_pdddpm.network.checkpoint import check_weights, note_checksum
from nnunet_pdddpm.network.denoiser import Denoiser
from nnunet_pdddpm.network.settings import SamplingSettings, effective_settings

_refine = torch.compiler.disable(refine, recursive=False)

MASK, SAMPLES = '', 'sampler_'  # prefixes of the two sets of sampling settings in the state dict
INTERVAL = 'interval_sd'  # in the state dict: see `configure`


@dataclass(frozen=True)
class DiffusionDesign:
    """What a trained denoiser cannot be used without knowing; fixed per trainer class."""
    schedule: str = 'cosine'
    coding: MaskCoding = MaskCoding()
    parameterisation: str = 'x0'
    """'x0': the denoiser gives logits of the clean mask; 'eps': it gives the noise."""
    condition_on_presegmentation: bool = False
    """Whether the denoiser sees the pre-segmentation's probabilities as further channels."""


class NoisyBatch(NamedTuple):
    """What the denoiser is trained on, in the place of nnU-Net's `data`."""
    image: Tensor
    """(B, image channels, ...) preprocessed patch."""
    noisy: Tensor
    """(B, C, ...) coded mask x_t."""
    t: Tensor
    """(B,) noise levels."""
    presegmentation: Tensor
    """(B, C, ...) probabilities of the pre-segmentation; (B, 0, ...) where the denoiser does not see them."""

    def to(self, *args: Any, **kwargs: Any) -> NoisyBatch:
        """All parts moved as `Tensor.to` moves one."""
        return NoisyBatch(*(part.to(*args, **kwargs) for part in self))


class Refiner(nn.Module):
    """Frozen pre-segmenter + denoiser + sampling settings, one state dict.

    `forward(image)` pre-segments, noises, takes the reverse steps and returns bounded float32 logits whose softmax
    (sigmoid for regions) is the mean of the sampled probabilities. `forward(NoisyBatch)` is the denoiser alone, for
    training. The same image always gives the same result: the noise depends on the seed and the sample's number.
    """

    has_regions: Tensor
    t_max: Tensor
    interval_sd: Tensor

    def __init__(self, presegmenter: nn.Module, unet: nn.Module, num_channels: int, design: DiffusionDesign) -> None:
        """
        Args:
            presegmenter: the stock network, without deep supervision; frozen here.
            unet: a second network of the same plans, taken over as the denoiser's.
            num_channels: number C of segmentation heads (classes, or regions).
            design: see `DiffusionDesign`.
        """
        super().__init__()
        self.design = design
        self.num_channels = num_channels
        self.abar = SCHEDULES[design.schedule]()
        self.presegmenter = presegmenter.requires_grad_(False).eval()
        self.denoiser = Denoiser(unet, num_channels * (2 if design.condition_on_presegmentation else 1))
        self.register_buffer('has_regions', torch.tensor(False))
        self.register_buffer('t_max', torch.tensor(NUM_TIMESTEPS))
        self.register_buffer(INTERVAL, torch.zeros(num_channels))
        for prefix in (MASK, SAMPLES):
            for name, value in asdict(SamplingSettings()).items():
                dtype = torch.float32 if isinstance(value, float) else None  # there is no float64 on mps
                self.register_buffer(prefix + name, torch.tensor(value, dtype=dtype))
        self.presegmenter_checksum: int | None = None  # see `check_weights`
        self.register_state_dict_post_hook(note_checksum)
        self.regions, self.settings = False, SamplingSettings()  # until weights and settings are loaded or configured

    def configure(self, settings: SamplingSettings, sample_settings: SamplingSettings, t_max: int,
                  has_regions: bool, interval_sd: Sequence[float] | None = None) -> None:
        """Store and use what a trained model is sampled with.

        Args:
            settings: of the mask, as `forward` and plain `nnUNetv2_predict` give it.
            sample_settings: of the samples that `nnUNetv2_pdddpm_predict` draws.
            t_max: the highest trained level.
            has_regions: whether the heads are regions (sigmoid) or classes (softmax).
            interval_sd: for each channel half of the 95 % interval of volumes, in standard deviations of the samples'
                volumes; 0 where it is not known, None if nowhere.

        Raises:
            ValueError: if a setting is out of range.
        """
        for prefix, stored in ((MASK, settings), (SAMPLES, sample_settings)):
            for name, value in asdict(stored.check(t_max)).items():
                getattr(self, prefix + name).fill_(value)
        self.t_max.fill_(t_max)
        self.has_regions.fill_(has_regions)
        self.interval_sd.copy_(torch.tensor(interval_sd or (0.0,)))
        self.use_stored_settings()

    def use_stored_settings(self) -> None:
        """Sample with the settings in the state dict, read once: at every tile that would wait for the GPU."""
        self.regions = bool(self.has_regions)
        self.settings = stored_settings(dict(self.named_buffers(recurse=False)), MASK)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; then samples with the settings that came with the weights, or the environment's overrides.

        Raises:
            ValueError: if a setting is out of range, or the weights are damaged, see `check_weights`.
        """
        self.presegmenter_checksum = check_weights(state_dict, 'The model', self.presegmenter_checksum)
        before = self.settings
        result = super().load_state_dict(with_later_settings(state_dict, self.num_channels), strict, assign)
        self.use_stored_settings()
        stored = self.settings
        self.settings = effective_settings(stored, int(self.t_max))
        if self.settings not in (stored, before):  # nnU-Net loads the weights anew for every case
            print(f'The environment overrides the sampling settings of the model: {self.settings}')
        return result

    def train(self, mode: bool = True) -> Refiner:
        """As nn.Module's, but the pre-segmenter stays in eval mode."""
        super().train(mode)
        self.presegmenter.eval()
        return self

    @property
    def decoder(self) -> Any:
        """The denoiser's decoder, whose `deep_supervision` nnU-Net switches."""
        return self.denoiser.unet.decoder

    def process(self, eta: float) -> ForwardProcess:
        """The forward process this network is trained and sampled with."""
        return GaussianProcess(self.abar, eta)

    def chain(self, settings: SamplingSettings, sample: int, samples: int) -> ForwardProcess:
        """The process that sample number `sample` of `samples` reverses; masks (B, C, ...)."""
        process = self.process(settings.eta)
        if not settings.redraw:
            return process

        @cache
        def shifts(s: int) -> Tensor:  # once a level: a volume comes slice by slice
            return draw_shifts(self.num_channels, self.regions, sample, samples, settings.seed, s)

        def draw_mask(x0_hat: Tensor, s: Level) -> Tensor:
            logits = [drawn_logits(p, self.regions, shifts(int(s))) for p in self.design.coding.decode(x0_hat)]
            return self.design.coding.encode(harden(torch.stack(logits), self.regions))
        return Redrawing(process, draw_mask)

    # Under torch.compile the sampling loop stays Python (a graph of it would be made anew for every level) and the two
    # networks that it calls are compiled: hence `disable` without recursion on every frame above them.

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor | NoisyBatch) -> Tensor | list[Tensor]:
        """(B, image channels, ...) image -> (B, C, ...) logits; `NoisyBatch` -> the denoiser's raw output."""
        if isinstance(x, NoisyBatch):
            return self.denoiser(x.image, self._mask_channels(x.noisy, x.presegmentation), x.t)
        return self.sample(x, self.settings)

    @torch.no_grad()
    @torch.compiler.disable(recursive=False)
    def sample(self, image: Tensor, settings: SamplingSettings) -> Tensor:
        """Mean of `settings.samples` refined masks of a patch, as logits.

        Args:
            image: (B, image channels, ...).
            settings: with t_start = 0 or blend = 1 the stock network's own output is returned, untouched.

        Returns:
            (B, C, ...) float32 logits within +-13.9, unless they are the stock network's own.
        """
        stock_logits = self.presegmenter(image)
        if settings.is_stock:
            return stock_logits
        stock = logits_to_probabilities(stock_logits, self.regions)
        x_pre = self.design.coding.encode(harden(stock_logits, self.regions))
        if settings.steps == 0:
            mean = self.probabilities(self.denoise(image, x_pre, 0, stock))
        else:
            levels = truncated_levels(settings.t_start, settings.steps)
            mean = torch.zeros_like(stock)
            for sample in range(settings.samples):
                draw = seeded_noise(x_pre.shape[1:], settings.seed, sample, x_pre.device)  # broadcast over the batch
                x = _refine(lambda x, t: self.denoise(image, x, t, stock),
                            self.chain(settings, sample, settings.samples), x_pre, levels, draw)
                mean += self.probabilities(x) / settings.samples
        return probabilities_to_logits((1 - settings.blend) * mean + settings.blend * stock, self.regions)

    @torch.compiler.disable(recursive=False)
    def denoise(self, image: Tensor, x: Tensor, t: Level, presegmentation: Tensor | None) -> Tensor:
        """The denoiser's estimate of the clean coded mask under x_t, (B, C, ...) float32.

        Args:
            image: (B, image channels, ...).
            x: (B, C, ...) coded mask x_t.
            t: noise level.
            presegmentation: (B, C, ...) probabilities of the pre-segmentation, if the design conditions on them.
        """
        level = torch.as_tensor(t, device=x.device).expand(x.shape[0])
        output = self.denoiser(image, self._mask_channels(x, presegmentation), level)
        output = (output[0] if isinstance(output, list) else output).float()
        coding = self.design.coding
        if self.design.parameterisation == 'x0':
            return coding.encode(logits_to_probabilities(output, self.regions))
        return x0_from_eps(x, output, t, self.abar).clamp(coding.low, coding.high)

    def probabilities(self, x: Tensor) -> Tensor:
        """Coded mask at level 0 to probabilities; classes sum to one."""
        p = self.design.coding.decode(x)
        if self.regions:
            return p
        total = p.sum(1, keepdim=True)
        return torch.where(total > 0, p / total.clamp(min=1e-12), 1 / self.num_channels)

    def _mask_channels(self, x: Tensor, presegmentation: Tensor | None) -> Tensor:
        if self.design.condition_on_presegmentation:
            assert presegmentation is not None
            return torch.cat([x, self.design.coding.encode(presegmentation)], 1)
        return x


def stored_settings(weights: Mapping[str, Tensor], prefix: str) -> SamplingSettings:
    """The settings of the mask (`MASK`) or the samples (`SAMPLES`) in a refiner's state dict, without any override.

    Raises:
        KeyError: if it is no refiner's.
    """
    weights = with_later_settings(weights, 0)
    values: dict[str, Any] = {name: weights[prefix + name].item() for name in asdict(SamplingSettings())}
    values.update({name: round(value, 6) for name, value in values.items() if isinstance(value, float)})
    return SamplingSettings(**values)


def with_later_settings(weights: Mapping[str, Any], num_channels: int) -> dict[str, Any]:
    """A refiner's state dict with what models of earlier versions lack: no step redraws, no interval is calibrated."""
    completed: Any = copy(weights)  # with its metadata
    for prefix in (MASK, SAMPLES):
        completed.setdefault(prefix + 'redraw', torch.tensor(False))
    completed.setdefault(INTERVAL, torch.zeros(num_channels))
    return cast(dict[str, Any], completed)
