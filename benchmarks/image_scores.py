"""What drawn masks of a 2D image are worth: against raters' masks, or against the distribution of a phantom's."""
from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
from datasets.images import Image
from datasets.phantom_drawing import SHAPES, Object, Phantom

from nnunet_pdddpm.evaluation.calibration import reliability
from nnunet_pdddpm.evaluation.overlap import dice_of_iou, iou_matrix
from nnunet_pdddpm.evaluation.parts import components, octants, volumes_of_parts
from nnunet_pdddpm.evaluation.raters import fair_ged_squared, hungarian_matched_iou
from nnunet_pdddpm.evaluation.scores import fair_crps, fair_energy_score, mean_distance
from nnunet_pdddpm.evaluation.voxelwise import SMALLEST_PROBABILITY
from nnunet_pdddpm.inference.components import POSSIBLE

CLEAN = 0.85
"""IoU with the nearest of its three shapes from which an object of a sample counts as one of them. Rim and lobe
together have 0.78 with the nearest."""
DRAWS_OF_TRUTH = 400
"""For the CRPS of the total."""


def likelihood(share: np.ndarray, mean: np.ndarray) -> float:
    """Negative log likelihood of the probability map `mean` (Y, X), where `share` of the truths is foreground."""
    p = np.clip(mean, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY)
    return float(-(share * np.log(p) + (1 - share) * np.log(1 - p)).mean())


# raters --------------------------------------------------------------------------------------------------------------

