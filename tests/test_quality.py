"""What a prediction has that may tell its quality: closed forms, and what is collected while a volume is predicted."""
from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from scipy.special import expit
from tiny_model import plans, write_model

from nnunet_pdddpm.inference.quality import (
    FEATURES,
    dice_of_pairs,
    label_features,
    logit,
    mask_dice,
    roughness,
    uncertain_surface,
)
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.tuning.artefacts import ARTEFACTS, STRENGTHS, with_artefact
from nnunet_pdddpm.tuning.stored import store

CLASSES = {'channel_names': {'0': 'T1'}, 'file_ending': '.nii.gz', 'numTraining': 1,
           'labels': {'background': 0, 'cell': 1, 'nucleus': 2}}
REGIONS = {**CLASSES, 'labels': {'background': 0, 'whole': [1, 2], 'nucleus': [2]}, 'regions_class_order': [1, 2]}


def cube(at: int, shape: tuple[int, int, int] = (12, 12, 12)) -> np.ndarray:
    """4 x 4 x 4 voxels."""
    mask = np.zeros(shape, bool)
    mask[at:at + 4, 2:6, 2:6] = True
    return mask


def test_features_of_a_cube_are_what_can_be_counted_by_hand():
    mask, p = cube(2), np.where(cube(2), 0.8, 0.0)
    p[3:5, 3:5, 3:5] = 1.0  # its core of 8 voxels
    image = np.stack([np.where(mask, 3.0, 1.0), np.where(mask, 5.0, 1.0)])
    found = dict(zip(FEATURES, label_features(mask, p, image, cube(3), 0.7, 0.6), strict=True))
    assert expit(found['expected']) == pytest.approx(0.7) and expit(found['samples']) == pytest.approx(0.6)
    assert expit(found['stock']) == pytest.approx(0.75)  # 3 of the 4 slices of both
    of_08 = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2))
    assert found['entropy'] == pytest.approx(of_08 * 56 / 64)
    assert found['certainty'] == pytest.approx(1.0) and found['surface'] == 1  # 56 voxels, all of them uncertain
    assert found['volume'] == pytest.approx(math.log(65)) and found['components'] == pytest.approx(math.log(2))
    assert (found['brightness'], found['contrast']) == (pytest.approx(4.0), pytest.approx(0.0))
    assert found['roughness'] == 0  # of the box around it, which it fills


def test_what_is_not_there_has_features_all_the_same():
    nothing, p = np.zeros((3, 5, 5), bool), np.full((3, 5, 5), 0.01)
    for values in (p, np.full_like(p, np.nan)):  # what gives no numbers is refused later, with a reason
        found = label_features(nothing, values, np.ones((1, 3, 5, 5)), nothing, 0.0, 0.0)
        assert found[FEATURES.index('volume')] == found[FEATURES.index('components')] == 0
        assert found[0] == logit(0) == pytest.approx(math.log(0.01 / 0.99))


def test_surface_and_roughness_of_slices_and_of_a_volume():
    mask = np.zeros((1, 6, 6), bool)
    mask[0, 1:5, 1:5] = True  # 12 outermost pixels, and 4 inside
    p = np.full(mask.shape, 0.95)
    p[0, 1] = 0.5
    assert uncertain_surface(mask, p) == pytest.approx(4 / 12)
    assert uncertain_surface(np.zeros_like(mask), p) == 1
    ramp = np.arange(4.0)[:, None, None] + 3 * np.arange(5.0)[:, None] + np.zeros(6)
    assert roughness(ramp[None]) == pytest.approx((1 + 3 + 0) / 3)
    assert roughness(ramp[None, :1]) == pytest.approx((3 + 0) / 2) and roughness(np.ones((1, 1, 1, 1))) == 0


def test_dice_of_pairs():
    masks = [cube(2), cube(3), cube(6)]
    assert [mask_dice(masks[0], other) for other in masks] == [1, 0.75, 0]
    assert mask_dice(masks[0] & masks[2], masks[0] & masks[2]) == 1
    assert dice_of_pairs(masks) == pytest.approx((0.75 + 0.25 + 0) / 3)
    assert dice_of_pairs([~cube(2) & cube(2)] * 3) is None and dice_of_pairs(masks[:1]) is None


