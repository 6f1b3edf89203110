"""What of a sweep fits into a given time: expensive settings are left out first, cases next."""
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


def plan(settings: Sequence[SamplingSettings], voxels: Sequence[int], cost: Cost, seconds: float
         ) -> tuple[list[SamplingSettings], list[int]]:
    """What can be measured in a given time.

    Args:
        settings: all candidates.
        voxels: size of each case.
        cost: measured.
        seconds: for everything.

    Returns:
        The settings, and the indices of the cases: all of them while there are settings with several steps to leave
        out, then fewer, spread evenly, the first among them. Both are empty if single steps on FEWEST_CASES (or on all
        cases, if they are fewer) take longer.
    """
    kept, cases = list(settings), list(range(len(voxels)))

    def fits() -> bool:
        return cost.of(kept, [voxels[i] for i in cases]) <= seconds
    while not fits() and (most := max((s.steps, s.eta) for s in kept))[0] > 1:
        if all((s.steps, s.eta) == most for s in kept):
            return [], []
        kept = [s for s in kept if (s.steps, s.eta) != most]
    while not fits() and len(cases) > FEWEST_CASES:
        cases = np.linspace(0, len(voxels) - 1, len(cases) - 1).round().astype(int).tolist()
    return (kept, cases) if fits() else ([], [])
