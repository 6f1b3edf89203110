"""A padded image and the model that is loaded: the stock pre-segmentation and samples of the whole volume."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from torch import Tensor
from tqdm import tqdm

from nnunet_pdddpm.diffusion.coding import harden, logits_to_probabilities
from nnunet_pdddpm.diffusion.schedule import truncated_levels
from nnunet_pdddpm.inference.spread import Spread
from nnunet_pdddpm.inference.volume_sampling import (
    Tile,
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
    seconds: float
    """Wall clock time of all this."""


class Volume:
    """One padded image, and the model that is loaded at the time: pre-segments it and draws samples of it."""

    def __init__(self, predictor: VolumePredictor, image: Tensor, device: torch.device) -> None:
        """`image`: (image channels, Z, Y, X), not smaller than a tile; `device`: of the volume's arrays."""
        self.predictor, self.refiner, self.device = predictor, predictor.refiner, device
        self.image = image.to(device)
        self.tiles: list[Tile] = predictor._internal_get_sliding_window_slicers(image.shape[1:])
        self.shape = (predictor.label_manager.num_segmentation_heads, *image.shape[1:])
        patch_size = tuple(predictor.configuration_manager.patch_size)
        self.weight = compute_gaussian(patch_size, value_scaling_factor=10, dtype=torch.float32, device=device) \
            if predictor.use_gaussian else torch.ones(patch_size, device=device)
        self.mirrorings = mirrorings(predictor.allowed_mirroring_axes if predictor.use_mirroring else None)
        self.slice_correlation = predictor.slice_correlation if len(patch_size) == 2 else 0.0
        self.progress = tqdm(desc='Sampling', total=0, disable=not predictor.allow_tqdm)
        self.network_calls = {'stock': 0, 'denoiser': 0}

    def start_fold(self) -> Tensor:
        """Pre-segment by the model that has just been loaded; its stock logits (C, Z, Y, X) float16 on the CPU."""
        with self.predictor.presegmenting():
            self.stock_logits = self.predictor.predict_sliding_window_return_logits(self.image).to(self.device)
        self.network_calls['stock'] += len(self.tiles) * len(self.mirrorings)
        self.refiner.to(self.predictor.device).eval()
        self.mask = torch.empty(self.shape, dtype=torch.uint8, device=self.device)
        for z in range(self.shape[1]):
            self.mask[:, z] = harden(self.stock_logits[None, :, z], self.refiner.regions)[0]
        return self.stock_logits.cpu()

    def expect(self, passes: int) -> None:
        """Tell the progress bar how many passes over the volume are to come."""
        self.progress.total += passes * len(self.tiles)
        self.progress.refresh()

    def sample(self, settings: SamplingSettings, sample: int, samples: int) -> Tensor:
        """Probabilities (C, Z, Y, X) float32 of sample number `sample` of `samples`."""
        if settings.t_start == 0:
            return self.add_stock(torch.zeros(self.shape, device=self.device), 1.0)
        mirrored = mirrorings_of_sample(sample, samples, self.mirrorings)
        coding = self.refiner.design.coding
        noise = volume_noise(self.shape, settings.seed, sample, self.device, self.slice_correlation)
        if settings.steps == 0:
            x = self.denoise(coding.encode(self.mask), 0, mirrored)
        else:
            x = refine_volume(lambda x, t: self.denoise(x, t, mirrored), self.refiner.process(settings.eta), self.mask,
                              coding, truncated_levels(settings.t_start, settings.steps), noise)
        for z in range(self.shape[1]):
            x[:, z] = self.refiner.probabilities(x[None, :, z])[0]
        return x

    def denoise(self, x: Tensor, t: int, mirrored: list[tuple[int, ...]]) -> Tensor:
        """Estimate of the clean coded mask (C, Z, Y, X), fused over the tiles."""
        return fuse_tiles(lambda tile: self.denoise_tile(x, t, tile, mirrored), self.shape, self.tiles, self.weight,
                          self.device)

    def denoise_tile(self, x: Tensor, t: int, tile: Tile, mirrored: list[tuple[int, ...]]) -> Tensor:
        """Estimate of the clean coded mask (C, ...) in a tile, mean over some mirrorings."""
        device = self.predictor.device
        parts = [self.image[tile], x[tile]]
        if self.refiner.design.condition_on_presegmentation:
            parts.append(logits_to_probabilities(self.stock_logits[tile][None], self.refiner.regions)[0])
        image, noisy, *conditions = (part[None].to(device) for part in parts)
        total = torch.zeros_like(noisy)
        with self.predictor.autocast():
            for axes in mirrored:
                dims = [axis + 2 for axis in axes]
                condition = conditions[0].flip(dims) if conditions else None
                total += self.refiner.denoise(image.flip(dims), noisy.flip(dims), t, condition).flip(dims)
        self.network_calls['denoiser'] += len(mirrored)
        self.progress.update()
        return total[0] / len(mirrored)

    def add_stock(self, total: Tensor, weight: float) -> Tensor:
        """Add the stock model's probabilities with a weight to `total` (C, Z, Y, X), in place."""
        for z in range(self.shape[1]):
            p = logits_to_probabilities(self.stock_logits[None, :, z], self.refiner.regions)[0]
            total[:, z] += weight * p.to(self.device)
        return total
