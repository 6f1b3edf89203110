"""How good an order of cases is: areas under the risk-coverage curve, and how soon failures come."""
from __future__ import annotations

import numpy as np

from nnunet_pdddpm.evaluation.calibration import area_under_risk_coverage


def aurc(score: np.ndarray, dice: np.ndarray) -> float:
    """Area under the curve of the mean risk 1 - Dice of the cases kept against their share (Zenk et al. 2024, arXiv
    2406.03323): cases with a high score (n,) are kept longest, cases with equal scores in every order.
    """
    return area_under_risk_coverage(-score, 1 - dice)


def normalised_aurc(score: np.ndarray, dice: np.ndarray) -> float:
    """AURC beyond that of the best order, over that of a random one: 0 for the best order, 1 for one at random."""
    best = aurc(dice, dice)
    room = float((1 - dice).mean()) - best
    return (aurc(score, dice) - best) / room if room > 0 else 0.0


def failures_found(score: np.ndarray, dice: np.ndarray, failed: float, share: float) -> float:
    """Share of the failures, cases with a Dice below `failed`, that is in the first `share` of the list, lowest score
    first."""
    first = np.argsort(score, kind='stable')[:round(share * len(score))]
    return float((dice[first] < failed).sum() / max((dice < failed).sum(), 1))
