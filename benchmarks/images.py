"""Samples of stock nnU-Net, its controls and PDDDPM on 2D images: phantoms whose distribution of masks is known, and
nuclei, cells and nodules with the masks of several people."""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets.images import Image, ImageSet
from datasets.phantom import CONFIRMATION, FRESH_DRAWS, PHANTOM
from datasets.raters import RATER_SETS, image_of
from machine import results, timed
from nnunet import NUM_FOLDS

STAGES = ('prepare', 'train', 'tune', 'measure', 'time', 'table', 'evaluate')
ON_DEMAND = ('evaluate',)
"""Of raters: `-data` is a folder with `images` and `raters`, all of whose images are scored; they make a page."""


def run(name: str, args: argparse.Namespace) -> None:
    """The stages that are asked for."""
    image_set = {'phantom': PHANTOM, **RATER_SETS}[name]
    work = Path(args.o).resolve()
    if 'prepare' in args.stages:
        image_set.prepare(work, args.data)
    for fold in args.folds:
        for network in image_set.networks if 'train' in args.stages else ():
            image_set.dataset.train(work, network, fold)
        if 'tune' in args.stages:
            image_set.tune(work, fold)
    if 'evaluate' in args.stages:
        evaluate(name, image_set, work, args)
        return
    if 'measure' in args.stages:
        measure(image_set, work, image_set.tests(args.data), args.folds)
    if 'time' in args.stages:
        time_rows(image_set, work, image_set.tests(args.data))
    if 'table' in args.stages:
        from image_page import write_page
        write_page(name, image_set, work, args)


def evaluate(name: str, image_set: ImageSet, work: Path, args: argparse.Namespace) -> None:
    """Score all images of a folder; their page is in the work folder unless another is named."""
    if name == 'phantom' or args.data is None:
        sys.exit("The stage evaluate is for masks of several people; -data must name a folder with images and raters.")
    folder = Path(args.data).resolve()
    tests, images = f'{folder.name}_of_{image_set.label}', image_set.images(folder)
    folds = {image_of(case) for split in image_set.dataset.splits(work) for cases in split.values() for case in cases}
    if seen := sorted(folds & {image.name for image in images}):
        sys.exit(f'{folder} holds {seen[0]}, which was trained on: evaluate other images.')
    measure(image_set, work, {tests: images}, args.folds)
    from image_page import write_page
    args.page = work / f'{tests}.md' if args.page == results() / f'{name}.md' else args.page
    write_page(name, image_set, work, args, tests)


def enter(image_set: ImageSet, work: Path) -> None:
    """Make the data set's folders those of this process, in which nnU-Net's modules are then imported."""
    image_set.dataset.enter(work)
    torch.set_num_threads(1)


@torch.inference_mode()
def measure(image_set: ImageSet, work: Path, tests: Mapping[str, Sequence[Image]],
            folds: Sequence[int] = range(NUM_FOLDS)) -> None:
    """Scores of every row, training and test image, as `measured/SET__ROW__FOLD.json`; what is there is left alone."""
    enter(image_set, work)
    from image_models import DRAWS, Models, rows_to_measure
    results = work / 'measured'
    results.mkdir(exist_ok=True)
    for fold in folds:
        models = Models(image_set, work, fold, image_set.validation(work, fold))
        for row in rows_to_measure(image_set, work, fold):
            for name, images in tests.items():
                file = results / f'{name}__{row.name}__{fold}.json'
                if file.is_file() or not row.is_measured_on(name):
                    continue
                settings, draws = models.settings(row), FRESH_DRAWS if name == CONFIRMATION else DRAWS
                print(name, row.title, 'fold', fold, settings, flush=True)
                found = [score(models, image, *models.samples(image, row, settings, draws)) for image in images]
                file.write_text(json.dumps({'settings': str(settings), 'scores': found}))


@torch.inference_mode()
def time_rows(image_set: ImageSet, work: Path, tests: Mapping[str, Sequence[Image]]) -> None:
    """Seconds of every row with the models of fold 0, in turn, without reading and writing: mean over a few images."""
    enter(image_set, work)
    from image_models import TIMED, Models, rows_to_measure, seconds_file
    name, images = next(iter(tests.items()))
    if (file := seconds_file(work, name)).is_file():
        return
    models, seconds = Models(image_set, work, 0, image_set.validation(work, 0)), {}
    for row in rows_to_measure(image_set, work, 0):
        fitted = 0.5 if row.dependence == 'fitted' else row.dependence  # whatever is fitted takes the same time
        row = replace(row, temperature=False, dependence=fitted)
        settings, of_images = models.settings(row), []
        for image in images[:1] + images[:TIMED]:  # the first time is not counted
            models.forget_maps()
            of_images.append(timed(torch.device('cpu'), partial(models.draw, image, row, settings, image_set.samples)))
        seconds[row.title] = float(np.mean(of_images[1:]))
        print(row.title, seconds[row.title], flush=True)
    file.write_text(json.dumps(seconds))


def score(models: object, image: Image, masks: object, mean: object) -> dict[str, object]:
    """Against what is known of the image."""
    from image_scores import against_raters, against_truth
    if image.known is not None:
        return against_truth(image.known, masks, mean, int(image.name))
    return against_raters(image, masks, mean, models.expected(image))