def areas_of_parts(masks: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Areas (n, 4) of masks (n, Y, X) in the quadrants of the box in which `expected` (Y, X), the probabilities of the
    stock model, holds anything, relative to what it expects: neither may depend on the raters, or scores would not be
    proper."""
    index, number = octants(expected > POSSIBLE)
    return np.stack([volumes_of_parts(mask, index, number) for mask in masks]) / (1 + expected.sum())


def energy_of_parts(image: Image, masks: np.ndarray, expected: np.ndarray) -> float:
    """Fair energy score of these areas."""
    return fair_energy_score(areas_of_parts(masks, expected), areas_of_parts(image.masks, expected))


def against_raters(image: Image, masks: np.ndarray, mean: np.ndarray, expected: np.ndarray) -> dict[str, object]:
    """Of independent samples (n, Y, X) and a mean probability (Y, X), against the raters' masks.

    Returns:
        `ged` (fair), `hm_iou`; of the mean `nll`, `ece`, and `dice` to the majority and `f1` of objects at IoU 0.5
        where most raters drew anything, `false_alarm` where they did not: whether the mask has anything, the others are
        nan; `crps` of the area, `components` of the number of objects, `energy` of the areas in quadrants; `objects`
        and `objects_of_raters`, mean numbers; the areas of samples and raters.
    """
    raters, share = image.masks, image.masks.mean(0)
    cross = iou_matrix(masks, raters)
    areas, of_raters = areas_of_parts(masks, expected), areas_of_parts(raters, expected)
    objects, objects_of_raters = (np.array([components(mask)[1] for mask in of], float) for of in (masks, raters))
    majority, mask = share > 0.5, mean > 0.5
    drawn = bool(majority.any())
    confidence = np.where(mask, mean, 1 - mean).ravel()
    pooled = reduce(add, (reliability(confidence, (mask == rater).ravel()) for rater in raters))
    return {'ged': fair_ged_squared(cross, iou_matrix(masks, masks), iou_matrix(raters, raters)),
            'hm_iou': hungarian_matched_iou(cross), 'nll': likelihood(share, mean),
            'ece': pooled.expected_calibration_error,
            'dice': float(dice_of_iou(iou_matrix(mask[None], majority[None]))[0, 0]) if drawn else np.nan,
            'f1': object_f1(majority, mask) if drawn else np.nan,
            'false_alarm': np.nan if drawn else float(mask.any()), 'crps': fair_crps(areas.sum(1), of_raters.sum(1)),
            'components': fair_crps(objects, objects_of_raters), 'energy': fair_energy_score(areas, of_raters),
            'objects': float(objects.mean()), 'objects_of_raters': float(objects_of_raters.mean()),
            'areas': areas.tolist(), 'areas_of_raters': of_raters.tolist()}


def object_f1(reference: np.ndarray, mask: np.ndarray) -> float:
    """F1 of connected components that match with an IoU above 0.5, which pairs each with one other at most."""
    (one, number), (other, of_mask) = components(reference), components(mask)
    if number + of_mask == 0:
        return 1.0
    pairs = np.histogram2d(one.ravel(), other.ravel(), (np.arange(number + 2), np.arange(of_mask + 2)))[0]
    union = pairs.sum(1, keepdims=True) + pairs.sum(0, keepdims=True) - pairs
    return float(2 * np.count_nonzero((pairs / union)[1:, 1:] > 0.5) / (number + of_mask))


# phantoms ------------------------------------------------------------------------------------------------------------

def against_truth(case: Phantom, masks: np.ndarray, mean: np.ndarray, seed: int) -> dict[str, float]:
    """Samples (n, Y, X) and their mean probability against the exact distribution of the truth.

    Returns:
        `nll` and `dice` of the mean; `clean`: share of the objects in the samples that are one of the three shapes;
        `frequency_error`: half of the summed differences between the frequencies of the shapes and their
        probabilities; for two objects `ged`: fair GED², and `ged_biased`: with pairs of a mask with itself, as it is
        usually published; `crps`: of the total area, over its mean;
        `variance`, `true_variance`: of the total over its mean; `variance_objects`, `covariance`: of "more than the
        core", for the correlation of objects.
    """
    rng = np.random.default_rng(seed)
    nearest, clean, frequency = zip(*(_shapes(one, masks) for one in case.objects), strict=True)
    covariance = np.cov(np.array(nearest) > 0, bias=True)
    off = ~np.eye(len(covariance), dtype=bool)
    areas = [(one.masks.sum((1, 2)), one.probabilities) for one in case.objects]
    truths = sum(a[rng.choice(len(SHAPES), DRAWS_OF_TRUTH, p=p)] for a, p in areas)
    expected, variance = sum(p @ a for a, p in areas), sum(p @ a ** 2 - (p @ a) ** 2 for a, p in areas)
    totals = masks.sum((1, 2))
    of = {'nll': likelihood(exact_map(case), mean), 'dice': _expected_dice(case, mean > 0.5, rng),
          'clean': float(np.mean(clean)), 'frequency_error': float(np.mean(frequency)),
          'crps': fair_crps(totals / expected, truths / expected),
          'variance': float(totals.var(ddof=1) / expected ** 2), 'true_variance': float(variance / expected ** 2),
          'variance_objects': float(np.diag(covariance).mean()), 'covariance': float(covariance[off].mean())}
    if len(case.objects) == 2:
        of['ged'], of['ged_biased'] = ged(case, masks)
    return of


def exact_map(case: Phantom) -> np.ndarray:
    """Probability of the foreground, (Y, X)."""
    return sum(np.einsum('k,kyx->yx', one.probabilities, one.masks) for one in case.objects)


def ged(case: Phantom, masks: np.ndarray) -> tuple[float, float]:
    """GED² to the exact distribution of two objects: fair, without pairs of a sample with itself, which would reward
    samples for being alike; and with these pairs."""
    possible, weights = case.distribution()
    of_truth = weights @ (1 - iou_matrix(possible, possible)) @ weights
    between = 2 * ((1 - iou_matrix(masks, possible)) @ weights).mean() - of_truth
    among = 1 - iou_matrix(masks, masks)
    return float(between - mean_distance(among)), float(between - among.mean())


def _expected_dice(case: Phantom, mask: np.ndarray, rng: np.random.Generator) -> float:
    if len(case.objects) == 2:
        possible, weights = case.distribution()
        return float(weights @ dice_of_iou(iou_matrix(possible, mask[None])[:, 0]))
    truths = np.stack([case.draw(rng) for _ in range(20)])
    return float(dice_of_iou(iou_matrix(truths, mask[None])[:, 0]).mean())


def _shapes(one: Object, masks: np.ndarray) -> tuple[np.ndarray, float, float]:
    """For each sample the index of an object's nearest shape; the share that is that shape; the error in frequency."""
    rows, columns = one.cell
    iou = iou_matrix(masks[:, rows, columns], one.masks[:, rows, columns])
    nearest = iou.argmax(1)
    frequencies = np.bincount(nearest, minlength=len(SHAPES)) / len(masks)
    return nearest, float((iou.max(1) >= CLEAN).mean()), float(np.abs(frequencies - one.probabilities).sum() / 2)
