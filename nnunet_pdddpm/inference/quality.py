"""Features of a predicted label that may tell how good its mask is, in the network's grid."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from scipy import ndimage
from scipy.special import entr
from torch import Tensor

from nnunet_pdddpm.diffusion.drawing import hard_mask
from nnunet_pdddpm.inference.chunks import in_chunks, inside
from nnunet_pdddpm.inference.counting import VoxelCounter
from nnunet_pdddpm.inference.spread import UNCERTAIN, Spread

FEATURES = ('expected', 'samples', 'stock', 'entropy', 'certainty', 'surface', 'volume', 'components', 'brightness',
            'contrast', 'roughness')
"""Of a label in a case, see `label_features`."""
SMALLEST_DICE = 0.01
HIGH = 0.9
"""Quantile of the probability in a mask: how sure its core is."""


@dataclass(frozen=True)
class LabelQuality:
    """What tells how good a label's mask is in one case."""
    features: np.ndarray | None
    """(FEATURES,); None if neither the mask nor any sample has the label, or for several models, or a single sample."""
    folds_dice: float | None
    """Of several models: Dice between their masks. None for one model, and if no mask has the label."""


def logit(dice: float | np.ndarray) -> np.ndarray:
    """Logit of a Dice, clipped to 0.01 to 0.99."""
    p = np.clip(dice, SMALLEST_DICE, 1 - SMALLEST_DICE)
    return np.log(p / (1 - p))


def mask_dice(one: np.ndarray, other: np.ndarray) -> float:
    """Dice of two masks; 1 if both are empty."""
    size = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / size if size else 1.0


def label_features(mask: np.ndarray, p: np.ndarray, image: np.ndarray, stock: np.ndarray, expected: float,
                   samples: float) -> np.ndarray:
    """Features of one label.

    Args:
        mask: (Z, Y, X) bool.
        p: its mean probabilities (Z, Y, X).
        image: (image channels, Z, Y, X), as the networks get it.
        stock: (Z, Y, X) bool, the stock model's mask without mirroring.
        expected: estimated Dice of the mask by p, see `Spread.estimated_dice`.
        samples: Dice between the samples.

    Returns:
        (FEATURES,): logits of `expected`, of `samples` and of the Dice of mask and stock mask; mean entropy in [0, 1]
        of voxels that may belong to the label; upper quantile of their probability in the mask; share of the mask's
        outermost voxels that are uncertain; logarithm of 1 + voxels and of 1 + components; mean and standard deviation
        of the image in the mask, and mean difference of neighbouring voxels around it, each the mean over the channels.
    """
    possible = (p > UNCERTAIN[0]) | mask
    if not possible.any():
        possible.flat[int(p.argmax())] = True
    box, = ndimage.find_objects(possible.astype(np.uint8))
    size, stock_size = int(mask.sum()), int(stock.sum())
    possible, mask, p, image = possible[box], mask[box], p[box], image[:, box[0], box[1], box[2]]
    both = 2 * int((mask & stock[box]).sum()) / (size + stock_size) if size + stock_size else 1.0
    entropy = (entr(p[possible]) + entr(1 - p[possible])) / np.log(2)
    inside_of = image[:, mask] if size else image[:, possible]
    return np.array([
        logit(expected), logit(samples), logit(both), entropy.mean(),
        np.quantile(p[mask] if size else p[possible], HIGH), uncertain_surface(mask, p), np.log1p(size),
        np.log1p(ndimage.label(mask, np.ones((3, 3, 3)))[1]),
        inside_of.mean(), inside_of.std(1).mean(), roughness(image)], np.float64)


def uncertain_surface(mask: np.ndarray, p: np.ndarray) -> float:
    """Share of the outermost voxels of a mask (Z, Y, X) whose probability is uncertain; 1 if it is empty."""
    neighbours = ndimage.generate_binary_structure(3, 1)
    if mask.shape[0] == 1:  # a single slice has no surface above and below
        neighbours = neighbours[1:2]
    surface = mask & ~ndimage.binary_erosion(mask, neighbours)
    probabilities = p[surface]
    low, high = UNCERTAIN
    return float(((probabilities > low) & (probabilities < high)).mean()) if len(probabilities) else 1.0


def roughness(image: np.ndarray) -> float:
    """Mean absolute difference of neighbouring voxels of (channels, Z, Y, X), over channels and axes."""
    steps = [np.abs(np.diff(image, axis=axis)).mean() for axis in (1, 2, 3) if image.shape[axis] > 1]
    return float(np.mean(steps)) if steps else 0.0


def dice_of_pairs(masks: Sequence[np.ndarray]) -> float | None:
    """Dice between masks (Z, Y, X) bool, intersections and sizes summed over all pairs; None if all are empty."""
    pairs = list(combinations(masks, 2))
    size = sum(int(one.sum()) + int(other.sum()) for one, other in pairs)
    return 2 * sum(int((one & other).sum()) for one, other in pairs) / size if size else None


