"""The one network that nnU-Net sees: the frozen stock network, the denoiser, and how to sample."""
from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_pdddpm.diffusion.coding import MaskCoding, harden, logits_to_probabilities, probabilities_to_logits
from nnunet_pdddpm.diffusion.drawing import END, draw_shifts, drawn_mask
from nnunet_pdddpm.diffusion.levels import LevelTable, even_table, paper_table
from nnunet_pdddpm.diffusion.measuring import NODES
from nnunet_pdddpm.diffusion.process import Ancestral, ForwardProcess, Redrawing, log_likelihood_ratio, x0_from_eps
from nnunet_pdddpm.diffusion.sampling import NoiseCache, refine
from nnunet_pdddpm.network.checkpoint import check_weights, note_checksum
from nnunet_pdddpm.network.denoiser import Denoiser
from nnunet_pdddpm.network.seen import Seen, note_seen, stored_seen
from nnunet_pdddpm.network.settings import SamplingSettings, as_numbers, effective_settings
from nnunet_pdddpm.network.state import (
    CALIBRATION,
    CALIBRATION_CASES,
    CALIBRATION_FIELDS,
    LEVELS,
    QUALITY,
    QUALITY_FIELDS,
    QUALITY_ROWS,
    SETTING,
    check_version,
    stored_settings,
    stored_table,
)

_refine = torch.compiler.disable(refine, recursive=False)

BLIND_OFFSET = 5.0
"""What the blind level is below the lowest log SNR."""


@dataclass(frozen=True)
class DiffusionDesign:
    """What a trained denoiser cannot be used without knowing; fixed per trainer class."""
    coding: MaskCoding = MaskCoding()
    parameterisation: str = 'x0'
    """'x0': the denoiser gives logits of the clean mask; 'eps': it gives the noise."""
    paper_levels: int = 0
    """0: levels are shares of uncertainty, measured in training; else T' of the paper's cosine schedule."""

    @property
    def nodes(self) -> int:
        """Number of nodes of the table of levels."""
        return self.paper_levels + 1 if self.paper_levels else NODES

    def first_table(self) -> LevelTable:
        """The table of levels before training."""
        return paper_table(self.paper_levels) if self.paper_levels else even_table(-14.0, NODES)


class NoisyBatch(NamedTuple):
    """What the denoiser is trained on, in the place of nnU-Net's `data`."""
    image: Tensor
    """(B, image channels, ...) preprocessed patch."""
    noisy: Tensor
    """(B, C, ...) coded mask x_t; zeros at the blind level, where no mask is shown."""
    log_snr: Tensor
    """(B,) noise levels."""

    def to(self, *args: Any, **kwargs: Any) -> NoisyBatch:
        """The batch with all parts moved, as `Tensor.to`."""
        return NoisyBatch(*(part.to(*args, **kwargs) for part in self))


