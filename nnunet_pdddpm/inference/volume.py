"""A padded image under the model that is loaded: its pre-segmentation, and samples of the whole volume."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor
from tqdm import tqdm

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.inference.chunks import all_finite, chunks
from nnunet_pdddpm.inference.components import WHOLE, Parts, objects_in, parts_around
from nnunet_pdddpm.inference.counting import VoxelCounter
from nnunet_pdddpm.inference.errors import UnusableLogits
from nnunet_pdddpm.inference.quality import Qualities
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume_sampling import (
    SliceValues,
    Tile,
    fuse_tiles,
    mirrorings,
    mirrorings_of_sample,
    refine_volume,
    volume_noise,
)
from nnunet_pdddpm.memory import lacks_memory
from nnunet_pdddpm.network.refiner import Refiner
from nnunet_pdddpm.network.settings import SamplingSettings

logger = logging.getLogger(__name__)

SLICE_CORRELATION = 0.9
"""Of the noise of neighbouring slices, in configurations that segment slices (2d): a stack of them hangs together."""


class Networks(Protocol):
    """What a `Volume` asks of its predictor: nnU-Net's predictor, and how the refiner in it is run."""
    # nnU-Net's
    device: torch.device
    label_manager: Any
    configuration_manager: Any
    use_gaussian: bool
    use_mirroring: bool
    allowed_mirroring_axes: Sequence[int] | None
    allow_tqdm: bool

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """(image channels, Z, Y, X) -> logits (C, Z, Y, X) of the network that is in place."""

    def _internal_get_sliding_window_slicers(self, image_size: Sequence[int]) -> list[Tile]:
        """(Z, Y, X) -> tiles."""

    # this package's
    refiner: Refiner
    fold_settings: list[SamplingSettings]
    tile_batch: int

    def using_stock_network(self, mirrored: bool = True) -> AbstractContextManager[None]:
        """Within it the stock network is in place."""

    def using_blind_network(self, temperature: float) -> AbstractContextManager[None]:
        """Within it the denoiser that is shown no mask is in place."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it the denoiser runs in its precision."""


@dataclass
class VolumePrediction:
    """What is known of one preprocessed image, in its own grid (before resampling to the original image)."""
    presegmentation: Tensor | None
    """Stock logits (C, Z, Y, X) float16, mean over folds: what stock nnU-Net predicts; None if not asked for."""
    logits: Tensor
    """Logits (C, Z, Y, X) of the mask, on the CPU."""
    spread: Spread
    """Of the samples, without padding."""
    network_calls: dict[str, int]
    """Forward passes of a tile (in 2d, of a tile of a slice): stock and denoiser."""
    seconds: float
    """Wall clock time of all this."""
    counts: VoxelCounter
    """Voxels of the labels in mask and samples."""
    quality: Qualities
    """Of each label: what may tell how good its mask is."""
    stock_is_finite: Tensor
    """() bool, whether all logits of the stock model are numbers: chains start from them, and hide others."""

    def require_finite(self) -> None:
        """Raise `UnusableLogits` unless what the stock model, the mask and the samples are made of are numbers."""
        if not self.stock_is_finite:
            raise UnusableLogits('logits of the stock model')
        for what, values in (('logits of the mask', self.logits), ('probabilities of the samples', self.spread.mean)):
            if not all_finite(values):
                raise UnusableLogits(what)


