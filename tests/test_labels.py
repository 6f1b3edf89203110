"""One label, more than a hundred, regions, labels to ignore, cases without foreground: trained and predicted with."""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import BRIEF, BRIEF_STOCK, in_this_process, make_trainer, prepare
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_pdddpm.demo.phantom import write_dataset
from nnunet_pdddpm.tuning import sweep as sweep_module
from nnunet_pdddpm.tuning.cases import ValidationCases
from nnunet_pdddpm.tuning.tune import open_model

CONFIGURATIONS = ('2d', '3d_fullres')
EMPTY = 'phantom_001'
MANY = 105


def as_they_are(labels: np.ndarray) -> np.ndarray:
    return labels


def one_foreground_label(labels: np.ndarray) -> np.ndarray:
    return np.minimum(labels, 1)


def many_labels(labels: np.ndarray) -> np.ndarray:
    """The phantom's foreground in small blocks, each with another label."""
    z, y, x = (np.arange(n) // 3 for n in labels.shape)
    blocks = z[:, None, None] * 31 + y[:, None] * 7 + x
    return np.where(labels > 0, 1 + blocks % MANY, 0).astype(np.uint8)


def sparse(labels: np.ndarray) -> np.ndarray:
    """Every fourth slice is annotated, the others are to be ignored."""
    labels = labels.copy()
    labels[np.arange(len(labels)) % 4 != 0] = 3
    return labels


@dataclass(frozen=True)
class Kind:
    dataset_id: int
    labels: dict
    change: Callable[[np.ndarray], np.ndarray] = as_they_are
    regions: bool = False


REGIONS = {'background': 0, 'whole': [1, 2], 'lesion': 2}
KINDS = {
    'one': Kind(710, {'background': 0, 'organ': 1}, one_foreground_label),
    'many': Kind(711, {'background': 0, **{f'part{i}': i for i in range(1, MANY + 1)}}, many_labels),
    'regions': Kind(712, REGIONS, regions=True),
    'ignore': Kind(713, {'background': 0, 'organ': 1, 'lesion': 2, 'ignore': 3}, sparse),
    'regions and ignore': Kind(714, {**REGIONS, 'ignore': 3}, sparse, regions=True),
}


@pytest.fixture(scope='module', params=KINDS)
def kind(folders, request) -> Kind:
    """A preprocessed data set whose second case has no foreground; every fold trains on it but one."""
    kind = KINDS[request.param]
    raw = Path(os.environ['nnUNet_raw']) / f'Dataset{kind.dataset_id}_Labels'
    write_dataset(raw, num_training=4, num_test=1, shape=(12, 24, 18), seed=2)
    for file in (raw / 'labelsTr').iterdir():
        image = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(image) * (not file.name.startswith(EMPTY))
        changed = sitk.GetImageFromArray(kind.change(labels))
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))
    description = json.loads((raw / 'dataset.json').read_text())
    description['labels'] = kind.labels
    if kind.regions:
        description['regions_class_order'] = [1, 2]
    (raw / 'dataset.json').write_text(json.dumps(description))
    prepare(raw, *CONFIGURATIONS, folds=2)
    return kind


@pytest.mark.parametrize('configuration', CONFIGURATIONS)
def test_training_validation_and_prediction(kind, configuration, monkeypatch):
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)
    make_trainer(BRIEF_STOCK, 0, configuration, kind.dataset_id).run_training()
    trainer = make_trainer(BRIEF, 0, configuration, kind.dataset_id)
    trainer.run_training()
    assert trainer.refiner.regions == kind.regions
    assert np.isfinite(trainer.logger.get_value('train_losses', -1))
    with in_this_process():
        trainer.perform_actual_validation()
    summary = json.loads((Path(trainer.output_folder) / 'validation' / 'summary.json').read_text())
    foreground = [label for label in kind.labels if label not in ('background', 'ignore')]
    assert len(summary['mean']) == len(foreground)

    # a patch of the case without foreground
    trainer.dataloader_train.data_loader.indices = [EMPTY]
    batch = next(trainer.dataloader_train)
    noisy, _ = trainer.make_noisy_batch(batch['data'], batch['target'][0], batch['keys'])
    heads = len(foreground) + (not kind.regions)
    assert noisy.noisy.shape[:2] == (2, heads) and noisy.presegmentation.shape[:2] == (2, 0)
    assert np.isfinite(trainer.train_step(batch)['loss'])

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    raw = Path(os.environ['nnUNet_raw']) / f'Dataset{kind.dataset_id}_Labels'
    image = next((raw / 'imagesTs').iterdir())
    array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(image)])
    labels, probabilities = predictor.predict_single_npy_array(array, properties, save_or_return_probabilities=True)
    assert labels.shape == array.shape[1:] and set(np.unique(labels)) <= set(range(len(foreground) + 1))
    assert probabilities.shape == (heads, *labels.shape)
    assert 0 <= probabilities.min() and probabilities.max() <= 1
    if kind.regions:
        np.testing.assert_array_equal(labels == 2, probabilities[1] > 0.5)
    else:
        np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-3)
        np.testing.assert_array_equal(labels, probabilities.argmax(0))

    if configuration == '2d':
        monkeypatch.setattr(sweep_module, 'SIGNAL_TO_NOISE', (0.25,))
        monkeypatch.setattr(sweep_module, 'STEPS', (1,))
        model = open_model(Path(trainer.output_folder_base), 0, torch.device('cpu'))
        rows = sweep_module.sweep(model, ValidationCases(trainer)).rows.values()
        assert len(rows) == 1 + 4 * 3 and all(len(row.dice) == 2 for row in rows)
        assert all((0 <= row.dice).all() and (row.dice <= 1).all() and np.isfinite(row.nll).all() for row in rows)


@pytest.mark.parametrize('configuration', CONFIGURATIONS)
def test_where_the_truth_is_to_be_ignored_the_noised_mask_holds_the_presegmentation(kind, configuration):
    if 'ignore' not in kind.labels:
        pytest.skip('a data set without a label to ignore')
    trainer = make_trainer(BRIEF, 0, configuration, kind.dataset_id)
    space = [4] * len(trainer.configuration_manager.patch_size)
    if kind.regions:
        target = torch.zeros(1, 3, *space, dtype=torch.bool)
        target[:, 0, :2], target[:, 2, 2:] = True, True
    else:
        target = torch.ones(1, 1, *space)
        target[:, :, 2:] = 3
    on = 0 if kind.regions else 1
    x_pre = torch.full((1, trainer.label_manager.num_segmentation_heads, *space), 0.25)
    x0 = trainer._coded_target(target, x_pre)
    assert (x0[:, :, 2:] == 0.25).all()
    assert (x0[:, on, :2] == 1).all() and (x0[:, 1 - on, :2] == -1).all()