@pytest.fixture(params=['classes', 'regions', '2d'])
def model(request, tmp_path):
    """Image, and a way to open so many models."""
    description = REGIONS if request.param == 'regions' else CLASSES
    folder = write_model(tmp_path / 'D' / 'M', plans('SimpleITKIO', 2 if request.param == '2d' else 3, 1), description)
    weights = torch.load(folder / 'fold_0' / 'checkpoint_final.pth', weights_only=False)
    torch.manual_seed(1)
    for name, value in weights['network_weights'].items():
        if name.startswith('denoiser.unet'):
            value += 0.3 * torch.randn_like(value)
    (folder / 'fold_1').mkdir()
    torch.save(weights, folder / 'fold_1' / 'checkpoint_final.pth')

    def opened(*folds: int) -> VolumePredictor:
        predictor = VolumePredictor(device=torch.device('cpu'), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), folds)
        return predictor
    opened.folder = folder
    return torch.randn(1, 10, 18, 20, generator=torch.Generator().manual_seed(0)), opened


def label_maps(predictor: VolumePredictor, logits: torch.Tensor) -> dict[str, np.ndarray]:
    labels = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits.float()))
    first = 'whole' if predictor.label_manager.has_regions else 'cell'
    return {first: np.isin(labels, [1, 2] if first == 'whole' else [1]), 'nucleus': labels == 2}


def test_features_are_those_of_mask_probabilities_and_unmirrored_stock_model(model):
    image, opened = model
    predictor = opened(0)
    prediction = predictor.predict_volume(image, case='a')
    with_stock = prediction.quality
    plain = predictor.predict_volume(image, case='a', stock=False).quality
    predictor.use_mirroring = False
    stock = label_maps(predictor, predictor.predict_volume(image, case='a').presegmentation)
    known = 0
    for name, mask in label_maps(predictor, prediction.logits).items():
        features = with_stock[name].features
        if features is None:
            assert not mask.any()
            continue
        known += 1
        np.testing.assert_array_equal(features, plain[name].features)  # whatever is written beside the mask
        assert features[FEATURES.index('volume')] == pytest.approx(math.log1p(mask.sum()))
        assert features[FEATURES.index('stock')] == pytest.approx(logit(mask_dice(mask, stock[name])))
        if mask.any():
            assert features[FEATURES.index('brightness')] == pytest.approx(image[0].numpy()[mask].mean(), abs=1e-5)
    assert known


@pytest.mark.parametrize('mask', [(0.0, 1.0), (1.0, 0.0)], ids=['blind and stock', 'stock and blind'])
def test_folds_that_were_tuned_to_other_masks_make_the_mask_that_nnunet_makes_of_them(model, mask):
    image, opened = model
    folder = Path(opened.folder)
    for fold, stock in enumerate(mask):
        store(folder / f'fold_{fold}', SamplingSettings(mask_stock=stock, mask_blind=1 - stock, blind_temperature=1.5))
    nnunet = nnUNetPredictor(device=torch.device('cpu'), allow_tqdm=False)
    nnunet.initialize_from_trained_model_folder(str(folder), (0, 1), 'checkpoint_final.pth')
    expected = nnunet.predict_logits_from_preprocessed_data(image)
    for stock in (False, True):
        prediction = opened(0, 1).predict_volume(image, case='a', stock=stock)
        torch.testing.assert_close(prediction.logits, expected, rtol=0, atol=0.02)


def test_of_several_models_the_masks_are_compared(model):
    image, opened = model
    of_each = [label_maps(opened(fold), opened(fold).predict_volume(image, case='a').logits) for fold in (0, 1)]
    quality = opened(0, 1).predict_volume(image, case='a').quality
    for name, found in quality.items():
        assert found.features is None
        assert found.folds_dice == pytest.approx(dice_of_pairs([masks[name] for masks in of_each]))
    assert min(of.folds_dice for of in quality.values() if of.folds_dice is not None) < 1


@pytest.mark.parametrize('name', ARTEFACTS)
def test_artefacts_change_the_image_and_leave_its_normalisation_and_the_previous_stage(name):
    rng = np.random.default_rng(0)
    image = np.zeros((3, 7, 16, 18), np.float32)
    image[:2] = rng.normal(size=(2, 7, 16, 18))
    image[:2, 2:5, 4:10, 4:10] += 2
    changes = []
    for strength in range(STRENGTHS):
        made = with_artefact(image, name, strength, ['ZScoreNormalization', 'CTNormalization'], [strength])
        assert made.shape == image.shape and made.dtype == np.float32 and np.isfinite(made).all()
        np.testing.assert_array_equal(made[2], image[2])
        if name != 'shifted intensities':
            assert made[0].mean() == pytest.approx(image[0].mean(), abs=1e-4)
            assert made[0].std() == pytest.approx(image[0].std(), rel=1e-4)
        changes.append(np.abs(made[:2] - image[:2]).mean())
    assert min(changes) > 0.05
    with_artefact(image[:, :1], name, 0, ['NoNormalization'] * 2, [0])  # a single slice