class Volume:
    """One padded image, and the model that is loaded at the time: pre-segments it and draws samples of it."""

    def __init__(self, predictor: Networks, image: Tensor, device: torch.device) -> None:
        """`image`: (image channels, Z, Y, X), not smaller than a tile; `device`: of the volume's arrays."""
        self.predictor, self.refiner, self.device = predictor, predictor.refiner, device
        self.image = image.to(device)
        self.tiles: list[Tile] = predictor._internal_get_sliding_window_slicers(image.shape[1:])
        self.shape = (predictor.label_manager.num_segmentation_heads, *image.shape[1:])
        patch_size = tuple(predictor.configuration_manager.patch_size)
        self.weight = compute_gaussian(patch_size, value_scaling_factor=10, dtype=torch.float32, device=device) \
            if predictor.use_gaussian else torch.ones(patch_size, device=device)
        self.mirrorings = mirrorings(predictor.allowed_mirroring_axes if predictor.use_mirroring else None)
        self.slice_correlation = SLICE_CORRELATION if len(patch_size) == 2 else 0.0
        self.progress = tqdm(desc='Sampling', total=0, disable=not predictor.allow_tqdm)
        self.network_calls = {'stock': 0, 'denoiser': 0}
        self.stock_is_finite = torch.ones((), dtype=torch.bool, device=device)

    def start_fold(self, mirrored: bool = True) -> None:
        """Pre-segment by the model that has just been loaded.

        `mirrored`: as stock nnU-Net predicts. What a chain starts from need not be.
        """
        self.stock_logits = torch.empty(0)
        self._start_logits: Tensor | None = None  # that of the model before need not stay
        self._blind: dict[float, Tensor] = {}  # temperature -> logits
        self.stock_logits = self.presegment(mirrored)
        if not mirrored or len(self.mirrorings) == 1:
            self._start_logits = self.stock_logits
        self.refiner.to(self.predictor.device).eval()
        self._parts: dict[float, Parts] = {}  # by temperature

    def drop_mirrored(self) -> None:
        """Free the mirrored stock logits: nothing more is made of them."""
        self.stock_logits = torch.empty(0)

    @property
    def start_logits(self) -> Tensor:
        """Stock logits (C, Z, Y, X) float16 without mirroring: chains start from draws of them, and objects are found
        in them. So the samples do not depend on whether the stock model's own result is wanted, too."""
        if self._start_logits is None:
            self._start_logits = self.presegment(False)
            self.refiner.to(self.predictor.device).eval()
        return self._start_logits

    def presegment(self, mirrored: bool) -> Tensor:
        """Stock logits (C, Z, Y, X) float16."""
        with self.predictor.using_stock_network(mirrored):
            logits = self.predictor.predict_sliding_window_return_logits(self.image).to(self.device)
        self.network_calls['stock'] += len(self.tiles) * (len(self.mirrorings) if mirrored else 1)
        self.stock_is_finite = self.stock_is_finite & all_finite(logits)
        return logits

    def plan_progress(self, settings: SamplingSettings, draws: Sequence[int], samples: int) -> None:
        """Add the passes of the draws with these numbers, out of `samples`, to the progress bar."""
        passes = sum(len(self.mirrorings_of(draw, samples)) for draw in draws)
        if settings.samples_from == 'chain' and settings.start > 0:
            self.progress.total += passes * settings.steps * len(self.tiles)
        self.progress.refresh()

    def mirrorings_of(self, sample: int, samples: int | None) -> list[tuple[int, ...]]:
        """The mirrorings of sample number `sample` of `samples` (None: one). The models take turns in drawing them, and
        the samples of each model together see all mirrorings."""
        models = len(self.predictor.fold_settings)
        if samples is None:
            return [self.mirrorings[sample % len(self.mirrorings)]]
        return mirrorings_of_sample(sample // models, samples // models, self.mirrorings)

    def blind_logits(self, temperature: float = 1.0) -> Tensor:
        """Logits (C, Z, Y, X) float16 of the blind mask over a temperature, by nnU-Net's sliding window."""
        if temperature not in self._blind:
            if 1.0 in self._blind:
                return self._blind[1.0] / temperature
            with self.predictor.using_blind_network(temperature):
                logits = self.predictor.predict_sliding_window_return_logits(self.image)
            self._blind[temperature] = logits.to(self.device)
            self.network_calls['denoiser'] += len(self.tiles) * len(self.mirrorings)
            self.refiner.to(self.predictor.device).eval()
        return self._blind[temperature]

    def parts(self, settings: SamplingSettings) -> Parts:
        """The parts that are drawn by thresholds of their own: one around each of the objects that there may be, by the
        stock model's probabilities under the settings' temperature."""
        if settings.dependence == 1:
            return WHOLE
        temperature = settings.temperature
        if temperature not in self._parts:
            foreground = torch.empty(self.shape[1:], device=self.device)
            for z in chunks(self.shape):
                p = self.probabilities_at(self.start_logits, z, temperature)
                foreground[z] = p.amax(0) if self.refiner.regions else 1 - p[0]
            self._parts[temperature] = parts_around(objects_in(foreground))
        return self._parts[temperature]

    def sample(self, settings: SamplingSettings, sample: int, samples: int | None) -> Callable[[slice], Tensor]:
        """What sample number `sample` of `samples` (None: one that depends on no other, under one mirroring) is drawn
        from: slices -> probabilities (C, slices, Y, X) float32."""
        if settings.samples_from == 'blind':
            blind = self.blind_logits(settings.blind_temperature)
            return lambda z: self.probabilities_at(blind, z)
        if settings.samples_from == 'stock' or settings.start == 0:
            return lambda z: self.probabilities_at(self.stock_logits, z, settings.temperature)
        mirrored = self.mirrorings_of(sample, samples)
        noise = volume_noise(self.shape, settings.seed, sample, self.device, self.slice_correlation)
        parts, start_logits = self.parts(settings), self.start_logits
        shifts = self.refiner.start_shifts(settings, sample, samples, parts.number)
        x = refine_volume(
            lambda x, level: self.denoise(x, level, mirrored),
            lambda z: self.refiner.chain(settings, sample, samples, parts.at(z), parts.number),
            lambda z: self.refiner.start_mask(start_logits[:, z], settings, shifts, parts.at(z)),
            self.shape, self.device, self.refiner.table.chain(settings.start, settings.steps), noise)
        return lambda z: self.refiner.probabilities(x[None, :, z])[0]

    def sample_volume(self, settings: SamplingSettings, sample: int, samples: int | None) -> Tensor:
        """`sample` of all slices, (C, Z, Y, X) float32."""
        at = self.sample(settings, sample, samples)
        p = torch.empty(self.shape, device=self.device)
        for z in chunks(self.shape):
            p[:, z] = at(z)
        return p

    def denoise(self, x: Tensor, level: float, mirrored: Sequence[tuple[int, ...]]) -> Iterator[SliceValues]:
        """Estimate of the clean coded mask, fused over tiles and mirrorings, see `fuse_tiles`."""
        return fuse_tiles(self._denoised_tiles(x, level, mirrored), self.shape, self.weight, self.device)

    def probabilities_at(self, logits: Tensor, z: slice, temperature: float = 1.0) -> Tensor:
        """Probabilities (C, slices, Y, X) float32 of some slices of logits (C, Z, Y, X), over a temperature."""
        return logits_to_probabilities(logits[None, :, z].float() / temperature, self.refiner.regions)[0]

    def _denoised_tiles(self, x: Tensor, level: float, mirrored: Sequence[tuple[int, ...]]
                        ) -> Iterator[tuple[Tile, Tensor]]:
        """Tiles, and the estimate (C, ...) in them, under each mirroring, as many at a time as memory allows."""
        left = [(tile, axes) for tile in self.tiles for axes in mirrored]
        while left:
            batch = left[:self.predictor.tile_batch]
            try:
                estimates = self._denoise_tiles(x, level, batch)
            except RuntimeError as error:
                if len(batch) == 1 or not lacks_memory(error):
                    raise
                self.predictor.tile_batch = len(batch) // 2
                logger.warning('The memory is not enough for %d tiles at a time: from now on %d.', len(batch),
                               self.predictor.tile_batch)
                continue
            del left[:len(batch)]
            yield from zip((tile for tile, _ in batch), estimates, strict=True)

    def _denoise_tiles(self, x: Tensor, level: float, batch: Sequence[tuple[Tile, tuple[int, ...]]]) -> list[Tensor]:
        """The denoiser's estimates (C, ...) in tiles under mirrorings, mirrored back."""
        def stacked(select: Callable[[Tile], Tensor]) -> Tensor:
            return torch.stack([select(tile).flip([axis + 1 for axis in axes])
                                for tile, axes in batch]).to(self.predictor.device)
        with self.predictor.autocast():
            image, masks = stacked(lambda tile: self.image[tile]), stacked(lambda tile: x[tile])
            estimates = self.refiner.denoise(image, masks, level)
        self.network_calls['denoiser'] += len(batch)
        self.progress.update(len(batch))
        return [estimate.flip([axis + 1 for axis in axes])
                for estimate, (_, axes) in zip(estimates, batch, strict=True)]
