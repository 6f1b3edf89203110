"""Numbers and names in sentences."""
from __future__ import annotations

import math
from collections.abc import Sequence


def in_percent(level: float) -> str:
    """A level for reading, never more than it is: '94 %' for 18 / 19."""
    return f'{math.floor(100 * level + 1e-6)} %'


def abbreviated(names: Sequence[str], shown: int = 3) -> str:
    """The first of some names."""
    return ', '.join(names[:shown]) + (', ...' if len(names) > shown else '')
