"""`nnUNetv2_pdddpm_evaluate` on folders as prediction commands write them."""
from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_data import LABELS, OUTPUTS, REGIONS, SHAPE, SPACING, Data, phantoms, write
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
from scipy.stats import pearsonr, spearmanr

from nnunet_pdddpm import image_files
from nnunet_pdddpm.evaluation import folders as folders_module
from nnunet_pdddpm.evaluation.overlap import iou_matrix
from nnunet_pdddpm.evaluation.raters import ged_squared
from nnunet_pdddpm.evaluation.surfaces import hd95_and_surface_dice
from nnunet_pdddpm.evaluation.voxelwise import class_statistics
from nnunet_pdddpm.files import identity


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return phantoms(tmp_path)


def column(results: dict[str, Any], label: str, metric: str) -> list[float]:
    return [case['labels'][label][metric] for case in results['cases']]


# accuracy

@pytest.mark.parametrize('kind', ['labels', 'regions', 'ignore'])
def test_dice_is_that_of_nnunets_evaluator(data, kind):
    labels = {'labels': LABELS, 'regions': REGIONS, 'ignore': {**LABELS, 'ignore': 3}}[kind]
    data.describe(labels, **({'regions_class_order': [1, 2]} if kind == 'regions' else {}))
    if kind == 'ignore':
        for case, mask in data.references.items():
            mask[:4] = 3
            write(data.ref / f'{case}.nii.gz', mask)
    compute_metrics_on_folder2(str(data.ref), str(data.pred), str(data.pred / 'dataset.json'),
                               str(data.pred / 'plans.json'), num_processes=1)
    theirs = json.loads((data.pred / 'summary.json').read_text())
    keys = {'whole': '(1, 2)', 'organ': '1', 'lesion': '2'}
    ours = data.evaluate()
    for ours_name, theirs_name in (('dice', 'Dice'), ('iou', 'IoU')):
        assert ours['foreground_mean'][ours_name] == pytest.approx(theirs['foreground_mean'][theirs_name], abs=1e-12)
        for name, means in ours['mean'].items():
            assert means[ours_name] == pytest.approx(theirs['mean'][keys[name]][theirs_name], abs=1e-12)
            assert column(ours, name, ours_name) == pytest.approx(
                [case['metrics'][keys[name]][theirs_name] for case in theirs['metric_per_case']], abs=1e-12)


def test_surfaces_and_volumes_are_in_millimetres_of_the_images_axes(data):
    results = data.evaluate('-nsd_tolerance', '1.7')
    for case, reference, prediction in zip(results['cases'], data.references.values(), data.predictions.values(),
                                           strict=True):
        expected = hd95_and_surface_dice(reference == 2, prediction == 2, SPACING, 1.7)
        of = case['labels']['lesion']
        assert (of['hd95_mm'], of['surface_dice']) == pytest.approx(expected, rel=1e-5)
        voxel_ml = np.prod(SPACING) / 1000
        assert of['reference_volume_ml'] == pytest.approx((reference == 2).sum() * voxel_ml, rel=1e-5)
        assert of['volume_ml'] == pytest.approx((prediction == 2).sum() * voxel_ml, rel=1e-5)
        assert of['volume_difference_ml'] == pytest.approx(abs(of['volume_ml'] - of['reference_volume_ml']), abs=1e-9)


def test_a_plain_folder_of_masks_gives_accuracy_and_names_once_what_the_rest_needs(data, capsys):
    results = data.evaluate()
    printed = capsys.readouterr().out
    assert results['voxelwise'] == results['estimated_dice'] == {}
    assert 'ged_squared' not in results['foreground_mean']
    lines = [line for line in printed.splitlines() if line.startswith('Not computed: ')]
    assert lines == [f'Not computed: {line}' for line in results['not_computed']] and len(lines) == 5
    for need in ('CASE.npz', 'uncertainty/CASE_uncertainty.nii.gz', 'pdddpm_summary.json', 'samples/CASE_sNN.nii.gz',
                 '-raters with CASE__RATER.nii.gz'):
        assert sum(need in line for line in lines) >= 1
    assert f'{results["mean"]["lesion"]["dice"]:.4f}' in printed
    assert not (data.pred / OUTPUTS[2]).exists()


