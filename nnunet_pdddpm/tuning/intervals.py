"""How wide intervals of volumes must be to hold the true ones: conformal prediction on validation cases."""
from __future__ import annotations

import math

import numpy as np

from nnunet_pdddpm.tuning.choice import LEVEL

FEWEST_CASES = 10
FEWEST_ERRORS = 19
"""Of fewer, none is the 95 % quantile."""
FARTHEST = 10
"""Standard deviations of the samples' volumes. Eight samples are never more than 2.5 from their mean: where the truth
lies farther away, their spread says nothing of the error."""


def conformal_widths(errors: np.ndarray | None) -> tuple[float, ...]:
    """For each label half of the width of a 95 % interval, in standard deviations of the samples' volumes.

    Of a label with fewer than FEWEST_ERRORS errors it is that of all labels together.

    Args:
        errors: (cases, labels) as `Truth.volume_errors` gives them, nan where undefined; None if there was one sample.

    Returns:
        (labels,) with 0 where it is not known: see `conformal_width`; nowhere, for fewer than FEWEST_CASES cases.
    """
    if errors is None:
        return ()
    if len(errors) < FEWEST_CASES:
        return (0.0,) * errors.shape[1]
    return tuple(conformal_width(of if np.isfinite(of).sum() >= FEWEST_ERRORS else errors) for of in errors.T)


def conformal_width(errors: np.ndarray) -> float:
    """Locally weighted split conformal prediction (Lei et al. 2018, arXiv 1604.04173, section 5.2).

    With n errors of validation cases it is the ceil(0.95 (n + 1))-th smallest of them. An interval of that half-width
    holds the true volume of a new case, like these, with a probability of at least 95 % over draws of the new case and
    of these ones, whatever the samples are worth.

    Args:
        errors: distances from the samples' mean volume to the true one, in standard deviations, of any shape; nan is
            left out.

    Returns:
        0 if it is not known: fewer than FEWEST_ERRORS errors, or it would be more than FARTHEST.
    """
    known = np.sort(errors[~np.isnan(errors)])
    position = math.ceil(LEVEL * (len(known) + 1))
    return float(known[position - 1]) if position <= len(known) and known[position - 1] <= FARTHEST else 0.0
