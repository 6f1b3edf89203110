"""A padded image and the model that is loaded: the stock pre-segmentation and samples of the whole volume."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor
from tqdm import tqdm

from nnunet_pdddpm.diffusion.coding import harden, logits_to_probabilities
from nnunet_pdddpm.diffusion.schedule import truncated_levels
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.tiling import Tile, tiles_around, unsure_voxels
from nnunet_pdddpm.inference.volume_sampling import (
    fuse_tiles,
    mirrorings,
    mirrorings_of_sample,
    refine_volume,
    volume_noise,
)
from nnunet_pdddpm.network.settings import SamplingSettings

if TYPE_CHECKING:
    from nnunet_pdddpm.inference.volume_predictor import VolumePredictor


@dataclass
class VolumePrediction:
    """What is known of one preprocessed image, in its own grid (before resampling to the original image)."""
    presegmentation: Tensor
    """Stock logits (C, Z, Y, X) float16, mean over folds: what stock nnU-Net predicts."""
    logits: Tensor
    """Logits (C, Z, Y, X) of the consensus mask, on the CPU."""
    spread: Spread
    """Of the samples, without padding."""
    network_calls: dict[str, int]
    """Forward passes of a tile (in 2d, of a tile of a slice): stock and denoiser."""
    refined_tiles: float
    """Share of nnU-Net's tiles that were denoised: those around voxels of which the stock model is unsure."""
    seconds: float
    """Wall clock time of all this."""


