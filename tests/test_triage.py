"""`benchmarks/triage.py`: scores of an order by hand, and that its artefacts make test images worse."""
from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'


def module(name: str) -> ModuleType:
    """One of the benchmark's; the path is put back afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return import_module(name)


@pytest.fixture(scope='module')
def scores() -> ModuleType:
    return module('orders')


@pytest.fixture(scope='module')
def artefacts() -> ModuleType:
    return module('artefacts')


DICE = np.array([0.9, 0.6, 0.8, 0.5])


def test_areas_of_an_order_by_hand(scores):
    best = (0.1 + 0.3 / 2 + 0.7 / 3 + 1.2 / 4) / 4
    assert scores.aurc(DICE, DICE) == pytest.approx(best)
    assert scores.normalised_aurc(10 * DICE - 3, DICE) == scores.normalised_aurc(DICE, DICE) == 0
    worst = (0.5 + 0.9 / 2 + 1.1 / 3 + 1.2 / 4) / 4
    assert scores.aurc(-DICE, DICE) == pytest.approx(worst)
    assert scores.normalised_aurc(-DICE, DICE) == pytest.approx((worst - best) / (0.3 - best))
    assert scores.aurc(np.zeros(4), DICE) == pytest.approx(0.3)  # in any order
    assert scores.normalised_aurc(np.zeros(4), DICE) == pytest.approx(1)
    assert scores.aurc(np.array([2, 1, 1, 0]), DICE) == pytest.approx((0.1 + 0.4 / 2 + 0.7 / 3 + 1.2 / 4) / 4)


def test_a_random_order_has_the_normalised_area_1_on_average(scores):
    rng = np.random.default_rng(0)
    dice = rng.random(40)
    assert np.mean([scores.normalised_aurc(rng.random(40), dice) for _ in range(500)]) == pytest.approx(1, abs=0.03)


def test_ranks_and_failures_by_hand(scores):
    assert scores.failures_found(DICE, DICE, 0.7, 0.25) == 0.5 and scores.failures_found(DICE, DICE, 0.7, 0.5) == 1
    assert scores.failures_found(-DICE, DICE, 0.7, 0.5) == 0


@pytest.mark.parametrize('shape', [(12, 20, 16), (40, 32)])
def test_every_family_changes_an_image_more_with_its_strength_and_keeps_its_shape(artefacts, shape):
    image = np.random.default_rng(0).gamma(4, 50, shape)
    image[tuple(slice(n // 3, n // 3 * 2) for n in shape)] += 300
    for name, make in artefacts.FAMILIES.items():
        made = [make(image, strength, np.random.default_rng(1)) for strength in range(artefacts.STRENGTHS)]
        for of in made:
            assert of.shape == image.shape and np.isfinite(of).all() and of.min() >= 0, name
        kept = [np.corrcoef(of.ravel(), image.ravel())[0, 1] for of in made]
        assert kept[0] > kept[2] and kept[0] < 0.999, name