def test_the_csv_has_a_row_per_case_and_label(data):
    results = data.evaluate()
    with open(data.pred / 'evaluation.csv') as file:
        rows = list(csv.DictReader(file))
    assert [(row['case'], row['label']) for row in rows] == [(case, name) for case in data.references
                                                            for name in ('organ', 'lesion')]
    assert [float(row['dice']) for row in rows[1::2]] == pytest.approx(column(results, 'lesion', 'dice'), rel=1e-5)
    assert {row['ged_squared'] for row in rows} == {''}


def test_empty_masks_are_left_out_or_count_as_wrong_but_never_as_right(data, capsys):
    empty = np.zeros(SHAPE, np.uint8)
    for name, (reference, prediction) in {'case_0': (empty, empty), 'case_1': (empty, data.predictions['case_1']),
                                          'case_2': (data.references['case_2'], empty)}.items():
        write(data.ref / f'{name}.nii.gz', reference)
        write(data.pred / f'{name}.nii.gz', prediction)
    results = data.evaluate()
    both, false_positive, missed = (case['labels']['organ'] for case in results['cases'][:3])
    diagonal = np.linalg.norm(np.multiply(SHAPE, SPACING))
    for metric in ('dice', 'hd95_mm', 'surface_dice', 'lesion_f1'):
        assert both[metric] is None
        worst = pytest.approx(diagonal, rel=1e-5) if metric == 'hd95_mm' else 0
        assert false_positive[metric] == missed[metric] == worst
        assert results['mean']['organ'][metric] == pytest.approx(np.mean(column(results, 'organ', metric)[1:]))
    assert both['volume_difference_ml'] == 0 < false_positive['volume_difference_ml']
    assert results['both_empty'] == {'organ': 1, 'lesion': 1}
    assert 'organ in 1 cases' in capsys.readouterr().out


# calibration

def test_calibration_of_probabilities_is_computed_over_all_voxels_and_near_the_reference(data, capsys):
    probabilities = data.add_probabilities()
    results = data.evaluate()
    for i, case in enumerate(data.references):
        p, truth = probabilities[case].astype(float), data.references[case].astype(int)
        where = np.argwhere(truth > 0)
        margin = np.floor(10 / np.array(SPACING) + 1e-6).astype(int)
        box = tuple(slice(max(0, low), high) for low, high in zip(where.min(0) - margin, where.max(0) + 1 + margin,
                                                                 strict=True))
        for name, part in (('all', ...), ('near', box)):
            true_probability = np.take_along_axis(p, truth[None], 0)[0][part]
            found = results['cases'][i]['voxelwise'][name]
            assert found['voxels'] == true_probability.size
            assert found['nll'] == pytest.approx(-np.log(np.clip(true_probability, 1e-6, 1)).mean(), rel=1e-4)
    assert results['voxelwise']['all']['nll'] == pytest.approx(
        np.mean([case['voxelwise']['all']['nll'] for case in results['cases']]))
    assert sum(results['reliability']['all']['voxels']) == 5 * np.prod(SHAPE)
    assert '<svg' in (data.pred / OUTPUTS[2]).read_text()
    assert 'adapt.ECE' in capsys.readouterr().out


def test_an_uncertainty_map_takes_the_place_of_the_entropy(data):
    probabilities = data.add_probabilities()
    from_entropy = data.evaluate()['voxelwise']['all']
    for case, array in probabilities.items():
        entropy = class_statistics(array.astype(np.float32), np.zeros(SHAPE, int)).entropy
        write(data.pred / 'uncertainty' / f'{case}_uncertainty.nii.gz', 1 - entropy)
    from_map = data.evaluate()['voxelwise']['all']
    assert from_map['auroc'] == pytest.approx(1 - from_entropy['auroc'], abs=1e-6)
    assert from_map['aurc'] > from_entropy['aurc']
    assert from_map['nll'] == from_entropy['nll']
    for case in probabilities:
        (data.pred / f'{case}.npz').unlink()
    alone = data.evaluate()
    assert alone['voxelwise']['all'] == {'voxels': np.prod(SHAPE), **{k: from_map[k] for k in ('aurc', 'auroc')}}
    assert not (data.pred / OUTPUTS[2]).exists()  # that of the earlier evaluation is gone


