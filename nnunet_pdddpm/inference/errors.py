"""What a prediction raises."""
from __future__ import annotations

NNUNET_INF_ERROR = 'Encountered inf in predicted array'
"""nnU-Net's words for logits of the stock model that are beyond its half precision."""


class PredictionError(ValueError):
    """What was asked for cannot be predicted: the message says why and what to do."""


class CasesFailed(PredictionError):
    """Some cases could not be predicted, and all others are done."""


class UnusableLogits(ArithmeticError):
    """A network gave NaN or infinite values for an image: no mask can be made of them."""
