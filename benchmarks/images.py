"""Samples of stock nnU-Net, its controls and PDDDPM on 2D images: phantoms whose distribution of masks is known, and
nuclei, cells and nodules with the masks of several people."""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets.images import Image, ImageSet
from datasets.phantom import PHANTOM
from datasets.raters import RATER_SETS
from nnunet import HERE, NUM_FOLDS

STAGES = ('prepare', 'train', 'tune', 'measure', 'table')


def arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Of the command line."""
    if name == 'phantom':
        parser.add_argument('-images', type=int, default=PHANTOM.number,
                            help='for training, two thirds of them for each fold (default %(default)s)')
        parser.add_argument('-batch', type=int, default=dict(PHANTOM.dataset.changes)['batch_size'],
                            help='patches in a batch (default %(default)s)')


def run(name: str, args: argparse.Namespace) -> None:
    """The stages that are asked for."""
    of = PHANTOM.scaled(args.images, args.batch) if name == 'phantom' else RATER_SETS[name]
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        of.prepare(work, args.data)
    for fold in args.folds:
        for network in of.networks if 'train' in args.stages else ():
            of.dataset.train(work, network, fold)
        if 'tune' in args.stages:
            of.tune(work, fold)
    if 'measure' in args.stages:
        measure(of, work, args.data, args.folds)
    if 'table' in args.stages:
        from image_page import write_page
        write_page(name, of, work, args)


def here(of: ImageSet, work: Path) -> None:
    """Make the data set's folders those of this process, in which nnU-Net's modules are then imported."""
    os.environ.update(of.dataset.environment(work))
    sys.path.append(str(HERE / 'trainers'))
    torch.set_num_threads(1)


@torch.inference_mode()
def measure(of: ImageSet, work: Path, data: str | None, folds: Sequence[int] = range(NUM_FOLDS)) -> None:
    """Scores of every row, training and test image, as `measured/SET__ROW__FOLD.json`; what is there is left alone."""
    here(of, work)
    from image_models import Models, rows
    results, tests = work / 'measured', of.tests(data)
    results.mkdir(exist_ok=True)
    table = [row for row in rows(of.kind)[0] if row.network != 'shared' or 'shared' in of.networks]
    for fold in folds:
        models = Models(of, work, fold, of.validation(data, fold))
        for row in table:
            for number, (name, images) in enumerate(tests.items()):
                file = results / f'{name}__{row.name}__{fold}.json'
                if file.is_file() or number > 0 and row.one_size:
                    continue
                settings = models.settings(row)
                print(name, row.title, 'fold', fold, settings, flush=True)
                found = [score(models, image, *models.samples(image, row, settings)) for image in images]
                file.write_text(json.dumps({'settings': str(settings), 'scores': found}))


def score(models: object, image: Image, masks: object, mean: object) -> dict[str, object]:
    """Against what is known of the image."""
    from image_scores import against_raters, against_truth
    if image.known is not None:
        return against_truth(image.known, masks, mean, int(image.name))
    return against_raters(image, masks, mean, models.expected(image))