class Refiner(nn.Module):
    """Frozen pre-segmenter + denoiser + table of levels + sampling settings, one state dict.

    `forward(image)` gives the logits of the mask that the settings ask for: of the blind mask, one call of the
    denoiser, by default. `forward(NoisyBatch)` is the denoiser alone, for training. The same image always gives the
    same result: noise and draws depend on the seed and the sample's number.
    """

    has_regions: Tensor
    calibration: Tensor
    quality: Tensor

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
        self.presegmenter = presegmenter.requires_grad_(False).eval()
        self.denoiser = Denoiser(unet, num_channels)
        self.register_buffer('has_regions', torch.tensor(False))
        self.register_buffer(CALIBRATION, torch.zeros(CALIBRATION_CASES, num_channels, CALIBRATION_FIELDS))
        self.register_buffer(QUALITY, torch.zeros(QUALITY_ROWS, num_channels, QUALITY_FIELDS))
        for name in LEVELS:
            self.register_buffer(name, torch.zeros(design.nodes))
        for name, value in as_numbers(SamplingSettings()).items():
            dtype = torch.float32 if isinstance(value, float) else None  # there is no float64 on mps
            self.register_buffer(SETTING + name, torch.tensor(value, dtype=dtype))
        self.presegmenter_checksum: int | None = None  # see `check_weights`
        self.seen = Seen()
        self._noise = NoiseCache()
        self.register_state_dict_post_hook(note_checksum)
        self.register_state_dict_post_hook(note_seen)
        self.regions, self.settings = False, SamplingSettings()  # until weights and settings are loaded or configured
        self.store_levels(design.first_table())

    def configure(self, settings: SamplingSettings, has_regions: bool) -> None:
        """Store and use what a trained model is sampled with. A calibration by other settings is dropped.

        Args:
            settings: of samples and mask.
            has_regions: whether the heads are regions (sigmoid) or classes (softmax).

        Raises:
            ValueError: if a setting is out of range.
        """
        for name, value in as_numbers(settings.check()).items():
            getattr(self, SETTING + name).fill_(value)
        self.has_regions.fill_(has_regions)
        self.calibration.zero_()
        self.quality.zero_()
        self.use_stored_settings()

    def store_levels(self, table: LevelTable, cross_entropy: Tensor | None = None, count: Tensor | None = None) -> None:
        """Store and use a table of levels, and what it was measured by, both (nodes,)."""
        for name, values in zip(LEVELS, (torch.tensor(table.log_snr), torch.tensor(table.share), cross_entropy, count),
                                strict=True):
            getattr(self, name).copy_(torch.zeros(self.design.nodes) if values is None else values)
        self.table = stored_table(dict(self.named_buffers(recurse=False)))  # as it will be loaded, in float32

    def use_stored_settings(self) -> None:
        """Sample with what is in the state dict, read once: at every tile that would wait for the GPU."""
        buffers = dict(self.named_buffers(recurse=False))
        self.regions = bool(self.has_regions)
        self.settings = stored_settings(buffers)
        self.table = stored_table(buffers)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; then samples with the settings that came with the weights, or the environment's overrides.

        Raises:
            ValueError: if a setting is out of range, or the weights are damaged, see `check_weights`.
            CheckpointError: if it is the state of another version.
        """
        check_version(state_dict, 'The model')
        self.presegmenter_checksum = check_weights(state_dict, 'The model', self.presegmenter_checksum)
        self.seen = stored_seen(state_dict)
        before = self.settings
        result = super().load_state_dict(state_dict, strict, assign)
        self.use_stored_settings()
        stored = self.settings
        self.settings = effective_settings(stored)
        if self.settings not in (stored, before):  # nnU-Net loads the weights again for every case
            # no log: nnUNetv2_predict shows none, and who predicts has to know
            warnings.warn(f'The environment overrides the sampling settings of the model: {self.settings}',
                          stacklevel=2)
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

    def chain(self, settings: SamplingSettings, sample: int, samples: int | None, parts: Tensor | None = None,
              num_parts: int = 1, central: bool = False) -> ForwardProcess:
        """The process that sample number `sample` of `samples` (None: one that depends on no other) reverses.

        `parts`: (...) which part of the volume each voxel of masks (B, C, ...) belongs to, of `num_parts` that are
        drawn by uniforms of their own; None for one part. `central`: see `draw_shifts`.
        """
        if not settings.redraw:
            return Ancestral()
        stages = {level: 2 + i for i, level in enumerate(self.table.chain(settings.start, settings.steps)[1:])}

        def draw_mask(x0_hat: Tensor, lower: float) -> Tensor:
            shifts = self._shifts(settings, sample, samples, stages[lower], num_parts, central)
            masks = [drawn_mask(p, self.regions, shifts, parts) for p in self.design.coding.decode(x0_hat)]
            return self.design.coding.encode(torch.stack(masks))
        return Redrawing(draw_mask)

    def start_shifts(self, settings: SamplingSettings, sample: int, samples: int | None, num_parts: int = 1,
                     central: bool = False) -> Tensor:
        """What draws the mask that a chain starts from: see `draw_shifts`."""
        return self._shifts(settings, sample, samples, 1, num_parts, central)

    def end_shifts(self, settings: SamplingSettings, sample: int, samples: int | None, num_parts: int = 1
                   ) -> Tensor:
        """What draws a sample's mask at the end: see `draw_shifts`."""
        return self._shifts(settings, sample, samples, END, num_parts)

    def _shifts(self, settings: SamplingSettings, sample: int, samples: int | None, stage: int, num_parts: int,
                central: bool = False) -> Tensor:
        seed = settings.seed
        if samples is None:
            seed, sample, samples = seed * 1_000_003 + sample + 1, 0, 1
        return draw_shifts(self.num_channels, self.regions, sample, samples, seed, stage, num_parts,
                           settings.dependence, central)

    def start_mask(self, stock_logits: Tensor, settings: SamplingSettings, shifts: Tensor, parts: Tensor | None = None
                   ) -> Tensor:
        """The coded mask (C, ...) that a chain starts from, of stock logits (C, ...): drawn by the shifts, or hard."""
        if settings.start_mask == 'hard':
            return self.design.coding.encode(harden(stock_logits[None], self.regions)[0])
        p = logits_to_probabilities(stock_logits[None].float() / settings.temperature, self.regions)[0]
        return self.design.coding.encode(drawn_mask(p, self.regions, shifts, parts))

    # Under torch.compile the sampling loop stays Python (a graph of it would be made again for every level) and the two
    # networks that it calls are compiled: hence `disable` without recursion on every frame above them.

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor | NoisyBatch) -> Tensor | list[Tensor]:
        """(B, image channels, ...) image -> (B, C, ...) logits; `NoisyBatch` -> the denoiser's raw output."""
        if isinstance(x, NoisyBatch):
            return self.denoiser_output(x.image, x.noisy, x.log_snr)
        return self.sample(x, self.settings)

    @torch.compiler.disable(recursive=False)
    def denoiser_output(self, image: Tensor, noisy: Tensor, log_snr: Tensor) -> Tensor | list[Tensor]:
        """Logits of the clean mask, or the predicted noise: the denoiser's output, finest first with deep supervision.

        What each noisy voxel says by itself (`process.log_likelihood_ratio`) is added to the finest logits. So the
        network has to find out only what the image and the other voxels say. At the blind level, where the mask is
        zeros, nothing is added.
        """
        output = self.denoiser(image, noisy, log_snr)
        if self.design.parameterisation == 'eps':
            return output
        coding = self.design.coding
        ratio = log_likelihood_ratio(noisy, log_snr, coding.low, coding.high)
        return [output[0] + ratio, *output[1:]] if isinstance(output, list) else output + ratio

    @torch.no_grad()
    @torch.compiler.disable(recursive=False)
    def sample(self, image: Tensor, settings: SamplingSettings) -> Tensor:
        """The mask of a patch, as logits: of the stock model, the blind mask, the mean of samples, or weighted.

        Args:
            image: (B, image channels, ...).
            settings: with start = 0 or mask_stock = 1 the stock network's own output is returned, untouched; with
                mask_blind = 1 the denoiser's, divided by its temperature.

        Returns:
            (B, C, ...) logits; of a weighted mean of probabilities, each under its temperature, float32 within +-13.9.
        """
        if settings.is_stock:
            return self.presegmenter(image)
        if settings.mask_blind == 1:
            return self.blind_logits(image, settings.blind_temperature)
        stock_logits = self.presegmenter(image)
        mean = settings.mask_stock * self._tempered(stock_logits, settings.temperature)
        if settings.mask_blind > 0:
            mean += settings.mask_blind * self._tempered(self.blind_logits(image), settings.blind_temperature)
        if settings.mask_chain > 0:
            mean += settings.mask_chain * self._mean_of_samples(image, stock_logits, settings)
        return probabilities_to_logits(mean, self.regions)

    @torch.compiler.disable(recursive=False)
    def blind_logits(self, image: Tensor, temperature: float = 1.0) -> Tensor:
        """(B, image channels, ...) -> logits (B, C, ...) of the denoiser that is shown no mask, over a temperature.

        Raises:
            ValueError: for a denoiser that gives noise and no mask.
        """
        if self.design.parameterisation == 'eps':
            raise ValueError('This model predicts noise and has no blind mask: set mask_blind to 0, and samples_from '
                             'to chain or stock.')
        output = self.denoiser(image, None, self._level(self.blind_level, image))
        return (output[0] if isinstance(output, list) else output) / temperature

    def _tempered(self, logits: Tensor, temperature: float) -> Tensor:
        return logits_to_probabilities(logits.float() / temperature, self.regions)

    @property
    def blind_level(self) -> float:
        """Number that stands for the blind level in the place of a log SNR: below all of them."""
        return self.table.log_snr[0] - BLIND_OFFSET

    def _level(self, level: float, like: Tensor) -> Tensor:
        return torch.full((like.shape[0],), level, dtype=torch.float32, device=like.device)

    def _mean_of_samples(self, image: Tensor, stock_logits: Tensor, settings: SamplingSettings) -> Tensor:
        """Mean probabilities (B, C, ...) of `mask_samples` samples of a patch, drawn as one part.

        All tiles and cases share what draws their masks. So it is central: one sample alone takes the likeliest labels.
        """
        if settings.samples_from == 'stock':
            return self._tempered(stock_logits, settings.temperature)
        if settings.samples_from == 'blind':
            return self._tempered(self.blind_logits(image), settings.blind_temperature)
        number, levels = settings.mask_samples, self.table.chain(settings.start, settings.steps)
        mean = torch.zeros_like(stock_logits, dtype=torch.float32)
        for sample in range(number):
            shifts = self.start_shifts(settings, sample, number, central=True)
            mask = torch.stack([self.start_mask(logits, settings, shifts) for logits in stock_logits])
            draw = self._noise.source(mask.shape[1:], settings.seed, sample, mask.device, settings.steps)
            chain = self.chain(settings, sample, number, central=True)
            x = _refine(lambda x, level: self.denoise(image, x, level), chain, mask, levels, draw)
            mean += self.probabilities(x) / number
        return mean

    @torch.compiler.disable(recursive=False)
    def denoise(self, image: Tensor, x: Tensor, level: float) -> Tensor:
        """The denoiser's estimate of the clean coded mask under x_t, (B, C, ...) float32.

        Args:
            image: (B, image channels, ...).
            x: (B, C, ...) coded mask x_t.
            level: log SNR.
        """
        output = self.denoiser_output(image, x, self._level(level, x))
        output = (output[0] if isinstance(output, list) else output).float()
        coding = self.design.coding
        if self.design.parameterisation == 'x0':
            return coding.encode(logits_to_probabilities(output, self.regions))
        return x0_from_eps(x, output, level).clamp(coding.low, coding.high)

    def probabilities(self, x: Tensor) -> Tensor:
        """Coded estimate of the clean mask to probabilities; classes sum to one."""
        p = self.design.coding.decode(x)
        if self.regions:
            return p
        total = p.sum(1, keepdim=True)
        return torch.where(total == 0, 1 / self.num_channels, p / total.clamp(min=1e-12))  # NaN stays NaN


class BlindNetwork(nn.Module):
    """The blind mask as a network of its own, for nnU-Net's sliding window: image (B, ...) -> logits (B, C, ...)."""

    def __init__(self, refiner: Refiner, temperature: float) -> None:
        """`refiner`: whose denoiser it is; `temperature`: that its logits are divided by."""
        super().__init__()
        self.denoiser, self.temperature = refiner.denoiser, temperature
        self._blind_logits = refiner.blind_logits

    def forward(self, image: Tensor) -> Tensor:
        """See `Refiner.blind_logits`."""
        return self._blind_logits(image, self.temperature)
