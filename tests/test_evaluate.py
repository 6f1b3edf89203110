"""`nnUNetv2_pdddpm_evaluate` on folders as prediction commands write them."""
from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
from scipy.ndimage import gaussian_filter
from scipy.stats import pearsonr, spearmanr
from skimage import io

from nnunet_pdddpm import image_files
from nnunet_pdddpm.commands.evaluate import main
from nnunet_pdddpm.demo.phantom import make_case, oblique_direction
from nnunet_pdddpm.evaluation import folders as folders_module
from nnunet_pdddpm.evaluation.cases import evaluate_case
from nnunet_pdddpm.evaluation.overlap import iou_matrix
from nnunet_pdddpm.evaluation.raters import ged_squared
from nnunet_pdddpm.evaluation.surfaces import hd95_and_surface_dice
from nnunet_pdddpm.evaluation.voxelwise import class_statistics
from nnunet_pdddpm.files import identity

SHAPE, SPACING = (14, 18, 16), (2.5, 1.0, 0.8)
LABELS = {'background': 0, 'organ': 1, 'lesion': 2}
REGIONS = {'background': 0, 'whole': [1, 2], 'lesion': 2}
OUTPUTS = ('evaluation.json', 'evaluation.csv', 'evaluation_reliability.svg')


def write(file: Path, array: np.ndarray, spacing=SPACING, origin=(3.0, -7.0, 11.0), direction=None) -> None:
    """An image (z, y, x) with an oblique direction; spacing in that order, too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    image.SetDirection(direction or oblique_direction())
    sitk.WriteImage(image, str(file))


def soft(mask: np.ndarray, seed: int) -> np.ndarray:
    """Probabilities (3, z, y, x) whose argmax is about the mask."""
    rng = np.random.default_rng(seed)
    channels = np.stack([gaussian_filter((mask == c).astype(float), 1) + 0.05 * rng.random(mask.shape)
                         for c in range(3)])
    return (channels / channels.sum(0)).astype(np.float16)


def variant(mask: np.ndarray, seed: int) -> np.ndarray:
    """Another plausible mask: moved by up to two voxels."""
    return np.roll(mask, tuple(np.random.default_rng(seed).integers(-1, 3, 2)), (1, 2))


@dataclass
class Data:
    """Folders of five cases and the arrays that were written into them."""
    root: Path
    references: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]

    @property
    def pred(self) -> Path:
        return self.root / 'pred'

    @property
    def ref(self) -> Path:
        return self.root / 'ref'

    @property
    def raters(self) -> Path:
        return self.root / 'raters'

    def describe(self, labels: dict[str, Any], **more: Any) -> None:
        dataset = {'labels': labels, 'file_ending': '.nii.gz', 'channel_names': {'0': 'T1'}, **more}
        (self.pred / 'dataset.json').write_text(json.dumps(dataset))
        (self.pred / 'plans.json').write_text(json.dumps({'label_manager': 'LabelManager'}))

    def add_probabilities(self) -> dict[str, np.ndarray]:
        arrays = {case: soft(mask, i) for i, (case, mask) in enumerate(self.predictions.items())}
        for case, array in arrays.items():
            np.savez_compressed(self.pred / f'{case}.npz', probabilities=array)
        return arrays

    def add_samples(self, number: int = 4) -> dict[str, np.ndarray]:
        arrays = {case: np.stack([variant(mask, 10 * i + s) for s in range(number)])
                  for i, (case, mask) in enumerate(self.predictions.items())}
        for case, masks in arrays.items():
            for s, mask in enumerate(masks):
                write(self.pred / 'samples' / f'{case}_s{s:02d}.nii.gz', mask)
        return arrays

    def add_raters(self, number: int = 3) -> dict[str, np.ndarray]:
        arrays = {case: np.stack([variant(mask, 100 * i + r) for r in range(number)])
                  for i, (case, mask) in enumerate(self.references.items())}
        for case, masks in arrays.items():
            for r, mask in enumerate(masks):
                write(self.raters / f'{case}__dr_{r}.nii.gz', mask)
        return arrays

    def evaluate(self, *flags: str, raters: bool = False) -> dict[str, Any]:
        """Run the command in this process; what evaluation.json holds."""
        main(['-pred', str(self.pred), '-ref', str(self.ref), '-np', '1', '--disable_progress_bar', *flags,
              *(['-raters', str(self.raters)] if raters else [])])

        def refuse(constant: str) -> None:
            raise AssertionError(f'{constant} is no JSON')
        return json.loads((self.pred / 'evaluation.json').read_text(), parse_constant=refuse)

    def partly(self, *flags: str, raters: bool = False) -> tuple[str, dict[str, Any]]:
        """Run the command, which must do what it can and then exit with one sentence; that, and evaluation.json."""
        with pytest.raises(SystemExit) as stop:
            self.evaluate(*flags, raters=raters)
        message = str(stop.value.code)
        assert message.startswith('Error: ') and '\n' not in message
        return message, json.loads((self.pred / 'evaluation.json').read_text())

    def fails(self, *flags: str, raters: bool = False) -> str:
        """Run the command, which must exit with one sentence and leave earlier results alone; the sentence."""
        for name in OUTPUTS:
            (self.pred / name).write_text('earlier')
        with pytest.raises(SystemExit) as stop:
            self.evaluate(*flags, raters=raters)
        assert all((self.pred / name).read_text() == 'earlier' for name in OUTPUTS)
        assert not list(self.pred.glob('.evaluation*'))
        message = str(stop.value.code)
        assert message.startswith('Error: ') and '\n' not in message
        return message


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """References of five phantoms, and masks that are off by some voxels, as nnUNetv2_predict leaves them."""
    references = {f'case_{i}': make_case(SHAPE, i)[1] for i in range(5)}
    made = Data(tmp_path, references, {case: variant(mask, 7 + i) for i, (case, mask) in enumerate(references.items())})
    for case in references:
        write(made.ref / f'{case}.nii.gz', made.references[case])
        write(made.pred / f'{case}.nii.gz', made.predictions[case])
    made.describe(LABELS)
    return made


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


# scores of samples

SCORES = ('ged_squared_fair', 'crps_volume_ml', 'crps_components', 'energy_octants_ml', 'energy_components_ml')


def of_points(shape: tuple[int, ...], *points: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    for point in points:
        mask[point] = 1
    return mask


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


# folders

def test_natural_images(tmp_path, capsys):
    data = Data(tmp_path, {}, {})
    data.pred.mkdir()
    data.ref.mkdir()
    data.describe({'background': 0, 'cell': 1}, file_ending='.png')
    masks = [np.zeros((30, 40), np.uint8) for _ in range(2)]
    masks[0][5:15, 5:25] = masks[1][8:18, 5:25] = 1
    for folder, mask in zip((data.ref, data.pred), masks, strict=True):
        io.imsave(folder / 'image.png', mask, check_contrast=False)
    of = data.evaluate()['cases'][0]['labels']['cell']
    assert (of['dice'], of['hd95_mm']) == (pytest.approx(0.7), 3)
    assert of['volume_ml'] == pytest.approx(0.2)


def test_no_diagram_lies_among_masks_that_are_png_files(tmp_path):
    data, mask = Data(tmp_path, {}, {}), of_points((30, 40), (5, 5), (6, 5))
    for folder in (data.ref, data.pred):
        folder.mkdir()
        io.imsave(folder / 'image.png', mask, check_contrast=False)
    data.describe({'background': 0, 'cell': 1}, file_ending='.png')
    np.savez_compressed(data.pred / 'image.npz', probabilities=np.stack([1 - mask, mask])[:, None].astype(np.float16))
    for _ in range(2):
        assert data.evaluate()['left_out'] == []
    assert [file.name for file in data.pred.glob('*.png')] == ['image.png'] and (data.pred / OUTPUTS[2]).is_file()


def test_the_command_with_two_processes_gives_the_same_files(data):
    data.add_probabilities()
    data.evaluate()
    command = [sys.executable, '-m', 'nnunet_pdddpm.commands.evaluate', '-pred', str(data.pred), '-ref', str(data.ref),
               '-np', '2', '-o', str(data.root / 'out' / 'deep'), '-djfile', str(data.pred / 'dataset.json'), '-pfile',
               str(data.pred / 'plans.json')]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert '5/5' in result.stderr  # the progress bar
    for name in OUTPUTS:
        assert (data.root / 'out' / 'deep' / name).read_bytes() == (data.pred / name).read_bytes()


def test_missing_predictions_are_refused_unless_chill(data):
    (data.pred / 'case_1.nii.gz').unlink()
    (data.pred / 'case_4.nii.gz').unlink()
    message = data.fails()
    assert '2 of 5 references (case_1, case_4)' in message and '--chill' in message
    assert [case['case'] for case in data.evaluate('--chill')['cases']] == ['case_0', 'case_2', 'case_3']


@pytest.mark.parametrize('which', ['case_2.nii.gz', 'uncertainty/case_2_uncertainty.nii.gz',
                                   'samples/case_2_s00.nii.gz', 'rater'])
@pytest.mark.parametrize('change', ['shape', 'spacing', 'origin', 'direction'])
def test_a_case_of_another_geometry_is_named_and_the_others_are_done(data, which, change):
    array = np.zeros(SHAPE if change != 'shape' else (*SHAPE[:2], SHAPE[2] + 1),
                     np.float32 if 'uncertainty' in which else np.uint8)
    file = data.raters / 'case_2__a.nii.gz' if which == 'rater' else data.pred / which
    write(file, array, spacing=(2.5, 1.0, 0.81) if change == 'spacing' else SPACING,
          origin=(3.0, -7.0, 11.5) if change == 'origin' else (3.0, -7.0, 11.0),
          direction=oblique_direction(21) if change == 'direction' else None)
    if which == 'rater':
        write(data.raters / 'case_0__a.nii.gz', data.references['case_0'])
    message, results = data.partly(raters=which == 'rater')
    assert f'differ in {change}' in message and str(file) in message and str(data.ref / 'case_2.nii.gz') in message
    assert [case['case'] for case in results['cases']] == ['case_0', 'case_1', 'case_3', 'case_4']


def test_rounding_of_the_geometry_is_accepted(data):
    write(data.pred / 'case_2.nii.gz', data.predictions['case_2'], spacing=(2.5001, 1.0, 0.8),
          origin=(3.01, -7.0, 11.0), direction=oblique_direction(20.001))
    assert len(data.evaluate()['cases']) == 5


def unknown_label(data: Data) -> None:
    write(data.ref / 'case_0.nii.gz', data.references['case_0'] * 4)


def fractional_label(data: Data) -> None:
    write(data.pred / 'case_0.nii.gz', data.predictions['case_0'] * np.float32(0.5))


def almost_a_label(data: Data) -> None:
    write(data.ref / 'case_0.nii.gz', data.references['case_0'] * np.float32(0.9999999))


def not_finite(which: str, value: float) -> Callable[[Data], None]:
    def spoil(data: Data) -> None:
        mask = data.references['case_0'].astype(np.float32)
        mask[1, 2, 3:5] = value
        write(data.root / which / 'case_0.nii.gz', mask)
    return spoil


def damaged(name: str) -> Callable[[Data], None]:
    return lambda data: (data.pred / name).write_bytes(b'damaged') and None


def truncated(name: str) -> Callable[[Data], None]:
    return lambda data: (data.pred / name).write_bytes((data.pred / name).read_bytes()[:-30]) and None


def npz(array: np.ndarray, key: str = 'probabilities') -> Callable[[Data], None]:
    return lambda data: np.savez(data.pred / 'case_0.npz', **{key: array})


def rater_of_another_case(data: Data) -> None:
    write(data.raters / 'other__1.nii.gz', data.references['case_0'])


@pytest.mark.parametrize(('damage', 'words'), [
    (unknown_label, ['ref/case_0.nii.gz', 'label values such as 4', '(0, 1, 2)', '-djfile']),
    (fractional_label, ['pred/case_0.nii.gz', 'label values such as 0.5']),
    (almost_a_label, ['ref/case_0.nii.gz', 'label values such as 0.9999999 that']),
    (not_finite('ref', np.nan), ['ref/case_0.nii.gz: 2 of 4032 voxels are NaN or infinite']),
    (not_finite('ref', np.inf), ['ref/case_0.nii.gz: 2 of 4032 voxels are NaN or infinite']),
    (not_finite('pred', np.nan), ['pred/case_0.nii.gz: 2 of 4032 voxels are NaN or infinite']),
    (damaged('case_0.nii.gz'), ['pred/case_0.nii.gz cannot be read']),
    (truncated('case_0.nii.gz'), ['pred/case_0.nii.gz cannot be read: it is truncated']),
    (damaged('../ref/case_0.nii.gz'), ['ref/case_0.nii.gz cannot be read']),  # by which the reader is chosen
    (truncated('../ref/case_0.nii.gz'), ['ref/case_0.nii.gz cannot be read: it is truncated']),
    (lambda data: (data.ref / 'case_0.nii.gz').write_bytes(b''), ['ref/case_0.nii.gz cannot be read: it is empty']),
    (damaged('case_0.npz'), ['pred/case_0.npz is not what --save_probabilities writes']),
    (npz(np.zeros((3, *SHAPE)), 'softmax'), ['pred/case_0.npz is not what --save_probabilities writes']),
    (npz(np.zeros((4, *SHAPE))), ['(4, 14, 18, 16)', 'need (3, 14, 18, 16)', 'predict the case again']),
    (npz(np.full((3, *SHAPE), 1.5)), ['pred/case_0.npz has values outside of 0 to 1']),
    (npz(np.full((3, *SHAPE), np.nan)), ['pred/case_0.npz has values outside of 0 to 1']),
])
def test_a_case_with_an_unusable_file_is_named_with_its_reason_and_the_others_are_done(data, damage, words):
    of_all = {case['case']: case for case in data.evaluate()['cases']}
    damage(data)
    message, results = data.partly()
    assert message.startswith('Error: 1 of 5 cases could not be evaluated, the others are done: '
                              'case_0 (')
    assert all(word in message for word in words), message
    assert results['num_cases'] == 4 and results['cases'] == [of_all[f'case_{i}'] for i in range(1, 5)]
    failed, = results['failed']
    assert failed['case'] == 'case_0' and all(word in failed['error'] for word in words)
    rows = list(csv.DictReader((data.pred / 'evaluation.csv').open(newline='')))
    assert [row['error'] for row in rows] == [''] * 8 + [failed['error']] and rows[-1]['case'] == 'case_0'


def test_bad_cases_are_named_by_background_processes_too(data):
    unknown_label(data)
    (data.pred / 'case_3.nii.gz').write_bytes(b'')
    message, results = data.partly('-np', '2')
    assert '2 of 5 cases' in message and 'case_0 (' in message
    assert 'case_3.nii.gz cannot be read: it is empty)' in message
    assert [case['case'] for case in results['cases']] == ['case_1', 'case_2', 'case_4']


def test_where_no_case_can_be_evaluated_nothing_is_written(data):
    for case, array in data.references.items():
        write(data.ref / f'{case}.nii.gz', array * 4)
    message = data.fails()
    assert 'ref/case_0.nii.gz has label values such as 4' in message
    assert message.endswith('The other 4 cases cannot be evaluated either.')
    for case in data.references:
        (data.ref / f'{case}.nii.gz').write_bytes(b'')
    assert data.fails().endswith("None of nnU-Net's readers can read "
                                 f'{data.ref / "case_0.nii.gz"}, nor another of the references.')


def test_a_case_that_memory_is_not_enough_for_fails_alone(data, monkeypatch):
    def too_large(folders, case: str, tolerance: float):
        if case == 'case_3':
            raise MemoryError('Unable to allocate 90 GiB')
        return evaluate_case(folders, case, tolerance)
    monkeypatch.setattr('nnunet_pdddpm.evaluation.evaluate.evaluate_case', too_large)
    message, results = data.partly()
    assert message.startswith('Error: 1 of 5 cases could not be evaluated, the others are done: case_3 (there is not '
                              'enough memory for it: ')
    assert [case['case'] for case in results['cases']] == ['case_0', 'case_1', 'case_2', 'case_4']


def test_an_error_of_the_program_is_none_of_a_case(data, monkeypatch):
    def wrong(*args):
        raise KeyError('of the program')
    monkeypatch.setattr('nnunet_pdddpm.evaluation.cases.hd95_and_surface_dice', wrong)
    with pytest.raises(KeyError, match='of the program'):
        data.evaluate()


@pytest.mark.parametrize(('damage', 'words'), [
    (damaged('pdddpm_summary.json'), ['pred/pdddpm_summary.json is empty or damaged: predict again']),
    (lambda data: (data.pred / 'pdddpm_summary.json').write_text(''), ['pdddpm_summary.json is empty or damaged']),
    (lambda data: (data.pred / 'pdddpm_summary.json').write_text('{}'), [
        'pdddpm_summary.json is not what nnUNetv2_pdddpm_predict writes']),
    (damaged('dataset.json'), ['pred/dataset.json is empty or damaged', '-djfile']),
    (damaged('plans.json'), ['pred/plans.json is empty or damaged', '-pfile']),
    (lambda data: (data.pred / 'dataset.json').write_text('{}'), ['do not fit together', '-djfile']),
    (lambda data: (data.pred / 'dataset.json').write_text('[]'), ['not a dataset of nnU-Net', '-djfile']),
    (lambda data: data.describe({'background': 0, 'organ': 'one'}), ['do not fit together', '-djfile']),
    (lambda data: data.describe({'background': 0, 'organ': 1, 'lesion': []}), ['do not fit together', '-djfile']),
    (lambda data: data.describe({'background': 0, 'organ': 1, 'lesion': {}}), ['do not fit together', '-djfile']),
    (lambda data: data.describe(LABELS, file_ending='.nrrd'), ['have no *.nrrd files of the same name']),
])
def test_unusable_input_is_refused_in_one_sentence(data, damage, words):
    damage(data)
    message = data.fails()
    assert all(word in message for word in words), message


APPLE = bytes([0, 5, 22, 7, 0, 2, 0, 0]) + b'Mac OS X        '


def test_masks_that_are_not_compared_are_named_and_what_macos_writes_beside_files_is_none(data, capsys):
    of_all = data.evaluate()['mean']
    for folder in (data.ref, data.pred):
        (folder / '._case_0.nii.gz').write_bytes(APPLE)
    for name in ('case_0.nii', 'case_1.NII.GZ', 'case_9.nrrd'):
        write(data.root / name.lower(), data.references['case_0'])
        (data.root / name.lower()).rename(data.ref / name)
    write(data.pred / 'other.nii.gz', data.references['case_0'])
    write(data.raters / 'case_0__1.nii.gz', data.references['case_0'])
    write(data.raters / 'case0__1.nii.gz', data.references['case_0'])
    capsys.readouterr()
    results = data.evaluate(raters=True)
    said = [f'3 files in {data.ref} do not end in .nii.gz: case_0.nii, case_1.NII.GZ, case_9.nrrd',
            f'1 masks in {data.raters} belong to no reference: case0__1.nii.gz',
            f'1 masks in {data.pred} have no reference: other.nii.gz']
    assert results['left_out'] == said
    assert [line for line in capsys.readouterr().out.splitlines() if 'Not compared' in line] == [
        f'Not compared: {line}' for line in said]
    assert results['num_cases'] == 5 and results['mean']['organ']['dice'] == of_all['organ']['dice']


@pytest.mark.parametrize(('rater', 'name'), [
    ('case_0__b__r1', 'case_0, by b__r1'), ('case_1__dr__smith', 'case_1, by dr__smith'),
    ('case_2____', 'case_2, by __')])
def test_a_rater_whose_name_holds_the_separator_is_told_in_one_line(data, capsys, rater, name):
    write(data.raters / 'case_4__1.nii.gz', data.references['case_4'])
    assert data.evaluate(raters=True)['doubtful'] == []
    write(data.raters / f'{rater}.nii.gz', data.references['case_0'])
    capsys.readouterr()
    results = data.evaluate(raters=True)
    said = (f'1 masks in {data.raters} have a rater with __ in the name, unless a reference is missing: {rater}.nii.gz '
            f'(of {name})')
    assert results['doubtful'] == [said]
    assert [line for line in capsys.readouterr().out.splitlines() if 'rater with __' in line] == [
        f'Look at this: {said}']


def test_unusable_folders_are_refused_in_one_sentence(data):
    assert f'There is no folder {data.root / "x"}.' in data.fails('-ref', str(data.root / 'x'))
    assert f'There is no folder {data.raters}.' in data.fails(raters=True)
    rater_of_another_case(data)
    assert 'CASE__RATER.nii.gz, such as case_0__1.nii.gz' in data.fails(raters=True)
    assert 'dataset.json cannot be read' in data.fails('-djfile', str(data.root / 'dataset.json'))
    assert str(data.pred / 'case_0.nii.gz') in data.fails('-o', str(data.pred / 'case_0.nii.gz'))


@pytest.mark.parametrize('flags', [['-np', '0'], ['-nsd_tolerance', '-1'], ['-nsd_tolerance', 'nan']])
def test_settings_out_of_range_are_refused(data, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        data.evaluate(*flags)
    assert stop.value.code == 2
    assert f'{flags[0]} must be' in capsys.readouterr().err