class Volume:
    """One padded image, and the model that is loaded at the time: pre-segments it and draws samples of it."""

    def __init__(self, predictor: VolumePredictor, image: Tensor, device: torch.device) -> None:
        """`image`: (image channels, Z, Y, X), not smaller than a tile; `device`: of the volume's arrays."""
        self.predictor, self.refiner, self.device = predictor, predictor.refiner, device
        self.image = image.to(device)
        self.all_tiles: list[Tile] = predictor._internal_get_sliding_window_slicers(image.shape[1:])
        self.shape = (predictor.label_manager.num_segmentation_heads, *image.shape[1:])
        patch_size = tuple(predictor.configuration_manager.patch_size)
        self.weight = compute_gaussian(patch_size, value_scaling_factor=10, dtype=torch.float32, device=device) \
            if predictor.use_gaussian else torch.ones(patch_size, device=device)
        self.mirrorings = mirrorings(predictor.allowed_mirroring_axes if predictor.use_mirroring else None)
        self.slice_correlation = predictor.slice_correlation if len(patch_size) == 2 else 0.0
        self.progress = tqdm(desc='Sampling', total=0, disable=not predictor.allow_tqdm)
        self.network_calls = {'stock': 0, 'denoiser': 0}
        self.tiles: list[Tile] = []  # that are refined
        self.refined_tiles: list[float] = []  # their share, by fold

    def start_fold(self) -> Tensor:
        """Pre-segment by the model that has just been loaded; its stock logits (C, Z, Y, X) float16 on the CPU."""
        with self.predictor.presegmenting():
            self.stock_logits = self.predictor.predict_sliding_window_return_logits(self.image).to(self.device)
        self.network_calls['stock'] += len(self.all_tiles) * len(self.mirrorings)
        self.refiner.to(self.predictor.device).eval()
        self.mask = torch.empty(self.shape, dtype=torch.uint8, device=self.device)
        for z in range(self.shape[1]):
            self.mask[:, z] = harden(self.stock_logits[None, :, z], self.refiner.regions)[0]
        self._choose_tiles()
        return self.stock_logits.cpu()

    def _choose_tiles(self) -> None:
        unsure = unsure_voxels(self.stock_logits, self.refiner.regions, self.predictor.sure)
        self.tiles = tiles_around(unsure, self.predictor.configuration_manager.patch_size,
                                  self.predictor._internal_get_sliding_window_slicers)
        self.refined_tiles.append(len(self.tiles) / len(self.all_tiles))
        covered = torch.zeros(self.shape[1:], dtype=torch.bool, device=self.device)
        for tile in self.tiles:
            covered[tile[1:]] = True
        self.elsewhere = None if bool(covered.all()) else self._coded_stock

    def expect(self, settings: SamplingSettings, draws: Sequence[int], of: int) -> None:
        """Tell the progress bar that draws with these numbers, of so many, are to come."""
        passes = sum(len(mirrorings_of_sample(draw, of, self.mirrorings)) for draw in draws)
        self.progress.total += passes * max(settings.steps, 1) * len(self.tiles)
        self.progress.refresh()

    def sample(self, settings: SamplingSettings, sample: int, samples: int) -> Tensor:
        """Probabilities (C, Z, Y, X) float32 of sample number `sample` of `samples`."""
        if settings.t_start == 0 or not self.tiles:
            return self.add_stock(torch.zeros(self.shape, device=self.device), 1.0)
        mirrored = mirrorings_of_sample(sample, samples, self.mirrorings)
        coding = self.refiner.design.coding
        noise = volume_noise(self.shape, settings.seed, sample, self.device, self.slice_correlation)
        if settings.steps == 0:
            x = self.denoise(coding.encode(self.mask), 0, mirrored)
        else:
            x = refine_volume(lambda x, t: self.denoise(x, t, mirrored), self.refiner.chain(settings, sample, samples),
                              self.mask, coding, truncated_levels(settings.t_start, settings.steps), noise)
        for z in range(self.shape[1]):
            x[:, z] = self.refiner.probabilities(x[None, :, z])[0]
        return x

    def denoise(self, x: Tensor, t: int, mirrored: Sequence[tuple[int, ...]]) -> Tensor:
        """Estimate of the clean coded mask (C, Z, Y, X), fused over tiles and mirrorings; outside them the stock's."""
        return fuse_tiles(self._of_tiles(x, t, mirrored), self.shape, self.weight, self.device, self.elsewhere)

    def _coded_stock(self, z: int) -> Tensor:
        p = logits_to_probabilities(self.stock_logits[None, :, z], self.refiner.regions)[0]
        return self.refiner.design.coding.encode(p)

    def _of_tiles(self, x: Tensor, t: int, mirrored: Sequence[tuple[int, ...]]) -> Iterator[tuple[Tile, Tensor]]:
        """Tiles, and the estimate (C, ...) in them, under each mirroring, as many at a time as memory allows."""
        left = [(tile, axes) for tile in self.tiles for axes in mirrored]
        while left:
            batch = left[:self.predictor.tile_batch]
            try:
                estimates = self._denoise_tiles(x, t, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self.predictor.tile_batch = len(batch) // 2
                print(f'The memory is not enough for {len(batch)} tiles at a time: from now on '
                      f'{self.predictor.tile_batch}.')
                continue
            del left[:len(batch)]
            yield from zip((tile for tile, _ in batch), estimates, strict=True)

    def _denoise_tiles(self, x: Tensor, t: int, batch: Sequence[tuple[Tile, tuple[int, ...]]]) -> list[Tensor]:
        """The denoiser's estimates (C, ...) in tiles under mirrorings, mirrored back."""
        def stacked(of_tile: Callable[[Tile], Tensor]) -> Tensor:
            return torch.stack([of_tile(tile).flip([axis + 1 for axis in axes])
                                for tile, axes in batch]).to(self.predictor.device)
        condition = None
        if self.refiner.design.condition_on_presegmentation:
            condition = stacked(lambda tile: logits_to_probabilities(self.stock_logits[tile][None],
                                                                     self.refiner.regions)[0])
        with self.predictor.autocast():
            estimates = self.refiner.denoise(stacked(lambda tile: self.image[tile]), stacked(lambda tile: x[tile]), t,
                                             condition)
        self.network_calls['denoiser'] += len(batch)
        self.progress.update(len(batch))
        return [estimate.flip([axis + 1 for axis in axes])
                for estimate, (_, axes) in zip(estimates, batch, strict=True)]

    def add_stock(self, total: Tensor, weight: float) -> Tensor:
        """Add the stock model's probabilities with a weight to `total` (C, Z, Y, X), in place."""
        for z in range(self.shape[1]):
            p = logits_to_probabilities(self.stock_logits[None, :, z], self.refiner.regions)[0]
            total[:, z] += weight * p.to(self.device)
        return total
