"""One temperature for a network's probabilities, fitted on validation cases (Guo et al. 2017, arXiv 1706.04599)."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.tuning.scores import Truth

GRID = np.exp(np.linspace(np.log(0.5), np.log(8), 17))
"""Temperatures at which the likelihood is measured; between them it is interpolated."""


def likelihoods(logits: Tensor, truth: Truth, regions: bool) -> np.ndarray:
    """(len(GRID),) negative log-likelihood in nats a voxel of a case, at each temperature.

    Args:
        logits: (C, Z, Y, X).
        truth: of the same grid.
        regions: whether the channels are regions.
    """
    return np.array([truth.nll(logits_to_probabilities(logits[None].float() / temperature, regions)[0])
                     for temperature in GRID.tolist()])


def fit_temperature(curves: Sequence[np.ndarray]) -> float:
    """The temperature with the lowest mean negative log-likelihood over cases, within the grid, to three decimals.

    Args:
        curves: `likelihoods` of each case; a case whose voxels are all to be ignored has none and is left out.

    Returns:
        It; 1 if no case is left.
    """
    known = [values for values in curves if np.isfinite(values).all()]
    if not known:
        return 1.0
    curve = CubicSpline(np.log(GRID), np.mean(known, 0))
    best = minimize_scalar(curve, bounds=(np.log(GRID[0]), np.log(GRID[-1])), method='bounded')
    return round(float(np.exp(best.x)), 3)
