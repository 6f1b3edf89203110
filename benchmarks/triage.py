"""Which case to look at first: orders of test cases with artefacts, by the trained models of hippocampus and nuclei.

Needs the work folders of these benchmarks, in which nothing is changed.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from artefacts import FAMILIES
from datasets.versions import CLEAN, SUBJECTS, Case, Subject, versions
from machine import DEVICE, PLANS
from nnunet import NUM_FOLDS

from nnunet_pdddpm.file_names import FINAL_CHECKPOINT

STAGES = ('measure', 'table')
NEEDS = {name: name for name in SUBJECTS}


def run(name: str, args: argparse.Namespace) -> None:
    """The stages that are asked for."""
    into = Path(args.o).resolve()
    torch.set_num_threads(1)
    for subject in SUBJECTS.values() if 'measure' in args.stages else ():
        if (work := getattr(args, subject.name)) is not None:
            for fold in args.folds:
                measure(subject, work.resolve(), args.data, fold, into / f'{subject.name}__{fold}')
    if 'table' in args.stages:
        from triage_page import write_page
        write_page(into, args.page)


def measure(subject: Subject, work: Path, data: str | None, fold: int, into: Path) -> None:
    """All that is known of the validation cases, and of the versions of the test cases."""
    subject.dataset.enter(work)
    (into / 'test').mkdir(parents=True, exist_ok=True)
    models = Models(subject, work, fold)
    measure_validation(models, into / 'fit.json')
    measure_tests(models, data, into / 'test')


class Models:
    """The PDDDPM model of a fold, which holds that of stock, and the other folds of stock; without mirroring."""

    def __init__(self, subject: Subject, work: Path, fold: int) -> None:
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        from nnunet_pdddpm.tuning.calibration import open_for_calibration
        self.subject, self.work, self.fold = subject, work, fold
        self.predictor = open_for_calibration(subject.dataset.model(work, 'denoiser'), fold, torch.device(DEVICE),
                                              FINAL_CHECKPOINT)
        self.stock = [subject.dataset.open(work, 'stock', [other], nnUNetPredictor)
                      for other in range(NUM_FOLDS) if other != fold]
        for model in (self.predictor, *self.stock):
            model.use_mirroring = False

    def trainer(self) -> Any:
        """Of the fold."""
        from nnunetv2.run.run_training import get_trainer_from_args
        dataset = self.subject.dataset
        return get_trainer_from_args(dataset.title, dataset.configuration, self.fold, dataset.trainer('denoiser'),
                                     PLANS, device=torch.device(DEVICE))


def measure_validation(models: Models, file: Path) -> None:
    """Rows that the order is fitted on, as training makes them."""
    from nnunet_pdddpm.tuning.calibration import measure as measure_cases
    from nnunet_pdddpm.tuning.cases import ValidationCases
    from nnunet_pdddpm.tuning.fold import FoldData
    if file.is_file():
        return
    cases = ValidationCases(FoldData.from_trainer(models.trainer()))
    file.write_text(json.dumps(measure_cases(models.predictor, cases, cases.names).quality.tolist()))


@torch.inference_mode()
def measure_tests(models: Models, data: str | None, into: Path) -> None:
    """What is known of the test cases' versions, a file for each case; versions that are there are left alone."""
    for number, case in enumerate(models.subject.tests(models.work, data, models.predictor)):
        file = into / f'{case[0]}.json'
        found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        for family, strength in versions():
            if (key := f'{family} {strength}') not in found:
                found[key] = measure_version(models, case, number, family, strength)
                file.write_text(json.dumps(found))


def measure_version(models: Models, case: Case, number: int, family: str, strength: int) -> dict[str, Any]:
    """Of one image: Dice and features of each label, mean entropy, and the stock folds' Dice."""
    from nnunet_pdddpm.inference.quality import dice_of_pairs
    predictor, (name, image, truth, properties) = models.predictor, case
    if family != CLEAN:
        rng = np.random.default_rng([number, list(FAMILIES).index(family), strength])
        bad = FAMILIES[family](image[0].squeeze().astype(np.float64), strength, rng)
        image = bad.reshape(image.shape).astype(np.float32)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    pixels, labels, _ = preprocessor.run_case_npy(image, truth, {**properties}, predictor.plans_manager,
                                                  predictor.configuration_manager, predictor.dataset_json)
    preprocessed = torch.from_numpy(np.ascontiguousarray(pixels, np.float32))
    prediction = predictor.predict_volume(preprocessed, case=name)
    mask, own = prediction.logits.argmax(0).numpy(), prediction.presegmentation
    assert own is not None
    masks = [logits.argmax(0).numpy() for logits in (own.float(), *(
        model.predict_logits_from_preprocessed_data(preprocessed) for model in models.stock))]
    return {'labels': {label: {
        'dice': dice(mask == value, labels[0] == value, truth[0] == value),
        'features': None if (found := prediction.quality[label].features) is None else found.tolist(),
        'folds': dice_of_pairs([m == value for m in masks])} for label, value in models.subject.labels.items()},
        'entropy': float(prediction.spread.maps()['uncertainty'].mean())}


def dice(mask: np.ndarray, cropped: np.ndarray, truth: np.ndarray) -> float:
    """Of a mask and the truth, in the network's grid and whole: voxels are as large in both."""
    size = mask.sum() + truth.sum()
    return 2 * float((mask & cropped).sum()) / float(size) if size else 1.0
