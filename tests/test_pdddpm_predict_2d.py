"""nnUNetv2_pdddpm_predict with regions, slices of a 2d model, and pictures."""
from __future__ import annotations

import filecmp
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import REFINED, STOCK, Workspace, make_trainer, prepare
from predicting import OF_SAMPLES, model_folder, predict_by_nnunet, read, rows, samples_of

from nnunet_pdddpm.commands.predict import main_modelfolder
from nnunet_pdddpm.demo.phantom import make_case, write_dataset

REGIONS = 'Dataset704_RegionsIn2d'


@pytest.fixture(scope='module')
def in_2d(refined: Workspace, tmp_path_factory) -> SimpleNamespace:
    """A 2d model with the regions whole (labels 1 and 2) and lesion (2), and what it predicts."""
    raw = Path(os.environ['nnUNet_raw']) / REGIONS
    write_dataset(raw, num_training=6, num_test=1, shape=(8, 26, 22), seed=3)
    description = json.loads((raw / 'dataset.json').read_text())
    description['labels'] = {'background': 0, 'whole thing': [1, 2], 'lesion': 2}
    description['regions_class_order'] = [1, 2]
    (raw / 'dataset.json').write_text(json.dumps(description))
    prepare(raw, '2d')
    for trainer in (STOCK, REFINED):
        make_trainer(trainer, 0, '2d', 704).run_training()
    model, folder = model_folder(REFINED, REGIONS, '2d'), tmp_path_factory.mktemp('in_2d')

    def run(name, *flags, model=model, source=raw / 'imagesTs'):
        main_modelfolder(['-i', str(source), '-o', str(folder / name), '-m', str(model), '-f', '0', '-device', 'cpu',
                          '-npp', '0', '-nps', '0', '--disable_progress_bar', '--save_samples', '--disable_tta',
                          '--uncertainty', 'all', '--save_probabilities', '-start', '0.9', '-samples', '3', *OF_SAMPLES,
                          *flags])
        return folder / name
    return SimpleNamespace(raw=raw, model=model, run=run, predicted=run('predicted'))


def test_regions_have_their_names_and_volumes(in_2d):
    row = next(iter(rows(in_2d.predicted).values()))
    mask = read(in_2d.predicted / f'{row["case"]}.nii.gz')
    assert set(np.unique(mask)) <= {0, 1, 2}
    samples = samples_of(in_2d.predicted)
    ml = np.prod(sitk.ReadImage(str(next((in_2d.raw / 'imagesTs').iterdir()))).GetSpacing()) / 1000
    saved = np.load(in_2d.predicted / f'{row["case"]}.npz')['probabilities']
    assert list(row['labels']) == ['whole thing', 'lesion']
    for channel, (name, labels) in enumerate((('whole thing', (1, 2)), ('lesion', (2,)))):
        values = row['labels'][name]
        assert values['volume_ml'] == pytest.approx(ml * np.isin(mask, labels).sum(), rel=1e-5)
        assert values['volume_ml_mean'] == pytest.approx(ml * np.isin(samples, labels).sum() / 3, rel=1e-5)
        file = f'{row["case"]}_probability_{name.replace(" ", "_")}.nii.gz'
        probability = read(in_2d.predicted / 'uncertainty' / file)
        np.testing.assert_allclose(probability, saved[channel], atol=1e-3)
    assert read(in_2d.predicted / 'uncertainty' / f'{row["case"]}_uncertainty.nii.gz').max() <= 1


def test_the_default_mask_of_regions_in_slices_is_what_nnunets_own_command_predicts(in_2d, tmp_path):
    ours = in_2d.run('default', '-mask_blind', '1')
    theirs = predict_by_nnunet(in_2d.raw / 'imagesTs', tmp_path / 'nnunet', (0,), in_2d.model, use_mirroring=False)
    (case,) = rows(ours)
    assert filecmp.cmp(theirs / f'{case}.nii.gz', ours / f'{case}.nii.gz', shallow=False)
    assert read(ours / f'{case}.nii.gz').any()


def test_slices_of_a_2d_model_share_their_noise(in_2d, monkeypatch):
    monkeypatch.setattr('nnunet_pdddpm.inference.volume.SLICE_CORRELATION', 0.0)
    independent = in_2d.run('independent')
    of_one, of_other = (np.load(next(folder.glob('*.npz')))['probabilities']
                        for folder in (in_2d.predicted, independent))
    assert np.abs(of_one - of_other).max() > 1e-3


def test_pictures_get_pictures(in_2d, tmp_path):
    model, source = tmp_path / 'model', tmp_path / 'images'
    shutil.copytree(in_2d.model, model, ignore=shutil.ignore_patterns('validation', '*.png'))
    for file, key, value in (('plans.json', 'image_reader_writer', 'NaturalImage2DIO'),
                             ('dataset.json', 'file_ending', '.png')):
        content = json.loads((model / file).read_text())
        content[key] = value
        (model / file).write_text(json.dumps(content))
    source.mkdir()
    picture = make_case((8, 40, 30), 5)[0][4]
    sitk.WriteImage(sitk.GetImageFromArray(picture.clip(0, 255).astype(np.uint8)), str(source / 'photo_0000.png'))
    out = in_2d.run('pictures', model=model, source=source)
    mask = read(out / 'photo.png')
    row = rows(out)['photo']
    assert row['labels']['whole thing']['volume_ml'] == pytest.approx((mask > 0).sum() / 1000)  # 1 mm thick
    assert len(samples_of(out)) == 3
    for name, channel in (('probability_whole_thing', 0), ('probability_lesion', 1)):
        values = read(out / 'uncertainty' / f'photo_{name}.png')
        assert values.shape == mask.shape
        saved = np.load(out / 'photo.npz')['probabilities'][channel, 0]
        np.testing.assert_allclose(values / 65534, saved, atol=1e-3)