def test_perfect_uncertainty_has_an_auroc_of_one(data):
    for case in data.references:
        wrong = (data.references[case] != data.predictions[case]).astype(np.float32)
        write(data.pred / 'uncertainty' / f'{case}_uncertainty.nii.gz', wrong)
    assert data.evaluate()['voxelwise']['all']['auroc'] == 1


def test_region_probabilities_are_two_class_problems(data):
    data.describe(REGIONS, regions_class_order=[1, 2])
    case, truth = 'case_3', data.references['case_3']
    p = np.random.default_rng(0).random((2, *SHAPE)).astype(np.float32)
    np.savez_compressed(data.pred / f'{case}.npz', probabilities=p)
    results = data.evaluate()
    inside = np.stack([truth > 0, truth == 2])
    true_probability = np.where(inside, p, 1 - p)
    found = results['cases'][3]['voxelwise']['all']
    assert found['nll'] == pytest.approx(-np.log(np.clip(true_probability, 1e-6, 1)).mean(), rel=1e-4)
    assert found['brier'] == pytest.approx(2 * ((1 - true_probability) ** 2).mean(), rel=1e-4)
    assert 'calibration (NLL, Brier, ECE): needs CASE.npz from --save_probabilities (4 of 5 cases lack it)' in results[
        'not_computed']


def test_voxels_of_the_ignore_label_do_not_matter(data):
    data.describe({**LABELS, 'ignore': 3})
    for case, mask in data.references.items():
        mask[:, :, :5] = 3
        write(data.ref / f'{case}.nii.gz', mask)
    probabilities, samples = data.add_probabilities(), data.add_samples()
    data.add_raters()
    before = data.evaluate(raters=True)
    rng = np.random.default_rng(0)
    for case, mask in data.predictions.items():
        garbage = rng.integers(0, 3, SHAPE).astype(np.uint8)
        mask[:, :, :5] = garbage[:, :, :5]
        write(data.pred / f'{case}.nii.gz', mask)
        probabilities[case][..., :5] = np.eye(3)[garbage[..., :5]].transpose(3, 0, 1, 2)
        np.savez_compressed(data.pred / f'{case}.npz', probabilities=probabilities[case])
        samples[case][1, :, :, :5] = garbage[:, :, :5]
        write(data.pred / 'samples' / f'{case}_s01.nii.gz', samples[case][1])
    assert data.evaluate(raters=True) == before


# estimates, samples and raters

def summary_of(data: Data, estimated: Callable[[int], float]) -> list[dict[str, Any]]:
    """Entries as nnUNetv2_pdddpm_predict writes them; every other interval holds the reference's volume."""
    entries = []
    for i, (case, mask) in enumerate(data.references.items()):
        labels = {}
        for name, value in (('organ', 1), ('lesion', 2)):
            volume = float((mask == value).sum() * np.prod(SPACING) / 1000)
            low = volume * (0.9 if i % 2 == 0 else 1.1)
            labels[name] = {'volume_ml': volume, 'volume_ml_mean': volume, 'volume_ml_sd': 0.1, 'volume_ml_low': low,
                            'volume_ml_high': low + 0.2 * volume, 'interval_level': 0.95, 'samples_low_ml': 0,
                            'samples_high_ml': volume,
                            'estimated_dice': estimated(i), 'components': 1}
        entries.append({'case': case, 'labels': labels, 'estimated_dice': estimated(i), 'seconds': 2.5,
                        'mask': identity(data.pred / f'{case}.nii.gz')})
    return entries


