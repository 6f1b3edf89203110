"""Masks of stock nnU-Net, its controls and PDDDPM on the hippocampus, with mirroring, in the network's grid."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
import torch
from datasets.hippocampus import CHANNELS, HIPPOCAMPUS, SPLIT_SEED, VOXEL_ML, names, prepare
from nnunet import HERE, NUM_FOLDS, find_data
from page import Column, Line, Scores, base_of, forest, table, write
from statistics_of_trainings import file_name, files_of_trainings
from torch import Tensor

from nnunet_pdddpm.diffusion.coding import logits_to_probabilities
from nnunet_pdddpm.tuning.scores import Truth
from nnunet_pdddpm.tuning.temperature import fit_temperature, likelihoods

STAGES = ('prepare', 'train', 'tune', 'measure', 'table')
NETWORKS = ('stock', 'longer', 'second', 'denoiser')
Case = tuple[str, Tensor, Truth]
"""Name, preprocessed image and truth."""


@dataclass(frozen=True)
class Row:
    """One way to make a mask: see `rows.toml`."""
    title: str
    network: str = 'denoiser'
    settings: dict[str, Any] = field(default_factory=dict)
    temperature: bool = False
    ensemble: bool = False

    @property
    def name(self) -> str:
        """In the names of files."""
        return file_name(self.title)

    @property
    def as_tuned(self) -> bool:
        """Whether the settings are those of the model."""
        return self.network == 'denoiser' and not self.settings

    def folds(self, fold: int) -> list[int]:
        """That are predicted together."""
        return list(range(NUM_FOLDS)) if self.ensemble else [fold]


def rows() -> tuple[list[Row], str]:
    """Of the table, and the title of that which the others are compared with."""
    found = tomllib.loads((HERE / 'rows.toml').read_text())['hippocampus']
    return [Row(**row) for row in found['rows']], found['base']


def run(name: str, args: argparse.Namespace) -> None:
    """The stages that are asked for."""
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        prepare(work, find_data(args.data, HIPPOCAMPUS.title, 'dataset.json'))
    for fold in args.folds:
        for network in NETWORKS if 'train' in args.stages else ():
            HIPPOCAMPUS.train(work, network, fold)
        if 'tune' in args.stages:
            HIPPOCAMPUS.tune(work, fold)
    if 'measure' in args.stages:
        measure(work, args.folds)
    if 'table' in args.stages:
        write_page(work, args.page)


def cases(predictor: Any, work: Path, which: str, of: Sequence[str]) -> Iterator[Case]:
    """Test ('Ts') or training ('Tr') cases, preprocessed for a predictor."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    raw = HIPPOCAMPUS.raw(work)
    for name in of:
        image, labels, _ = preprocessor.run_case([str(raw / f'images{which}' / f'{name}_0000.nii.gz')],
                                                 str(raw / f'labels{which}' / f'{name}.nii.gz'),
                                                 predictor.plans_manager, predictor.configuration_manager,
                                                 predictor.dataset_json)
        truth = Truth(np.asarray(labels)[0], predictor.label_manager, torch.device('cpu'))
        yield name, torch.from_numpy(np.asarray(image)), truth


