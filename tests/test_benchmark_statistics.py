"""Means and intervals of the benchmarks' tables."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent / 'benchmarks'))
from statistics_of_trainings import difference, files_of_trainings, spread, t_interval  # noqa: E402

sys.path.pop(0)
ONE, OTHER = np.array([[1.0, 3], [2, 6], [3, 3]]), np.array([[1.0, 1], [1, 1], [1, 1]])


def test_the_unit_is_the_training():
    assert spread(ONE) == '3.000 ± 1.000'
    found = stats.ttest_1samp([1, 3, 2], 0).confidence_interval(0.95)
    assert t_interval(np.array([1.0, 3, 2])) == pytest.approx((2, *found))
    assert difference(ONE, OTHER, 2) == f'+2.00 ({found[0]:+.2f} to {found[1]:+.2f})'


def test_fewer_than_three_trainings_have_no_interval_and_others_are_not_paired():
    assert spread(ONE[:1]) == '2.000 (one training)'
    assert difference(ONE[:2], OTHER[:2]) == '+2.000 (no interval: fewer than 3 trainings)'
    with pytest.raises(ValueError, match='cannot be paired'):
        difference(ONE, OTHER[:2])


def test_the_trainings_of_a_row_are_in_order_and_none_is_missing(tmp_path):
    for fold in range(11):
        (tmp_path / f'row__{fold}.json').touch()
        (tmp_path / f'row__longer__{fold}.json').touch()
    assert [file.name for file in files_of_trainings(tmp_path, 'row')][8:] == ['row__8.json', 'row__9.json',
                                                                              'row__10.json']
    (tmp_path / 'row__3.json').unlink()
    with pytest.raises(ValueError, match='row__3.json'):
        files_of_trainings(tmp_path, 'row')