def test_estimates_of_the_summary_are_compared_with_the_truth(data):
    entries = summary_of(data, lambda i: [0.9, 0.5, 0.8, 0.7, 0.65][i])
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({'cases': entries, 'settings': {'seed': 0}}))
    data.add_samples()  # the summary goes first
    results = data.evaluate()
    estimated = [entry['estimated_dice'] for entry in entries]
    for name, true in (('case', [case['dice'] for case in results['cases']]),
                       ('lesion', column(results, 'lesion', 'dice'))):
        of = results['estimated_dice'][name]
        assert of['n'] == 5
        assert of['spearman'] == pytest.approx(spearmanr(estimated, true).statistic)
        assert of['pearson'] == pytest.approx(pearsonr(estimated, true).statistic)
    assert column(results, 'organ', 'reference_in_interval') == [1, 0, 1, 0, 1]
    assert results['foreground_mean']['reference_in_interval'] == pytest.approx(0.6)
    assert column(results, 'organ', 'reference_in_range') == [1] * 5
    assert results['mean']['lesion']['estimated_dice'] == pytest.approx(np.mean(estimated))


def table_of(printed: str, title: str) -> dict[str, dict[str, str]]:
    """Row -> title of the column -> what is printed, of the table with a column of this title."""
    lines = [[line[:10].strip(), *(line[i:i + 12].strip() for i in range(10, len(line), 12))]
             for line in printed.splitlines()]
    start = next(i for i, line in enumerate(lines) if line[0] == '' and title in line)
    return {name: dict(zip(lines[start][1:], values, strict=True)) for name, *values in lines[start + 1:start + 4]}


def test_estimated_and_true_dice_are_means_over_the_same_cases(data, capsys):
    """Case 0 has no label in mask and reference, and case 1 has no estimate."""
    entries = summary_of(data, lambda i: [0.99, 0.5, 0.8, 0.7, 0.6][i])
    empty = np.zeros(SHAPE, np.uint8)
    for folder in (data.ref, data.pred):
        write(folder / 'case_0.nii.gz', empty)
    entries[0]['mask'] = identity(data.pred / 'case_0.nii.gz')
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({'cases': [entries[0], *entries[2:]]}))
    results = data.evaluate()
    table = table_of(capsys.readouterr().out, 'est. Dice')
    true = {name: np.mean(column(results, name, 'dice')[2:]) for name in ('organ', 'lesion')}
    for name, dice in {**true, 'mean': np.mean(list(true.values()))}.items():
        assert float(table[name]['est. Dice']) == pytest.approx(0.7)
        assert float(table[name]['Dice']) == pytest.approx(dice, abs=1e-4)
    for name, dice in true.items():
        of = results['estimated_dice'][name]
        assert (of['n'], of['estimated_dice'], of['dice']) == (3, pytest.approx(0.7), pytest.approx(dice))
        assert results['mean'][name]['estimated_dice'] == pytest.approx(0.7)
        assert results['mean'][name]['dice'] == pytest.approx(np.mean(column(results, name, 'dice')[1:]))
    assert results['cases'][0]['labels']['organ']['estimated_dice'] == 0.99


def test_ends_without_a_level_are_no_interval(data):
    """They promise nothing."""
    entries = summary_of(data, lambda i: 0.5)
    for entry in entries:
        del entry['labels']['organ']['interval_level']
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({'cases': entries}))
    results = data.evaluate()
    assert column(results, 'organ', 'reference_in_interval') == [None] * 5
    assert column(results, 'lesion', 'reference_in_interval') == [1, 0, 1, 0, 1]


def test_a_summary_without_a_case_or_a_value_leaves_it_undefined(data):
    entries = summary_of(data, lambda i: 0.5 + 0.1 * i)[:4]
    entries[0]['labels'] = {}
    entries[1]['estimated_dice'] = None
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({'cases': entries}))
    results = data.evaluate()
    assert results['cases'][0]['labels']['organ']['estimated_dice'] is None
    assert results['cases'][1]['estimated_dice'] is None
    assert results['estimated_dice']['case']['n'] == 3
    assert any('estimated Dice' in line and '(1 of 5 cases lack it)' in line for line in results['not_computed'])


