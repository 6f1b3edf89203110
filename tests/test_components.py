"""The parts of a volume around its possible objects, and samples that draw them together or independently."""
from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import REFINED, Workspace
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from nnunet_pdddpm.diffusion.coding import harden
from nnunet_pdddpm.inference import components
from nnunet_pdddpm.inference.components import WHOLE, objects_in, parts_around
from nnunet_pdddpm.inference.counting import VoxelCounter
from nnunet_pdddpm.inference.predictor import PDDDPMPredictor

CPU = torch.device('cpu')
SHAPE = (20, 26, 40)
BOX = (slice(8, 12), slice(10, 15), slice(4, 9))
WAY = (slice(8, 12), slice(10, 15), slice(9, 30))
OTHER_BOX = (slice(8, 12), slice(10, 15), slice(30, 35))


def test_a_volume_with_one_possible_object_or_none_is_one_part():
    foreground = torch.full((4, 5, 6), 0.09)
    assert parts_around(objects_in(foreground)) == WHOLE
    foreground[1, 1, 1] = foreground[2, 2, 2] = 0.11  # neighbours over a corner
    assert parts_around(objects_in(foreground)) == WHOLE
    assert WHOLE.number == 1 and WHOLE.at(3) is None


@pytest.mark.parametrize('large', [False, True], ids=['small', 'large'])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_every_voxel_belongs_to_the_nearest_object(large, data):
    shape = data.draw(st.tuples(st.integers(1, 5), st.integers(2, 7), st.integers(2, 7)))
    points = data.draw(st.lists(st.tuples(*[st.integers(0, n - 1) for n in shape]), min_size=2, max_size=6))
    foreground = torch.full(shape, 0.05)
    for point in points:
        foreground[point] = 0.5
    with patch.object(components, 'EXACT', 0 if large else components.EXACT):
        parts = parts_around(objects_in(foreground))
    objects, number = ndimage.label((foreground > 0.1).numpy(), np.ones((3, 3, 3)))
    if number == 1:
        assert parts == WHOLE
        return
    assert parts.number == number and parts.index is not None
    assert parts.index.shape == shape and parts.index.dtype == torch.int32
    distances = np.stack([ndimage.distance_transform_edt(objects != label) for label in range(1, number + 1)])
    own = np.take_along_axis(distances, parts.index.numpy()[None].astype(int), 0)[0]
    np.testing.assert_array_less(own, distances.min(0) + (3.5 if large else 1e-6))
    assert (own[objects > 0] == 0).all()
    for z in range(shape[0]):
        assert torch.equal(parts.at(z), parts.index[z])


# samples of a volume

@pytest.fixture(scope='module')
def samples_of(refined: Workspace):
    """Masks (n, Z, Y, X) of samples, where the stock model finds two boxes as likely as not, and nothing else for sure.
    """
    def drawn(samples: int, regions: bool = False, between: float | None = None, **overrides) -> np.ndarray:
        """`between`: logit of the foreground between the boxes, None for background."""
        predictor = PDDDPMPredictor(use_mirroring=False, device=CPU, allow_tqdm=False,
                                    overrides={'samples': samples, 'temperature': 1.0, **overrides})
        predictor.initialize_from_trained_model_folder(str(refined.model(REFINED)), (0,))
        predictor.list_of_parameters[0]['has_regions'] = torch.tensor(regions)
        predictor.refiner.load_state_dict(predictor.list_of_parameters[0])
        logits = torch.full((3, *SHAPE), -9.0)
        logits[0] = -9 if regions else 9
        for box, foreground in ((BOX, 0), (OTHER_BOX, 0), *([(WAY, between)] if between is not None else [])):
            logits[0][box] = 9 if regions else 0
            logits[1][box] = foreground
        masks: dict[int, np.ndarray] = {}

        def keep(number: int, sample: torch.Tensor) -> None:
            masks[number] = harden(sample[None], regions)[0, 1].numpy()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(predictor, 'predict_sliding_window_return_logits', lambda image: logits.half())
            # under little noise: the mask that was noised
            patch.setattr(predictor.refiner, 'denoise', lambda image, x, level: 2 * harden(x, regions) - 1)
            # the data set has no regions, and nothing is asked of volumes
            patch.setattr(VoxelCounter, '_add', lambda counter, *_: torch.zeros(counter.num_values).int())
            predictor.predict_volume(torch.zeros(1, *SHAPE), keep)
        return np.stack([masks[number] for number in range(samples)])
    return drawn


def presence(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In which samples each of the boxes is there: as a whole, or not at all."""
    of_both = [masks[(slice(None), *box)].reshape(len(masks), -1) for box in (BOX, OTHER_BOX)]
    for inside in of_both:
        assert (inside.min(1) == inside.max(1)).all()
    return of_both[0][:, 0] > 0, of_both[1][:, 0] > 0


WITHOUT_CHAIN = {'samples_from': 'stock', 'mask_stock': 1, 'mask_blind': 0}
CHAIN = {'samples_from': 'chain', 'start': 0.01, 'steps': 2, 'mask_stock': 1, 'mask_blind': 0}


@pytest.mark.parametrize('regions', [False, True], ids=['classes', 'regions'])
@pytest.mark.parametrize('settings', [WITHOUT_CHAIN, CHAIN], ids=['stock', 'chain'])
def test_two_separate_objects_are_drawn_together_with_dependence_1_and_independently_with_0(
        samples_of, settings, regions):
    samples = 64
    four_errors = 4 * 0.5 / math.sqrt(samples)
    # regions are drawn by one stratified uniform, classes by one for each
    tolerance = 1 / samples if regions else four_errors
    masks = samples_of(samples, regions, dependence=1, **settings)
    one, other = presence(masks)
    assert np.array_equal(one, other) and one.mean() == pytest.approx(0.5, abs=tolerance)
    both = np.zeros(SHAPE, bool)
    both[BOX] = both[OTHER_BOX] = True
    assert not masks[:, ~both].any()
    one, other = presence(samples_of(samples, regions, dependence=0, **settings))
    assert [of.mean() for of in (one, other)] == pytest.approx([0.5, 0.5], abs=tolerance)
    assert (one == other).mean() == pytest.approx(0.5, abs=four_errors)


@pytest.mark.parametrize('dependence', [0.5, 0.9])
def test_between_them_draws_agree_as_often_as_normal_variables_of_that_correlation(samples_of, dependence):
    samples, expected = 256, 0.5 + math.asin(dependence) / math.pi
    one, other = presence(samples_of(samples, True, dependence=dependence, **WITHOUT_CHAIN))
    assert (one == other).mean() == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / samples))


def test_where_an_object_may_reach_from_one_to_the_other_they_are_drawn_together(samples_of):
    one, other = presence(samples_of(16, between=-2.0, dependence=0, **WITHOUT_CHAIN))  # a probability of 0.12
    assert np.array_equal(one, other) and 0 < one.sum() < 16
    one, other = presence(samples_of(16, between=-2.5, dependence=0, **WITHOUT_CHAIN))  # 0.08
    assert not np.array_equal(one, other)


def test_independent_draws_are_the_same_in_every_run_and_others_with_another_seed(samples_of):
    first, again, other = (samples_of(8, dependence=0, seed=seed, **WITHOUT_CHAIN) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and (first != other).any()
