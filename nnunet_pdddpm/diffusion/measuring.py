"""How much each noise level leaves undecided, measured while the denoiser trains, and training levels drawn by it."""
from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from nnunet_pdddpm.diffusion.levels import HIGHEST, LevelTable, even_table

NODES = 41
UNIFORM = 0.15
"""Share of the training levels that is drawn evenly in log SNR, whatever has been measured."""
BLANK = 2.0
"""Up to this far above the lowest log SNR nothing can be told apart: `lowest_log_snr`."""
MIN_WINDOW, MAX_WINDOW = 10, 500
"""Length of a node's running mean in patches, at least and at most; between them a quarter of the patches seen."""
SMOOTHING = 0.7
"""Standard deviation in nodes over which the means are smoothed."""
GOLDEN = (5 ** 0.5 - 1) / 2


class LevelMeter:
    """Running cross-entropy of the denoiser in NODES bins of log SNR.

    Its state is two vectors, `cross_entropy` (nats, any scale) and `count` (patches seen), both (NODES,) float32 on the
    CPU.
    """

    def __init__(self, lowest: float) -> None:
        """`lowest`: log SNR of the first node, see `lowest_log_snr`."""
        self.log_snr = torch.linspace(lowest, HIGHEST, NODES)
        self.cross_entropy, self.count = torch.zeros(NODES), torch.zeros(NODES)

    def restore(self, cross_entropy: Tensor, count: Tensor) -> None:
        """Go on from a stored state."""
        self.cross_entropy, self.count = cross_entropy.detach().cpu().clone(), count.detach().cpu().clone()

    def sums(self, log_snr: Tensor, cross_entropy: Tensor) -> Tensor:
        """What patches add to the nodes: (2, NODES), summed cross-entropy and number; those of several ranks can be
        added.

        Args:
            log_snr: (B,) of noisy patches.
            cross_entropy: (B,) mean over their voxels; one that is not finite is left out.
        """
        known = torch.isfinite(cross_entropy)
        step = float(self.log_snr[1] - self.log_snr[0])
        node = ((log_snr[known] - self.log_snr[0]) / step).round().long().clamp(0, NODES - 1)
        sums = torch.zeros(2, NODES)
        sums[0].index_add_(0, node, cross_entropy[known].float())
        sums[1].index_add_(0, node, torch.ones(len(node)))
        return sums

    def update(self, sums: Tensor) -> None:
        """Move the running means by what `sums` gave, of all ranks together."""
        total, number = sums
        self.count += number
        reach = (self.count / 4).clamp(MIN_WINDOW, MAX_WINDOW).minimum(self.count.clamp(min=1))
        weight = (number / reach).clamp(max=1)
        self.cross_entropy += weight * (total / number.clamp(min=1) - self.cross_entropy)

    def table(self) -> LevelTable:
        """u at the nodes: the running cross-entropy made monotone, from 1 at the first node to 0 at the last.

        Isotonic regression of the means, smoothed and weighted by what they rest on. Where nothing can be told apart
        they are one: `BLANK`. A thousandth of an even table is mixed in, so that u falls strictly. The even table
        itself until half of the nodes have been met.
        """
        log_snr = self.log_snr.double().numpy()
        seen = self.count.numpy() > 0
        if seen.sum() < NODES / 2:
            return even_table(float(log_snr[0]), NODES)
        weights = np.clip(self.count.double().numpy() / 4, 0.01, MAX_WINDOW)
        values = self.cross_entropy.double().numpy()
        blank = log_snr <= log_snr[0] + BLANK
        values[blank] = np.average(values[blank], weights=weights[blank])
        smooth_sums, smooth_weights = (gaussian_filter1d(array, SMOOTHING, mode='nearest')
                                       for array in (values * weights, weights))
        smooth = smooth_sums / smooth_weights
        falling = isotonic_regression(smooth, sample_weight=weights, increasing=False)
        spread = falling[0] - falling[-1]
        if not spread > 0:
            return even_table(float(log_snr[0]), NODES)
        share = 0.999 * (falling - falling[-1]) / spread + 0.001 * np.linspace(1, 0, NODES)
        share = share.astype(np.float32)  # as a model stores it
        share[0], share[-1] = 1, 0
        return LevelTable(tuple(log_snr.tolist()), tuple(share.tolist()))


def training_levels(table: LevelTable, positions: Tensor) -> Tensor:
    """Log SNRs of training patches: even in u but for a share UNIFORM that is even in log SNR.

    Args:
        table: measured so far.
        positions: (B,) in [0, 1), evenly spread over the patches, see `kronecker_sequence`.

    Returns:
        (B,) float32.
    """
    log_snr = np.array(table.log_snr)
    even = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
    below = (1 - UNIFORM) * (1 - np.array(table.share)) + UNIFORM * even  # cumulative, from pure noise on
    return torch.from_numpy(np.interp(positions.double().numpy(), below, log_snr)).float()


def kronecker_sequence(first: int, number: int, offset: float) -> Tensor:
    """Members `first` to `first + number - 1` of a Kronecker sequence of the golden ratio, (number,) in [0, 1).

    They fill the interval evenly, within a batch and from step to step.

    Args:
        first: how many were taken before.
        number: how many are wanted.
        offset: in [0, 1), where the sequence starts.
    """
    return ((torch.arange(first, first + number).double() * GOLDEN + offset) % 1)