def test_what_is_known_of_a_mask_is_not_used_for_another_one(data):
    """One was corrected by hand, one is of stock nnU-Net, two were exchanged, and one row lacks the checksum."""
    entries = summary_of(data, lambda i: 0.5 + 0.1 * i)
    data.add_samples()
    data.add_probabilities()
    before = data.evaluate()
    write(data.pred / 'case_0.nii.gz', data.references['case_0'])
    entries = [entry for entry in entries if entry['case'] != 'case_1']
    del entries[1]['mask']
    for one, other in ((3, 4), (4, 3)):
        write(data.pred / f'case_{one}.nii.gz', data.predictions[f'case_{other}'])
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({'cases': entries}))
    results = data.evaluate()
    assert 'aurc' in before['cases'][0]['voxelwise']['all'] and 'estimated_dice' in before['cases'][0]
    for case, earlier in zip(results['cases'], before['cases'], strict=True):
        assert 'estimated_dice' not in case and 'volume_low_ml' not in case['labels']['organ']
        assert case['voxelwise']['all'] == {key: value for key, value in earlier['voxelwise']['all'].items()
                                            if key not in ('aurc', 'auroc')}  # calibration is that of the probabilities
        assert case['labels']['organ']['crps_volume_ml'] == earlier['labels']['organ']['crps_volume_ml']
    assert results['cases'][0]['dice'] == 1
    another, = (line for line in results['not_computed'] if 'the mask that is there' in line)
    assert 'of case_0, case_1, case_2, case_3, case_4: the mask that is there is not the one that' in another


def test_a_corrected_mask_leaves_the_others_their_estimates(data):
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({'cases': summary_of(data, lambda i: 0.5)}))
    write(data.pred / 'case_3.nii.gz', data.references['case_3'])
    results = data.evaluate()
    assert [case.get('estimated_dice') for case in results['cases']] == [0.5, 0.5, 0.5, None, 0.5]
    assert all(('samples_low_ml' in case['labels']['organ']) == (case['case'] != 'case_3') for case in results['cases'])
    assert any('of case_3: the mask' in line for line in results['not_computed'])


def test_a_mask_of_an_earlier_prediction_is_in_no_mean(data):
    of_all = data.evaluate()['cases']
    entries = [entry for entry in summary_of(data, lambda i: 0.5) if entry['case'] != 'case_2']
    (data.pred / 'pdddpm_summary.json').write_text(json.dumps({
        'cases': entries, 'failed': [{'case': 'case_2', 'error': 'case_2_0000.nii.gz is empty'}]}))
    message, results = data.partly()
    why = ('the last prediction of it failed, case_2_0000.nii.gz is empty, and its mask is an earlier one: predict it '
           'again, or take it out of "failed" in pdddpm_summary.json if the mask is right')
    assert message == f'Error: 1 of 5 cases could not be evaluated, the others are done: case_2 ({why})'
    assert results['failed'] == [{'case': 'case_2', 'error': why}]
    others = [case for case in of_all if case['case'] != 'case_2']
    assert [case['case'] for case in results['cases']] == [case['case'] for case in others]
    assert results['num_cases'] == 4
    for name, means in results['mean'].items():
        assert means['dice'] == pytest.approx(np.mean([case['labels'][name]['dice'] for case in others]))


def test_samples_alone_give_estimates_their_range_and_diversity(data):
    samples = data.add_samples()
    results = data.evaluate()
    assert results['samples'] == [4]
    for case, masks in zip(results['cases'], samples.values(), strict=True):
        lesions = masks == 2
        pairs = [(i, j) for i in range(4) for j in range(i)]
        mask = data.predictions[case['case']] == 2
        dice = 2 * sum((mask & own).sum() for own in lesions) / sum(mask.sum() + own.sum() for own in lesions)
        iou = [(lesions[i] & lesions[j]).sum() / (lesions[i] | lesions[j]).sum() for i, j in pairs]
        of = case['labels']['lesion']
        assert of['estimated_dice'] == pytest.approx(dice)
        assert of['sample_diversity'] == pytest.approx(1 - np.mean(iou))
        volumes = lesions.sum((1, 2, 3)) * np.prod(SPACING) / 1000
        ends = volumes.min(), volumes.max()
        assert (of['samples_low_ml'], of['samples_high_ml']) == pytest.approx(ends, rel=1e-5)
        assert of['reference_in_range'] == float(ends[0] - 1e-6 <= of['reference_volume_ml'] <= ends[1] + 1e-6)
        assert 'volume_low_ml' not in of and 'reference_in_interval' not in of  # samples alone are not calibrated


