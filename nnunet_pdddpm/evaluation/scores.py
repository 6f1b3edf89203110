"""Scores of samples against what was observed, and whether the samples spread as the truth does.

An observation is the single truth, or one of several raters' masks. The scores are fair (Ferro 2014, doi
10.1002/qj.2270; Zamo and Naveau 2018, doi 10.1007/s11004-017-9709-7): no sample is paired with itself, so their
expectation does not depend on the number of samples and is lowest for the true distribution. That holds for samples
that are drawn independently of each other. Samples whose draws are spread evenly over the quantiles lie farther apart
than independent ones, and score better than these without being more right.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

from nnunet_pdddpm.evaluation.overlap import mean_of_pairs


def kernel_score(cross: np.ndarray, between_samples: np.ndarray) -> float:
    """E d(S, Y) - E d(S, S') / 2 by distances of a negative definite kind (Gneiting and Raftery 2007, section 5).

    Args:
        cross: (n, m) distances of n samples from m observations.
        between_samples: (n, n) distances between the samples; only pairs of different samples count.

    Returns:
        Value in the distances' unit, lower is better; it may be negative. With one sample the second term is 0: the
        score of a forecast without spread.

    Raises:
        ValueError: if there is no sample or no observation, or the two matrices do not fit together.
    """
    if not cross.size or between_samples.shape != (len(cross), len(cross)):
        raise ValueError(f'distances of shape {cross.shape} and {between_samples.shape} do not belong to samples and '
                         f'observations.')
    return float(cross.mean()) - mean_distance(between_samples) / 2


def mean_distance(distances: np.ndarray) -> float:
    """Mean over the pairs of different members of a symmetric (n, n) matrix; 0 of a single member."""
    return mean_of_pairs(distances) if len(distances) > 1 else 0.0


def fair_crps(samples: np.ndarray, observations: np.ndarray) -> float:
    """Fair continuous ranked probability score (Gneiting and Raftery 2007, doi 10.1198/016214506000001437, eq. 21).

    Args:
        samples: (n,) of any unit.
        observations: (m,) of that unit, one truth or several raters' values, over which the score is the mean.

    Returns:
        Value in that unit, lower is better; it may be negative. With one sample it is the mean absolute error, the
        score of a forecast without spread.

    Raises:
        ValueError: if an argument has more than one axis or is empty.
    """
    for name, values in (('samples', samples), ('observations', observations)):
        if np.ndim(values) != 1:
            raise ValueError(f'{name} must have one axis, not {np.ndim(values)}.')
    return fair_energy_score(np.asarray(samples)[:, None], np.asarray(observations)[:, None])


def fair_energy_score(samples: np.ndarray, observations: np.ndarray) -> float:
    """Fair energy score by the Euclidean norm (Gneiting and Raftery 2007, eq. 22 with beta = 1).

    Args:
        samples: (n, d) of any unit.
        observations: (m, d) of that unit, one truth or several raters' values, over which the score is the mean.

    Returns:
        Value in that unit, lower is better; it may be negative. With one sample it is the mean distance, the score of
        a forecast without spread. For d = 1 it is `fair_crps`.

    Raises:
        ValueError: if an argument has not two axes, is empty, or both differ in d.
    """
    samples, observations = _checked(samples, observations)
    return kernel_score(cdist(samples, observations), cdist(samples, samples))


def spread_and_correlation(cases: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Do samples lie around their mean as the truth does? (Fortin et al. 2014, doi 10.1175/JHM-D-14-0008.1)

    Compares two sums over cases: that of the samples' covariance (ddof = 1) times (n + 1) / n, since the mean of n
    samples is uncertain as well; and that of the products of the residuals, observation minus the samples' mean, as a
    mean over a case's observations. They have the same expectation if the samples are independent draws of the true
    distribution. Residuals are not centred: an error that all cases share counts. Cases of large values weigh most.

    Args:
        cases: for each case samples (n, d) with n > 1 and observations (m, d), of any unit; d as in all the others.

    Returns:
        `sd_ratio`: root of the summed variances over that of the squared residuals, pooled over the d values; 1 for an
            exact sampler, lower for one that is too narrow. nan if every residual is 0.
        `correlation`: between the samples' values, mean over pairs of the d in [-1, 1]; pairs of which one never varies
            are left out. nan if no pair is left.
        `correlation_reference`: the same of the residuals.

    Raises:
        ValueError: if there is no case, a case has fewer than two samples or no observation, or the shapes differ.
    """
    if not cases:
        raise ValueError('spread and correlation need at least one case.')
    pairs = [_checked(*case) for case in cases]
    if min(len(samples) for samples, _ in pairs) < 2 or len({samples.shape[1] for samples, _ in pairs}) > 1:
        raise ValueError('spread and correlation need two samples of every case, of equally many values.')
    sample_covariance, residual_covariance = (np.zeros((pairs[0][0].shape[1],) * 2) for _ in range(2))
    for samples, observations in pairs:
        samples, observations = samples - observations[0], observations - observations[0]  # equal values are exactly 0
        n, mean = len(samples), samples.mean(0)
        sample_covariance += (n + 1) / n * (samples - mean).T @ (samples - mean) / (n - 1)
        residual_covariance += (observations - mean).T @ (observations - mean) / len(observations)
    total = np.trace(residual_covariance)
    return {'sd_ratio': float(np.sqrt(np.trace(sample_covariance) / total)) if total > 0 else float('nan'),
            'correlation': _mean_correlation(sample_covariance),
            'correlation_reference': _mean_correlation(residual_covariance)}


def _mean_correlation(covariance: np.ndarray) -> float:
    varies = np.diag(covariance) > 0
    covariance = covariance[np.ix_(varies, varies)]
    sd = np.sqrt(np.diag(covariance))
    return mean_of_pairs(covariance / np.outer(sd, sd))


def _checked(samples: np.ndarray, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 (n, d) and (m, d); raises ValueError if they are not."""
    samples, observations = np.asarray(samples, np.float64), np.asarray(observations, np.float64)
    if samples.ndim != 2 or observations.ndim != 2 or samples.shape[1] != observations.shape[1]:
        raise ValueError(f'samples {samples.shape} and observations {observations.shape} must be (n, d) and (m, d).')
    if not samples.size or not observations.size:
        raise ValueError('there must be at least one sample and one observation of at least one value.')
    return samples, observations
