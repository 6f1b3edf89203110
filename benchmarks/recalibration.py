"""One temperature for a trained model, fitted on its validation cases: Guo et al. 2017, arXiv 1706.04599.

The baseline for every claim about calibration: it needs no second network and changes no mask.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from nnunet_pdddpm.evaluation.calibration import SMALLEST_PROBABILITY

RANGE = (0.5, 10.0)


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of log p / T.

    Args:
        probabilities: (C, ...) float32 as nnU-Net writes them; those near 0 are exact, those near 1 are not.
        temperature: above 1 it takes confidence away.
    """
    z = np.log(np.maximum(probabilities.astype(np.float64), 1e-30)) / temperature
    p = np.exp(z - z.max(0))
    return p / p.sum(0)


def fit_temperature(cases: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """The temperature with the lowest mean NLL.

    Args:
        cases: probabilities (C, N), and how often each class is true (C, N), summing to 1 over classes.
    """
    def nll(temperature: float) -> float:
        return float(np.mean([-(share * np.log(np.clip(scaled(p, temperature), SMALLEST_PROBABILITY, 1))).sum(0).mean()
                              for p, share in cases]))
    return float(minimize_scalar(nll, bounds=RANGE, method='bounded', options={'xatol': 0.01}).x)


def fit_on_folder(predictions: Path, share: Callable[[str], np.ndarray]) -> float:
    """From a folder of predictions with probabilities.

    Args:
        predictions: of validation cases.
        share: name of a case -> how often each class is true (C, ...).
    """
    cases = []
    for file in sorted(predictions.glob('*.npz')):
        p = np.load(file)['probabilities']
        cases.append((p.reshape(len(p), -1), share(file.stem).reshape(len(p), -1)))
    return fit_temperature(cases)


def rescale_folder(folder: Path, temperature: float) -> None:
    """Replace the probabilities of all predictions in a folder; the masks stay as they are."""
    for file in folder.glob('*.npz'):
        np.savez_compressed(file, probabilities=scaled(np.load(file)['probabilities'], temperature).astype(np.float32))
