"""How many validation cases can be measured within a given time."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MIN_TUNING_CASES = 5


def enough_cases(cases: int, available: int) -> bool:
    """Whether this many of the available validation cases are enough to measure on: MIN_TUNING_CASES, or all."""
    return cases >= min(MIN_TUNING_CASES, available)


def cases_within_budget(seconds: float, seconds_a_voxel: float, voxels: Sequence[int]) -> list[int]:
    """Indices of the cases on which there is time for everything.

    Args:
        seconds: for everything.
        seconds_a_voxel: that a case takes for each voxel.
        voxels: size of each case.

    Returns:
        All of them or fewer, spread evenly, the first among them; none if as few as are `enough_cases` take longer.
    """
    for number in (number for number in range(len(voxels), 0, -1) if enough_cases(number, len(voxels))):
        cases = np.linspace(0, len(voxels) - 1, number).round().astype(int).tolist()
        if seconds_a_voxel * sum(voxels[i] for i in cases) <= seconds:
            return cases
    return []
