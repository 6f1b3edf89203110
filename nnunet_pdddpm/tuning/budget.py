"""What of a sweep fits into a given time."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_pdddpm.network.settings import SamplingSettings

FEWEST_CASES = 5


@dataclass(frozen=True)
class Cost:
    """Seconds that a case takes for each voxel, measured on the first case."""
    presegmentation: float
    network_pass: float
    """One pass of the denoiser over the volume, under one mirroring, with its share of what is measured on it."""
    mirrorings: int
    """Number of them, which are spread over the samples of a setting."""

    def of(self, settings: Sequence[SamplingSettings], voxels: Sequence[int]) -> float:
        """Seconds of all these settings on cases of these sizes; first steps are shared, see `sweep`."""
        starts = {(s.t_start, s.samples) for s in settings}
        passes = sum(max(samples, self.mirrorings) for _, samples in starts)
        passes += sum(max(s.samples, self.mirrorings) * max(s.steps - 1, 0) for s in settings)
        return sum(voxels) * (self.presegmentation + self.network_pass * passes)


def cases_in(seconds: float, rounds: Sequence[Sequence[SamplingSettings]], voxels: Sequence[int], cost: Cost
             ) -> list[int]:
    """Indices of the cases on which there is time for all settings.

    Args:
        seconds: for everything.
        rounds: settings to be measured, each list with a pre-segmentation of its own.
        voxels: size of each case.
        cost: measured.

    Returns:
        All of them or fewer, spread evenly, the first among them; none if FEWEST_CASES (or all, if they are fewer) take
        longer.
    """
    for number in range(len(voxels), min(FEWEST_CASES, len(voxels)) - 1, -1):
        cases = np.linspace(0, len(voxels) - 1, number).round().astype(int).tolist()
        if sum(cost.of(settings, [voxels[i] for i in cases]) for settings in rounds) <= seconds:
            return cases
    return []


def settings_in(seconds: float, settings: Sequence[SamplingSettings], voxels: Sequence[int], cost: Cost
                ) -> list[SamplingSettings]:
    """The settings for which there is time on all cases: those with the most steps are left out first.

    Arguments as `cases_in` has them, of one round.
    """
    kept = list(settings)
    while kept and cost.of(kept, voxels) > seconds:
        most = max((s.steps, s.way) for s in kept)
        kept = [s for s in kept if (s.steps, s.way) != most]
    return kept
