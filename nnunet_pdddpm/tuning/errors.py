"""What the tuning raises."""
from __future__ import annotations


class TuningError(ValueError):
    """Nothing can be tuned: the message says why and what to do."""