def open_row(work: Path, row: Row, fold: int) -> Any:
    """Its predictor."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from nnunet_pdddpm.inference.volume_predictor import VolumePredictor
    if row.network in ('stock', 'longer'):
        return HIPPOCAMPUS.open(work, row.network, row.folds(fold), nnUNetPredictor)
    predictor = HIPPOCAMPUS.open(work, row.network, row.folds(fold), VolumePredictor, overrides=row.settings)
    if row.settings and 'samples' not in row.settings:
        predictor.num_samples = len(row.folds(fold))
    return predictor


@torch.inference_mode()
def measure(work: Path, folds: Sequence[int]) -> None:
    """Scores of every row and training, as `measured/ROW__FOLD.json`; what is there is left alone."""
    HIPPOCAMPUS.enter(work)
    (work / 'measured').mkdir(exist_ok=True)
    for fold in folds:
        key = None
        for row in rows()[0]:
            file = work / 'measured' / f'{row.name}__{fold}.json'
            untuned = [of for of in row.folds(fold) if not HIPPOCAMPUS.sweep(work, of).is_file()]
            if file.is_file() or row.ensemble and fold > 0 or row.as_tuned and untuned:
                continue
            print(row.title, 'fold', fold, flush=True)
            if (same := replace(row, title='', temperature=False)) != key:  # else the row before has these masks
                key = same
                predictor = open_row(work, row, fold)
                masks = [predict(predictor, row, *case) for case in cases(predictor, work, 'Ts', names(work))]
            temperature = fitted(predictor, work, fold) if row.temperature else 1.0
            file.write_text(json.dumps([{**score(truth, logits / temperature), 'volumes': volumes}
                                        for truth, logits, volumes in masks]))


def fitted(predictor: Any, work: Path, fold: int) -> float:
    """One temperature of the mask's logits, on the validation cases of a fold."""
    return fit_temperature([likelihoods(predictor.predict_logits_from_preprocessed_data(image), truth, False)
                            for _, image, truth in cases(predictor, work, 'Tr', names(work, fold))])


def predict(predictor: Any, row: Row, name: str, image: Tensor, truth: Truth) -> tuple[Truth, Tensor, list[Any]]:
    """Truth, logits of the mask, and the volumes of each label: the true one, the mask's and the samples'."""
    if row.network in ('stock', 'longer'):
        return truth, predictor.predict_logits_from_preprocessed_data(image).float(), []
    prediction = predictor.predict_volume(image, case=name, stock=False)
    true = np.bincount(truth.truth.cpu(), minlength=1 + len(CHANNELS))[1:] * VOXEL_ML
    masks, samples = prediction.counts.consensus * VOXEL_ML, prediction.counts.sample_sizes() * VOXEL_ML
    return truth, prediction.logits, [{'true': float(true[i]), 'mask': float(mask), 'samples': samples[:, i].tolist()}
                                      for i, mask in enumerate(masks)]


def score(truth: Truth, logits: Tensor) -> dict[str, float]:
    """Dice and NLL of a mask."""
    dice, nll = truth.score(logits_to_probabilities(logits[None].float(), False)[0])
    return {'dice': dice, 'nll': nll}


COLUMNS = (Column('Dice', 'dice', 4), Column('NLL', 'nll', 4))


def read(work: Path, row: Row) -> Scores:
    """Of a row; empty if it is not measured."""
    found = [json.loads(file.read_text()) for file in files_of_trainings(work / 'measured', row.name)]
    return {metric: np.array([[case[metric] for case in of] for of in found])
            for metric in ('dice', 'nll')} if found else {}


def write_page(work: Path, file: Path) -> None:
    """Of the rows that are measured."""
    table_rows, base_title = rows()
    found = [Line(row.title, scores, note=' (one model)' if row.ensemble else None)
             for row in table_rows if (scores := read(work, row))]
    missing = {row.title for row in table_rows} - {line.title for line in found}
    base = base_of(found, base_title)
    text = table(found, COLUMNS, base_title)
    planned, (stock, others) = HIPPOCAMPUS.planned(work), HIPPOCAMPUS.total_iterations
    write(file, 'hippocampus', test=base['dice'].shape[1], seed=SPLIT_SEED, folds=NUM_FOLDS,
          patch=planned['patch_size'], features=planned['architecture']['arch_kwargs']['features_per_stage'],
          batch=planned['batch_size'], stock=stock, others=others, minutes=HIPPOCAMPUS.tuning_minutes,
          tuned=HIPPOCAMPUS.tuned(work), table=text,
          figure=forest(text, dict.fromkeys(line.title for line in found), 'Dice', base_title, 'higher', file),
          missing=f' Not measured yet: {"; ".join(sorted(missing))}.' if missing else '')