def predicted_labels(logits: Iterable[tuple[slice, Tensor]], counter: VoxelCounter, box: tuple[slice, ...]
                     ) -> np.ndarray:
    """nnU-Net's labels (Z, Y, X) uint16 of a volume without padding.

    Args:
        logits: slices of the padded volume, and logits (C, slices, Y, X) in them.
        counter: that knows nnU-Net's rule.
        box: (Z, Y, X) of the volume without padding.
    """
    whole = _nothing(box)
    for z, values in logits:
        _put_labels(whole, z, values, counter, box)
    return whole


def _nothing(box: tuple[slice, ...]) -> np.ndarray:
    return np.zeros([side.stop - side.start for side in box], np.uint16)


def _put_labels(whole: np.ndarray, z: slice, logits: Tensor, counter: VoxelCounter, box: tuple[slice, ...]) -> None:
    (here, there), (_, y, x) = inside(z, box[0]), box
    mask = hard_mask(logits[:, here, y, x], counter.manager.has_regions)
    whole[there] = counter.label_map(mask).cpu().numpy()


class Qualities(Mapping[str, LabelQuality]):
    """Label -> its quality, computed when asked for: with many labels that takes long, and few rankings need it."""

    def __init__(self, counter: VoxelCounter, image: np.ndarray, logits: Tensor, spread: Spread,
                 stock: np.ndarray | None, fold_masks: Sequence[np.ndarray]) -> None:
        """
        Args:
            counter: of the volume.
            image: (image channels, Z, Y, X), as the networks get it.
            logits: of the mask (C, Z, Y, X), without padding.
            spread: of the samples, without padding.
            stock: labels (Z, Y, X) of the stock model's mask, without mirroring; None for several models or one sample.
            fold_masks: labels (Z, Y, X) of each model's mask, if there are several.
        """
        self.counter, self.image, self.logits, self.spread = counter, image, logits, spread
        self.stock, self.fold_masks = stock, fold_masks
        self._found: dict[str, LabelQuality] = {}

    def __getitem__(self, name: str) -> LabelQuality:
        if name not in self._found:
            self._found[name] = LabelQuality(self._features(name), self._folds_dice(name))
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.counter.labels)

    def __len__(self) -> int:
        return len(self.counter.labels)

    @cached_property
    def expected(self) -> list[float | None]:
        """Estimated Dice of each channel, see `Spread.estimated_dice`."""
        return self.spread.estimated_dice(self.logits)

    @cached_property
    def _mask(self) -> np.ndarray:
        """Labels (Z, Y, X)."""
        return predicted_labels(in_chunks(self.logits), self.counter, tuple(slice(0, n) for n in self.logits.shape[1:]))

    def _features(self, name: str) -> np.ndarray | None:
        if self.stock is None:
            return None
        manager, values = self.counter.manager, self.counter.labels[name]
        channel = list(self.counter.labels).index(name) if manager.has_regions else manager.all_labels.index(values[0])
        expected, samples = self.expected[channel], self.spread.pairwise_dice(channel)
        if expected is None:
            return None
        return label_features(np.isin(self._mask, values), self.spread.mean[channel].cpu().numpy(), self.image,
                              np.isin(self.stock, values), expected, 0.0 if samples is None else samples)

    def _folds_dice(self, name: str) -> float | None:
        return dice_of_pairs([np.isin(mask, self.counter.labels[name]) for mask in self.fold_masks])


class QualityMeter:
    """Keeps, while a volume is predicted, what the quality of its labels needs and what would be gone afterwards."""

    def __init__(self, counter: VoxelCounter, box: tuple[slice, ...], several: bool) -> None:
        """
        Args:
            counter: of the volume.
            box: (Z, Y, X) of the volume without padding.
            several: whether several models predict.
        """
        self.counter, self.box, self.several = counter, box, several
        self.stock: np.ndarray | None = None
        self.fold_masks: list[np.ndarray] = []
        """Labels (Z, Y, X) of each of several models' masks."""

    def set_stock(self, logits: Tensor) -> None:
        """The stock model's logits (C, Z, Y, X), padded, without mirroring."""
        self.stock = predicted_labels(in_chunks(logits), self.counter, self.box)

    def record_fold_masks(self, logits: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
        """The same slices and logits, of one model's mask. If several models predict, its labels are kept."""
        whole = _nothing(self.box) if self.several else None
        for z, values in logits:
            if whole is not None:
                _put_labels(whole, z, values, self.counter, self.box)
            yield z, values
        if whole is not None:
            self.fold_masks.append(whole)

    def qualities(self, image: np.ndarray, logits: Tensor, spread: Spread) -> Qualities:
        """Label -> its quality."""
        return Qualities(self.counter, image, logits, spread, self.stock, self.fold_masks)