def test_samples_against_raters(data, capsys):
    samples, raters = data.add_samples(), data.add_raters()
    results = data.evaluate(raters=True)
    for case in results['cases']:
        s, r = (masks[case['case']] == 1 for masks in (samples, raters))
        cross = iou_matrix(s, r)
        of = case['labels']['organ']
        assert of['ged_squared'] == pytest.approx(ged_squared(cross, iou_matrix(s, s), iou_matrix(r, r)))
        assert of['best_dice'] == pytest.approx((2 * cross / (1 + cross)).max(0).mean())
        assert cross.mean() <= of['hm_iou'] <= cross.max()
        volumes = r.sum((1, 2, 3)) * np.prod(SPACING) / 1000
        inside = [of['samples_low_ml'] - 1e-6 <= v <= of['samples_high_ml'] + 1e-6 for v in volumes]
        assert of['raters_in_range'] == pytest.approx(np.mean(inside))
    assert set(results['best_dice_per_rater']) == {'dr_0', 'dr_1', 'dr_2'}
    assert '4 samples against 3 raters' in capsys.readouterr().out
    assert [line.partition(':')[0] for line in results['not_computed']] == [
        'calibration (NLL, Brier, ECE)', 'error against uncertainty (AURC, AUROC)']


def test_where_cases_have_no_raters_the_others_are_compared(data, capsys):
    """Case 0 has no rater, case 1 one, and case 2 no samples."""
    data.add_samples()
    data.add_raters()
    for file in (*data.raters.glob('case_0__*'), *data.raters.glob('case_1__dr_[12]*'),
                 *(data.pred / 'samples').glob('case_2_*')):
        file.unlink()
    results = data.evaluate(raters=True)
    printed = capsys.readouterr().out
    rows = [case['labels']['organ'] for case in results['cases']]
    assert [row.get('ged_squared_fair') is None for row in rows] == [False, False, True, False, False]
    for metric, title in (('sample_diversity', 'div. samp.'), ('rater_diversity', 'div. rat.'),
                          ('ged_squared_fair', 'fair GED^2')):
        mean = np.mean([row[metric] for row in rows[3:]])
        assert results['mean']['organ'][metric] == pytest.approx(mean)
        assert float(table_of(printed, title)['organ'][title]) == pytest.approx(mean, abs=1e-4)
    assert 'fair GED^2 over the cases with several raters' in printed
    assert results['mean']['organ']['crps_volume_ml'] == pytest.approx(
        np.mean([row['crps_volume_ml'] for row in rows if 'crps_volume_ml' in row]))


def test_of_single_raters_all_cases_are_compared(data, capsys):
    data.add_samples()
    data.add_raters(1)
    (data.raters / 'case_0__dr_0.nii.gz').unlink()
    results = data.evaluate(raters=True)
    for metric in ('sample_diversity', 'ged_squared_fair'):
        assert results['mean']['organ'][metric] == pytest.approx(np.mean(column(results, 'organ', metric)))
    assert 'over the cases with several raters' not in capsys.readouterr().out


def test_however_many_cases_there_are_the_raters_masks_are_listed_once(data, monkeypatch):
    data.add_samples()
    data.add_raters()
    listed = []

    def images_in(folder: Path, ending: str) -> list[Path]:
        listed.append(folder)
        return image_files.images_in(folder, ending)
    monkeypatch.setattr(folders_module, 'images_in', images_in)
    assert [case['raters'] for case in data.evaluate(raters=True)['cases']] == [3] * 5
    assert listed.count(data.raters) == 1 and len(listed) <= 5


def test_without_samples_the_mask_is_the_only_sample(data, capsys):
    raters = data.add_raters()
    results = data.evaluate(raters=True)
    case = results['cases'][2]
    mask, masks = data.predictions['case_2'][None] == 1, raters['case_2'] == 1
    assert case['labels']['organ']['ged_squared'] == pytest.approx(
        ged_squared(iou_matrix(mask, masks), np.ones((1, 1)), iou_matrix(masks, masks)))
    assert case['samples'] == 1
    assert '1 samples against 3 raters' in capsys.readouterr().out
