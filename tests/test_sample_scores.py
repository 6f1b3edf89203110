"""Scores of samples that `nnUNetv2_pdddpm_evaluate` writes, against hand-made numbers."""
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import LABELS, Data, of_points, phantoms, write
from skimage import io


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return phantoms(tmp_path)


SCORES = ('ged_squared_fair', 'crps_volume_ml', 'crps_components', 'energy_octants_ml', 'energy_components_ml')


def rows_of(data: Data) -> list[dict[str, str]]:
    with open(data.pred / 'evaluation.csv') as file:
        return list(csv.DictReader(file))


def test_scores_of_hand_made_samples_against_a_reference(tmp_path, capsys):
    """Voxels of 1 ml; two components of the reference, of 1 and 2 ml, in the first and the last octant."""
    data, shape = Data(tmp_path, {}, {}), (4, 6, 6)
    data.pred.mkdir()
    data.describe({'background': 0, 'lesion': 1})
    reference = of_points(shape, (0, 0, 0), (3, 5, 5), (3, 5, 4))
    samples = [((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (3, 5, 5), (3, 0, 0)), ()]
    for file, mask in {data.ref / 'case.nii.gz': reference, data.pred / 'case.nii.gz': reference,
                       **{data.pred / 'samples' / f'case_s{s:02d}.nii.gz': of_points(shape, *points)
                          for s, points in enumerate(samples)}}.items():
        write(file, mask, spacing=(10.0, 10.0, 10.0))
    results = data.evaluate()
    root = np.sqrt
    expected = {'ged_squared_fair': 2 * (0.75 + 0.5 + 1) / 3 - (0.75 + 1 + 1) / 3, 'crps_volume_ml': 4 / 3 - 2 / 2,
                'crps_components': 4 / 3 - 2 / 2,
                'energy_octants_ml': (root(5) + root(2) + root(5)) / 3 - (root(3) + 2 + root(3)) / 3 / 2,
                'energy_components_ml': (root(5) + root(2) + root(5)) / 3 - (1 + 2 + root(5)) / 3 / 2}
    of = results['cases'][0]['labels']['lesion']
    assert {name: of[name] for name in SCORES} == pytest.approx(expected, rel=1e-5)
    assert {name: results['foreground_mean'][name] for name in SCORES} == pytest.approx(expected, rel=1e-5)
    assert {name: float(rows_of(data)[0][name]) for name in SCORES} == pytest.approx(expected, rel=1e-5)
    assert 'ged_squared' not in of
    assert results['sample_spread'] == {'lesion': pytest.approx({
        'cases': 1, 'sd_ratio': root(28 / 16), 'sd_ratio_components': root(28 / 4), 'sd_ratio_parts': root(20 / 26),
        'correlation_parts': 1 / 3, 'correlation_parts_reference': -1}, rel=1e-5)}
    printed = capsys.readouterr().out
    assert 'Scores of 3 samples against the reference' in printed
    for title in ('fair GED^2', 'CRPS V ml', 'CRPS comp.', 'ES oct. ml', 'ES comp. ml', 'sd octants', 'corr. truth'):
        assert title in printed
    assert f'{expected["energy_octants_ml"]:.4f}' in printed and f'{root(28 / 16):.4f}' in printed


def test_scores_of_hand_made_samples_in_2d_against_two_raters(tmp_path, capsys):
    """Pixels of 0.001 ml; the parts are those of both raters' union, of which two lie in opposite corners."""
    data, shape = Data(tmp_path, {}, {}), (6, 6)
    raters = [((0, 0), (5, 5)), ((0, 0), (0, 1), (0, 2), (1, 0))]
    samples = [((0, 0),), ((5, 5), (4, 5), (5, 4))]
    for folder in (data.pred / 'samples', data.ref, data.raters):
        folder.mkdir(parents=True)
    data.describe({'background': 0, 'cell': 1}, file_ending='.png')
    for file, points in {data.ref / 'image': raters[0], data.pred / 'image': raters[0],
                         **{data.raters / f'image__{r}': points for r, points in enumerate(raters)},
                         **{data.pred / 'samples' / f'image_s{s:02d}': points for s, points in enumerate(samples)}
                         }.items():
        io.imsave(f'{file}.png', of_points(shape, *points), check_contrast=False)
    of = data.evaluate(raters=True)['cases'][0]['labels']['cell']
    energy = ((1 + 3 + np.sqrt(5) + 5) / 4 - np.sqrt(10) / 2) / 1000
    assert {name: of[name] for name in SCORES} == pytest.approx({
        'ged_squared_fair': 2 * 0.75 - 1 - 0.8, 'crps_volume_ml': (1.5 - 2 / 2) / 1000, 'crps_components': 0.5,
        'energy_octants_ml': energy, 'energy_components_ml': energy}, rel=1e-5)
    assert of['ged_squared'] == pytest.approx(2 * 0.75 - 1 / 2 - 0.8 / 2)
    assert 'Scores of 2 samples against 2 raters' in capsys.readouterr().out


def test_cases_of_one_slice_and_of_several_have_a_spread_in_common(tmp_path):
    """Voxels of 1 ml; a single slice counts as the upper half."""
    data = Data(tmp_path, {}, {})
    data.pred.mkdir()
    data.describe({'background': 0, 'lesion': 1})
    for case, shape, reference, samples in (
            ('slice', (1, 6, 6), ((0, 0, 0), (0, 5, 5)), [((0, 0, 0),), ((0, 5, 5),)]),
            ('volume', (4, 6, 6), ((0, 0, 0), (3, 5, 5), (3, 5, 4)),
             [((0, 0, 0), (0, 0, 1)), ((0, 0, 0), (3, 5, 5), (3, 0, 0)), ()])):
        for name, points in {f'ref/{case}': reference, f'pred/{case}': reference,
                             **{f'pred/samples/{case}_s{s:02d}': of for s, of in enumerate(samples)}}.items():
            write(data.root / f'{name}.nii.gz', of_points(shape, *points), spacing=(10.0, 10.0, 10.0))
    results = data.evaluate()
    of_slice, of_volume = (case['labels']['lesion']['energy_octants_ml'] for case in results['cases'])
    assert of_slice == pytest.approx(1 - np.sqrt(2) / 2, rel=1e-5)
    assert results['mean']['lesion']['energy_octants_ml'] == pytest.approx((of_slice + of_volume) / 2)
    spread = results['sample_spread']['lesion']
    assert spread['cases'] == 2 and spread['sd_ratio_parts'] == pytest.approx(np.sqrt(67 / 61), rel=1e-5)
    assert spread['correlation_parts'] == pytest.approx(-11 / 43 / 3, rel=1e-5)


def test_spread_is_over_the_cases_and_within_every_label(data):
    samples = data.add_samples()
    for i, (case, masks) in enumerate(samples.items()):
        masks[1:3, :, :9 - i] = 0  # volumes differ in three of four samples
        for s, mask in enumerate(masks):
            write(data.pred / 'samples' / f'{case}_s{s:02d}.nii.gz', mask)
    results = data.evaluate()
    for name, value in (('organ', 1), ('lesion', 2)):
        volumes = np.stack([(masks == value).sum((1, 2, 3)) for masks in samples.values()])
        true = np.array([(mask == value).sum() for mask in data.references.values()])
        variance, squares = volumes.var(1, ddof=1).mean() * 5 / 4, ((true - volumes.mean(1)) ** 2).mean()
        of = results['sample_spread'][name]
        assert of['cases'] == 5
        assert of['sd_ratio'] == pytest.approx(np.sqrt(variance / squares))


def test_samples_that_only_move_have_no_ratio_of_volumes(data):
    """Rounding of millilitres is no spread."""
    data.add_samples(3)
    spread = data.evaluate()['sample_spread']['organ']
    assert spread['sd_ratio'] is None and spread['sd_ratio_parts'] > 0


def test_where_the_reference_has_ignored_voxels_there_are_no_scores_of_volumes(data):
    data.describe({**LABELS, 'ignore': 3})
    data.add_samples()
    data.references['case_0'][:, :, :5] = 3
    write(data.ref / 'case_0.nii.gz', data.references['case_0'])
    results = data.evaluate()
    for name in ('organ', 'lesion'):
        ignored, *others = (case['labels'][name] for case in results['cases'])
        assert [ignored[score] for score in SCORES[1:]] == [None] * 4 and ignored['ged_squared_fair'] is not None
        for score in SCORES[1:]:
            assert results['mean'][name][score] == pytest.approx(np.mean([of[score] for of in others]))
        assert results['sample_spread'][name]['cases'] == 4
    assert [rows_of(data)[0][score] for score in SCORES[1:]] == [''] * 4


@pytest.mark.parametrize('number', [0, 1])
def test_scores_need_two_samples(data, number, capsys):
    if number:
        data.add_samples(number)
    data.add_raters()
    results = data.evaluate(raters=True)
    assert results['sample_spread'] == {} and not set(SCORES) & set(results['foreground_mean'])
    assert {row[score] for row in rows_of(data) for score in SCORES} == {''}
    assert any('fair GED' in line and 'at least two samples' in line for line in results['not_computed'])
    assert 'Scores of' not in capsys.readouterr().out


def test_cases_whose_names_begin_alike_keep_their_files_apart(data):
    for case in ('case_0_s01', 'case_0_'):
        write(data.ref / f'{case}.nii.gz', data.references['case_0'])
        write(data.pred / f'{case}.nii.gz', data.predictions['case_0'])
    for case, number in (('case_0', 2), ('case_0_s01', 3), ('case_0_', 1)):
        for s in range(number):
            write(data.pred / 'samples' / f'{case}_s{s:02d}.nii.gz', data.predictions['case_0'])
    results = data.evaluate()
    assert {case['case']: case['samples'] for case in results['cases'][:3]} == {
        'case_0': 2, 'case_0_': 1, 'case_0_s01': 3}
