"""Predictions of `triage.py`: validation cases that the order is fitted on, and test cases with artefacts."""
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hippocampus import CONFIGURATION, DATASET, PDDDPM_TRAINER, STOCK_TRAINER, fold_folder
from hippocampus_rows import names_of, open_model
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
from scale import DEVICE, PLANS
from torch import Tensor
from triage_artefacts import FAMILIES, STRENGTHS

from nnunet_pdddpm.inference.quality import pairwise_dice
from nnunet_pdddpm.inference.volume import VolumePrediction
from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
from nnunet_pdddpm.tuning.calibration import measure, open_for_calibration
from nnunet_pdddpm.tuning.cases import ValidationCases

FOLD, OTHER_FOLDS = 0, (1, 2)
VALUES = {'Anterior': (1,), 'Posterior': (2,)}
CLEAN = 'clean'
POOLED_CASES = 60


def open_models(work: Path) -> tuple[VolumePredictor, list[nnUNetPredictor]]:
    """The PDDDPM model of a fold, which holds that of stock, and the other folds of stock; without mirroring."""
    predictor = open_for_calibration(fold_folder(work, PDDDPM_TRAINER, FOLD).parent, FOLD, torch.device(DEVICE),
                                     'checkpoint_final.pth')
    stock = [open_model(nnUNetPredictor, work, STOCK_TRAINER, (fold,)) for fold in OTHER_FOLDS]
    for model in (predictor, *stock):
        model.use_mirroring = False
    return predictor, stock


def measure_validation(work: Path, into: Path) -> None:
    """Rows that the order is fitted on, as training makes them, as `fit.json`."""
    file = into / 'fit.json'
    if file.is_file():
        return
    predictor, _ = open_models(work)
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, FOLD, PDDDPM_TRAINER, PLANS, device=torch.device(DEVICE))
    cases = ValidationCases(trainer)
    file.write_text(json.dumps(measure(predictor, cases, cases.names).quality.tolist()))


def versions(number: int, rounds: int) -> Iterator[tuple[str, int]]:
    """Family and strength of the versions of a test case: the clean one, and one for each round. Families and strengths
    take turns over cases and rounds.
    """
    yield CLEAN, 0
    for turn in range(rounds):
        yield list(FAMILIES)[(number + turn) % len(FAMILIES)], \
            (number // len(FAMILIES) + turn + turn // len(FAMILIES)) % STRENGTHS


@torch.inference_mode()
def measure_tests(work: Path, into: Path, cases: int, rounds: int) -> None:
    """What is known of the test cases' versions, a file for each case; versions that are there are left alone."""
    (into / 'test').mkdir(parents=True, exist_ok=True)
    models = None
    for turn in range(rounds + 1):  # all cases in the first round, then more versions of them
        for number, name in enumerate(names_of(work, None)[:cases]):
            file = into / 'test' / f'{name}.json'
            found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
            for family, strength in versions(number, turn):
                if (key := f'{family} {strength}') not in found:
                    models = models or open_models(work)
                    found[key] = measure_version(work, *models, name, number, family, strength)
                    file.write_text(json.dumps(found))


def measure_version(work: Path, predictor: VolumePredictor, stock: list[nnUNetPredictor], name: str, number: int,
                    family: str, strength: int) -> dict[str, Any]:
    """Of one image: Dice and features of each label, mean entropy, the stock folds' Dice, pooled features."""
    raw, plans = work / 'nnUNet_raw' / DATASET, predictor.plans_manager
    reader = plans.image_reader_writer_class()
    image, properties = reader.read_images([str(raw / 'imagesTs' / f'{name}_0000.nii.gz')])
    truth, _ = reader.read_seg(str(raw / 'labelsTs' / f'{name}.nii.gz'))
    if family != CLEAN:
        rng = np.random.default_rng([number, list(FAMILIES).index(family), strength])
        image = FAMILIES[family](image[0].astype(np.float64), strength, rng)[None].astype(np.float32)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    data, labels, _ = preprocessor.run_case_npy(image, truth, properties, plans, predictor.configuration_manager,
                                                predictor.dataset_json)
    data = torch.from_numpy(np.ascontiguousarray(data, np.float32))
    pooled: list[Tensor] = []
    hook = pooling(predictor, pooled)
    prediction = predictor.predict_volume(data, case=name)
    hook.remove()
    mask, own = prediction.logits.argmax(0).numpy(), prediction.presegmentation
    assert own is not None
    masks = [logits.argmax(0).numpy() for logits in (own.float(), *(
        model.predict_logits_from_preprocessed_data(data) for model in stock))]
    return {'labels': {label: {
        'dice': dice(mask, labels[0], truth[0], values),
        'features': of_label(prediction, label), 'folds': pairwise_dice([np.isin(m, values) for m in masks])}
        for label, values in VALUES.items()},
        'entropy': float(prediction.spread.maps()['uncertainty'].mean()),
        'pooled': torch.stack(pooled).mean(0).tolist()}


def of_label(prediction: VolumePrediction, label: str) -> list[float] | None:
    """Its features."""
    features = prediction.quality[label].features
    return None if features is None else features.tolist()


def dice(mask: np.ndarray, labels: np.ndarray, truth: np.ndarray, values: tuple[int, ...]) -> float:
    """Of a mask and the truth in the network's grid, and what of the truth was cropped away; voxels are 1 mm in both.
    """
    size = np.isin(mask, values).sum() + np.isin(truth, values).sum()
    return 2 * float((np.isin(mask, values) & np.isin(labels, values)).sum()) / float(size) if size else 1.0


def pooling(predictor: VolumePredictor, into: list[Tensor]) -> Any:
    """Hook that adds the stock model's deepest features, averaged over a tile."""
    return predictor.refiner.presegmenter.encoder.register_forward_hook(
        lambda module, inputs, skips: into.append(skips[-1].float().mean((0, 2, 3, 4))))


@torch.inference_mode()
def measure_pooled(work: Path, into: Path) -> None:
    """Pooled features of training cases, as `pooled.json`."""
    if (into / 'pooled.json').is_file():
        return
    predictor, _ = open_models(work)
    split = json.loads((work / 'nnUNet_preprocessed' / DATASET / 'splits_final.json').read_text())[FOLD]
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, FOLD, PDDDPM_TRAINER, PLANS, device=torch.device(DEVICE))
    trainer.do_split()  # which finds out how the cases are stored
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, split['train'][:POOLED_CASES], None)
    found = []
    predictor.refiner.load_state_dict(predictor.list_of_parameters[0])
    for name in dataset.identifiers:
        pooled: list[Tensor] = []
        hook = pooling(predictor, pooled)
        with predictor.using_stock_network(False):
            predictor.predict_sliding_window_return_logits(torch.from_numpy(np.asarray(dataset.load_case(name)[0][:])))
        hook.remove()
        found.append(torch.stack(pooled).mean(0).tolist())
    (into / 'pooled.json').write_text(json.dumps(found))
