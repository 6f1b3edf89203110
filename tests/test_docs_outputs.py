"""docs/reference/outputs.md has every file and every field that the commands write, and no other."""
from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_model import plans, write_model

from nnunet_pdddpm.commands import evaluate, predict
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.choice import MaskRow, SampleRow
from nnunet_pdddpm.tuning.report import write_sweep
from nnunet_pdddpm.tuning.sweep import Sweep

DOCS = Path(__file__).parent.parent / 'docs'
PAGE = DOCS / 'reference' / 'outputs.md'

if not PAGE.is_file():
    pytest.skip('the docs are not beside the tests', allow_module_level=True)


def names(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall('`([^`]+)`', text)


def tables(section: str) -> dict[str, dict[str, str]]:
    """Of a section: head of a table's first column -> a name in that column -> the second cell."""
    of_section = re.split(r'^## ', PAGE.read_text(), flags=re.MULTILINE)
    lines = next(text for text in of_section if text.startswith(section + '\n')).splitlines()
    found: dict[str, dict[str, str]] = {}
    head = ''
    for line, below in zip(lines, [*lines[1:], ''], strict=True):
        first, second, *_ = (*(cell.strip() for cell in line.split('|')[1:]), '', '')
        if below.startswith('|---'):
            head = first
        elif line.startswith('|') and not line.startswith('|---'):
            found.setdefault(head, {}).update(dict.fromkeys(names(first), second))
    return found


def header(file: Path) -> list[str]:
    """Columns of a CSV."""
    with file.open() as lines:
        return next(csv.reader(lines))


@pytest.fixture(scope='module')
def output(tmp_path_factory) -> Path:
    """All that a prediction by two folds, of a good image and a bad one, and its evaluation write."""
    folder = tmp_path_factory.mktemp('outputs')
    images, out, references, raters = (folder / name for name in ('images', 'out', 'references', 'raters'))
    for made in (images, references, raters):
        made.mkdir()
    dataset = {'channel_names': {'0': 'MR'}, 'labels': {'background': 0, 'a': 1, 'b': 2}, 'file_ending': '.nii.gz',
               'numTraining': 1}
    model = write_model(folder / 'model', plans('SimpleITKIO', 3, 1), dataset)
    shutil.copytree(model / 'fold_0', model / 'fold_1')
    image = np.random.default_rng(0).normal(100, 40, (16, 16, 16)).astype(np.float32)
    sitk.WriteImage(sitk.GetImageFromArray(image), str(images / 'good_0000.nii.gz'))
    (images / 'bad_0000.nii.gz').write_bytes(b'')
    with pytest.raises(SystemExit):  # the bad one is named
        predict.main_modelfolder(['-i', str(images), '-o', str(out), '-m', str(model), '-f', '0', '1', '-device', 'cpu',
                                  '-npp', '0', '-nps', '0', '-samples', '4', '--disable_progress_bar', '--report',
                                  '--uncertainty', 'all', '--save_samples', '--save_probabilities'])
    shutil.copyfile(out / 'good.nii.gz', references / 'good.nii.gz')
    shutil.copyfile(out / 'good.nii.gz', raters / 'good__r1.nii.gz')
    evaluate.main(['-pred', str(out), '-ref', str(references), '-raters', str(raters), '-o', str(folder / 'evaluation'),
                   '-np', '1', '--disable_progress_bar'])
    return out


def test_files_of_a_prediction(output):
    stated = [name.replace('CASE', 'bad' if 'failed' in name else 'good')
              for name in tables('Output folder of a prediction')['file'] if not name.startswith(('.', '_s'))]
    patterns = [re.escape(name).replace('s00', r's\d\d').replace('LABEL', '[ab]') for name in stated]
    files = [file.relative_to(output).as_posix() for file in output.rglob('*') if file.is_file()]
    # the presegmentation of the report among them
    assert [name for name in files if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []
    assert [name for name in patterns if not any(re.fullmatch(name, file) for file in files)] == []


def test_fields_of_the_summary(output):
    stated, summary = tables('pdddpm_summary.json'), json.loads((output / 'pdddpm_summary.json').read_text())
    case, = summary['cases']
    assert case.keys() == stated['of a case'].keys()
    assert summary['failed'][0].keys() == {'case', 'error'}
    assert case['labels']['a'].keys() == stated['of a label'].keys()
    assert case['settings'][0].keys() == stated["of a fold's settings"].keys()
    for field in ('network_calls', 'versions'):
        assert list(case[field]) == names(stated['of a case'][field])
    for of in (case['image'][0], case['mask']):
        assert list(of) == names(stated['of a case']['mask'])
    columns = tables('pdddpm_summary.csv')['column']
    assert set(header(output / 'pdddpm_summary.csv')) == {
        *columns, *stated['of a label'], *stated["of a fold's settings"], *case['versions']}
    failure = json.loads((output / 'pdddpm_cases' / 'failed' / 'bad.json').read_text())
    assert list(failure) == names(tables('Output folder of a prediction')['file']['pdddpm_cases/failed/CASE.json'])


def test_the_worked_example_has_fields_of_the_summary(output):
    guide = (DOCS / 'guides' / 'uncertainty.md').read_text()
    example = json.loads(re.findall('```json\n(.*?)```', guide, re.DOTALL)[0])
    case, = json.loads((output / 'pdddpm_summary.json').read_text())['cases']
    of_folds = {'folds_dice', 'volume_ml_sd_between_folds', 'volume_ml_sd_within_folds'}
    assert example.keys() < case.keys()
    assert example['labels']['lesion'].keys() == case['labels']['a'].keys() - of_folds


def test_fields_of_the_evaluation(output):
    folder = output.parent / 'evaluation'
    stated, result = tables('evaluation.json')['field'], json.loads((folder / 'evaluation.json').read_text())
    assert result.keys() == stated.keys()
    assert list(result['settings']) == names(stated['settings'])
    assert set(result['cases'][0]) == set(names(stated['cases']))
    assert set(names(stated['reliability'])) == {*result['reliability'], *result['reliability']['all']}
    columns = tables('evaluation.csv and evaluation_reliability.svg')['column']
    assert {*header(folder / 'evaluation.csv'), 'error'} == columns.keys()
    defined = set(names((DOCS / 'reference' / 'metrics.md').read_text()))
    assert {*result['mean']['a'], *result['voxelwise']['all'], *result['sample_spread']['a']} <= {
        *defined, *columns, 'voxels'}


def test_fields_of_the_sweep(tmp_path):
    values = np.array([0.7, 0.8])
    stock, blind = SamplingSettings(mask_stock=1, mask_blind=0), SamplingSettings(samples_from='blind')
    samples = [SampleRow(SamplingSettings(), values, values), SampleRow(blind, values, values)]
    sweep = Sweep(['a', 'b'], [MaskRow(stock, values, values), MaskRow(blind, values, values)], samples, samples, 1.0,
                  1.0, [], 4.0, 1.0, chosen_samples=blind)
    write_sweep(tmp_path, sweep, blind, 0.8)
    stated, result = tables('sampling_sweep.json'), json.loads((tmp_path / 'sampling_sweep.json').read_text())
    assert result.keys() == stated['field'].keys()
    assert {field for row in result['rows'] for field in row} == stated['of a row'].keys()
    assert {*header(tmp_path / 'sampling_sweep.csv'), 'settings', 'per_case'} == stated['of a row'].keys()
