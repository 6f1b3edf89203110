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
from nnunet_pdddpm.tuning.fold import FoldData
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
    noisy, _ = trainer.make_noisy_batch(batch['data'], batch['target'][0])
    heads = len(foreground) + (not kind.regions)
    assert noisy.noisy.shape == (2, heads, *batch['data'].shape[2:])
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
        for name, values in {'STARTS': (0.6,), 'FIRST_STEPS': (1,), 'MORE_STEPS': (), 'DEPENDENCES': (1.0,),
                             'DRAWS': 2}.items():
            monkeypatch.setattr(sweep_module, name, values)
        model = open_model(Path(trainer.output_folder_base), 0, torch.device('cpu'))
        measured = sweep_module.sweep(model, ValidationCases(FoldData.from_trainer(trainer)))
        assert all(row.dice.shape == row.nll.shape == (2,) for row in measured.masks)
        assert all((0 <= row.dice).all() and (row.dice <= 1).all() and np.isfinite(row.nll).all()
                   for row in measured.masks)
        assert all(row.energy.shape == (2,) and np.isfinite(row.energy).all()
                   for row in (*measured.samples, *measured.first_rounds))


@pytest.mark.parametrize('configuration', CONFIGURATIONS)
def test_where_the_truth_is_to_be_ignored_the_embedded_stock_model_s_mask_is_noised(kind, configuration, monkeypatch):
    if 'ignore' not in kind.labels:
        pytest.skip('a data set without a label to ignore')
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)
    make_trainer(BRIEF_STOCK, 0, configuration, kind.dataset_id).run_training()
    trainer = make_trainer(BRIEF, 0, configuration, kind.dataset_id)
    trainer.blind_share = 0.0
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    stock = []
    trainer.refiner.presegmenter.register_forward_hook(lambda module, inputs, output: stock.append(output))
    image = 3 * torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    space = image.shape[2:]
    if kind.regions:  # one region everywhere, and what is to be ignored
        target = torch.zeros(1, 3, *space, dtype=torch.bool)
        target[:, 0], target[:, 2, 2:] = True, True
        shown = torch.stack([torch.ones(1, *space), torch.zeros(1, *space)], 1)
    else:
        target = torch.ones(1, 1, *space)
        target[:, :, 2:] = 3
        shown = torch.nn.functional.one_hot(torch.ones(1, *space).long(), 3).movedim(-1, 1).float()
    noisy, noise = trainer.make_noisy_batch(image, target)
    logits, = stock
    of_stock = logits > 0 if kind.regions else torch.zeros_like(logits).scatter_(1, logits.argmax(1, True), 1)
    shown[:, :, 2:] = of_stock[:, :, 2:].float()
    assert len(torch.unique(of_stock[:, 0, 2:])) == 2  # or nothing would be told by it
    level = noisy.log_snr.double()
    expected = level.sigmoid().sqrt() * (2 * shown - 1) + (-level).sigmoid().sqrt() * noise
    torch.testing.assert_close(noisy.noisy, expected.float(), rtol=1e-4, atol=1e-4)

    trainer.make_noisy_batch(image[:, :, :2], target[:, :, :2])
    assert len(stock) == 1  # it is only called where there is something to fill


@pytest.mark.parametrize('configuration', CONFIGURATIONS[:1])
def test_a_patch_that_is_to_be_ignored_everywhere_measures_no_level(kind, configuration, monkeypatch):
    if 'ignore' not in kind.labels:
        pytest.skip('a data set without a label to ignore')
    monkeypatch.setenv('nnUNet_pdddpm_presegmenter', BRIEF_STOCK)
    make_trainer(BRIEF_STOCK, 0, configuration, kind.dataset_id).run_training()
    trainer = make_trainer(BRIEF, 0, configuration, kind.dataset_id)
    trainer.blind_share = 0.0
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    for target in batch['target']:
        if kind.regions:
            target[0, -1] = True
            target[1, -1] = False
        else:
            target[0], target[1] = 3, 1
    loss = trainer.train_step(batch)['loss']
    assert np.isfinite(loss)
    assert trainer.meter.count.sum() == 1
    measured = trainer.denoising_loss.measured
    assert torch.isnan(measured[0]) and measured[1] > 0
    assert trainer.meter.cross_entropy.sum() == pytest.approx(float(measured[1]))
    trainer.blind_share = 1.0
    for target in batch['target']:  # of the whole batch
        target[:] = False if kind.regions else 3
        target[:, -1] = True if kind.regions else 3
    assert trainer.train_step(batch)['loss'] == 0
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        assert trainer.validation_step(batch)['loss'] == 0
