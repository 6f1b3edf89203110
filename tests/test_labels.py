"""Overlapping regions with an ignore label, in 2d and 3d_fullres: training and prediction through nnU-Net's classes."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import REFINED, STOCK, make_trainer, plan_and_preprocess
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_pdddpm.demo.phantom import write_dataset

DATASET = 'Dataset702_Regions'
CONFIGURATIONS = ('2d', '3d_fullres')


@pytest.fixture(scope='module')
def regions(workspace) -> Path:
    """Raw data set: whole = {1, 2} and lesion = {2} as regions; every fourth slice is annotated, the rest ignored."""
    raw, preprocessed = (Path(os.environ[name]) / DATASET for name in ('nnUNet_raw', 'nnUNet_preprocessed'))
    write_dataset(raw, num_training=6, num_test=1, shape=(20, 26, 22), seed=2)
    for file in (raw / 'labelsTr').iterdir():
        labels = sitk.ReadImage(str(file))
        array = sitk.GetArrayFromImage(labels)
        array[np.arange(len(array)) % 4 != 0] = 3
        sparse = sitk.GetImageFromArray(array)
        sparse.CopyInformation(labels)
        sitk.WriteImage(sparse, str(file))
    description = json.loads((raw / 'dataset.json').read_text())
    description['labels'] = {'background': 0, 'whole': [1, 2], 'lesion': 2, 'ignore': 3}
    description['regions_class_order'] = [1, 2]
    (raw / 'dataset.json').write_text(json.dumps(description))
    plan_and_preprocess(raw, preprocessed, *CONFIGURATIONS)
    return raw


@pytest.mark.parametrize('configuration', CONFIGURATIONS)
def test_regions_with_an_ignore_label_train_and_predict(regions, configuration):
    make_trainer(STOCK, 0, configuration, 702).run_training()
    trainer = make_trainer(REFINED, 0, configuration, 702)
    trainer.run_training()
    assert trainer.refiner.regions
    assert np.isfinite(trainer.logger.get_value('train_losses', -1))

    # where the truth is to be ignored, the noised mask holds the pre-segmentation; elsewhere the truth
    target = torch.zeros(1, 3, *[4] * len(trainer.configuration_manager.patch_size), dtype=torch.bool)
    target[:, 0, :2], target[:, 2, 2:] = True, True
    x_pre = torch.full((1, 2, *target.shape[2:]), 0.25)
    x0 = trainer._coded_target(target, x_pre)
    assert (x0[:, :, 2:] == 0.25).all()
    assert (x0[:, 0, :2] == 1).all() and (x0[:, 1, :2] == -1).all()

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device('cpu'), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    image = next((regions / 'imagesTs').iterdir())
    array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(image)])
    labels, probabilities = predictor.predict_single_npy_array(array, properties, save_or_return_probabilities=True)
    assert set(np.unique(labels)) <= {0, 1, 2}
    assert probabilities.shape == (2, *labels.shape)
    assert 0 <= probabilities.min() and probabilities.max() <= 1
    np.testing.assert_array_equal(labels == 2, probabilities[1] > 0.5)
