"""Intervals of volumes: how many true volumes they hold, and how wide they are, by the methods that make them.

Needs the trained models of the benchmarks hippocampus, phantom, nuclei and cells in their work folders.
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import images
import numpy as np
import torch
from datasets.hippocampus import CHANNELS, HIPPOCAMPUS
from datasets.images import Image, ImageSet
from datasets.phantom import GRIDS, PHANTOM, as_image
from datasets.phantom_drawing import phantom
from datasets.raters import RATER_SETS
from matplotlib.figure import Figure
from page import markdown, write
from statistics_of_trainings import files_of_trainings, spread
from volumes import rows as rows_of_volumes

from nnunet_pdddpm.inference.intervals import Calibrated, Rule, calibrate, signed_errors
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.network.state import CALIBRATION

STAGES = ('measure', 'table')
NEEDS = {'hippocampus': 'hippocampus', 'phantom': 'phantom', 'raters': 'nuclei and cells'}
SAMPLES = 8
CALIBRATION_IMAGES, TEST_IMAGES, PHANTOM_SEED = 50, 150, 600_000
"""Phantoms of each number of objects."""
Case = dict[str, Any]
"""Volumes of a label: `true`, of the `mask`, and of the `samples`, a list."""
Rows = list[Case]
Method = Callable[[Case], 'tuple[float, float] | None']
"""Case -> the ends of its interval."""
TITLES = {'Anterior': 'Hippocampus, anterior', 'Posterior': 'Hippocampus, posterior',
          **{f'{objects}_objects': f'Phantom, total of {objects} objects' for objects in GRIDS},
          'nuclei': 'Nuclei, total area', 'cells': 'Cells, total area'}
RATERS = {'nuclei': 5, 'cells': 10}
"""Rows of an image, one after the other, that belong together."""
SPLITS = 100
METHODS = ('as the package does it', 'relative error', 'range of 8 samples')
HEAD = ('volume', 'interval', 'holds the true volume', 'width', 'holds it in random splits', 'width in random splits')


def run(name: str, args: argparse.Namespace) -> None:
    """The stages that are asked for."""
    into = Path(args.o).resolve()
    if 'measure' in args.stages:
        measure(args, into)
    if 'table' in args.stages:
        write_page(into, args.page)


def measure(args: argparse.Namespace, into: Path) -> None:
    """Rows of every data set and training as `DATA__FOLD.json`: lists of calibration and test rows; kept if there."""
    into.mkdir(parents=True, exist_ok=True)

    def measure_once(name: str, fold: int, make: Callable[[], tuple[Rows, Rows]]) -> None:
        if not (file := into / f'{name}__{fold}.json').is_file():
            print(name, 'fold', fold, flush=True)
            file.write_text(json.dumps(make()))
    for label, channel in CHANNELS.items() if args.hippocampus else ():
        for fold in args.folds:
            measure_once(label, fold, lambda i=channel, f=fold: rows_of_hippocampus(args.hippocampus.resolve(), f, i))
    for objects, grid in GRIDS.items() if args.phantom else ():  # all of a work folder: a call predicts in one only
        for fold in args.folds:
            many = (as_image(i, phantom(PHANTOM_SEED + i, *grid)) for i in range(CALIBRATION_IMAGES + TEST_IMAGES))
            measure_once(f'{objects}_objects', fold, lambda m=many, f=fold: divided(rows_of_images(
                PHANTOM, args.phantom.resolve(), f, m)))
    for name in ('nuclei', 'cells') if args.raters else ():
        for fold in args.folds:
            measure_once(name, fold, lambda of=RATER_SETS[name], f=fold: rows_of_raters(
                of, args.raters.resolve(), args.data, f))


def divided(rows: Rows) -> tuple[Rows, Rows]:
    """To calibrate by, and to test."""
    return rows[:CALIBRATION_IMAGES], rows[CALIBRATION_IMAGES:]


@torch.inference_mode()
def rows_of_images(image_set: ImageSet, work: Path, fold: int, on: Iterable[Image]) -> Rows:
    """Rows of images, one for each true area: blind mask, and samples by a chain of one step, object by object; without
    mirroring."""
    images.enter(image_set, work)
    from image_models import Models, Row
    models = Models(image_set, work, fold, image_set.validation(work, fold))
    settings = replace(models.settings(Row('', dependence=0.0)), samples=SAMPLES)
    return [row for image in on for row in rows_of_image(models.opened(image), settings.for_case(image.name),
                                                             image.masks.sum((1, 2)).astype(float).tolist())]


def rows_of_image(volume: Any, settings: SamplingSettings, truths: Sequence[float]) -> Rows:
    """Of one image's foreground, in pixels, against each of its true areas."""
    from nnunet_pdddpm.diffusion.drawing import drawn_logits, hard_mask
    refiner, samples = volume.predictor.refiner, []
    for sample in range(SAMPLES):
        p, parts = volume.sample_volume(settings, sample, SAMPLES), volume.parts(settings)
        shifts = refiner.end_shifts(settings, sample, SAMPLES, parts.number)
        samples.append(float(hard_mask(drawn_logits(p, False, shifts, parts.index), False).sum()))
    mask = float(hard_mask(volume.blind_logits(), False).sum())
    return [{'true': true, 'mask': mask, 'samples': samples} for true in truths]


def rows_of_raters(image_set: ImageSet, work: Path, data: str | None, fold: int) -> tuple[Rows, Rows]:
    """Of validation and test images, one for each rater's area."""
    test = next(iter(image_set.tests(data).values()))
    calibration = image_set.validation(work, fold)
    return rows_of_images(image_set, work, fold, calibration), rows_of_images(image_set, work, fold, test)


def rows_of_hippocampus(work: Path, fold: int, channel: int) -> tuple[Rows, Rows]:
    """Of the fold's validation cases, as its checkpoint has them, and of the test cases."""
    scores = HIPPOCAMPUS.weights(work, 'denoiser', fold)[CALIBRATION][:, channel].double()
    tuned = next(row for row in rows_of_volumes()[0] if row.title == 'PDDDPM as tuned')
    test = json.loads((work / 'measured' / f'{tuned.name}__{fold}.json').read_text())
    return ([{'true': true, 'mask': mask} for true, mask, known in scores.tolist() if known],
            [case['volumes'][channel - 1] for case in test])


def methods(calibration: Rows) -> dict[str, Method]:
    """Name -> what makes the interval of a test case."""
    scores, relative = np.array([[case['true'], case['mask'], 1] for case in calibration]), Rule(1.0)
    errors = signed_errors(relative, scores[:, 0], scores[:, 1])
    assert errors is not None

    def calibrated(by: Calibrated | None) -> Method:
        return lambda case: None if by is None else by.interval(np.array([case['mask']]))
    return dict(zip(METHODS, (
        calibrated(calibrate([scores])), calibrated(Calibrated(relative, errors, np.zeros(len(errors), int))),
        lambda case: (min(case['samples']), max(case['samples']))), strict=True))


def coverage_and_width(make: Method, test: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Of each test case: whether the interval holds the true volume, and its width over the mean true volume, in %."""
    true = np.array([case['true'] for case in test])
    low, high = np.array([make(case) or (np.nan, np.nan) for case in test]).T
    return 100.0 * ((low <= true) & (true <= high)), 100 * (high - low) / true.mean()


def over_splits(calibration: Rows, test: Rows, together: int) -> dict[str, np.ndarray]:
    """Coverage and width in random splits of all rows, as many to calibrate by: without the luck of one division."""
    rows, rng = np.array([*calibration, *test]), np.random.default_rng(0)
    found: dict[str, list[list[float]]] = {method: [] for method in METHODS[:2]}  # those that need calibration
    for _ in range(SPLITS):
        order = rng.permutation(len(rows) // together)[:, None] * together + np.arange(together)
        shuffled = rows[order.ravel()]
        made = methods(shuffled[:len(calibration)].tolist())
        for method, of_splits in found.items():
            scores = coverage_and_width(made[method], shuffled[len(calibration):].tolist())
            of_splits.append([float(np.nanmean(score)) for score in scores])
    return {method: np.mean(of_splits, 0) for method, of_splits in found.items()}


def table_rows(into: Path, name: str) -> list[list[str]]:
    """Of a data set: coverage and mean width of each method, mean and standard deviation over trainings."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {method: [] for method in METHODS}
    for file in files_of_trainings(into, name):
        calibration, test = json.loads(file.read_text())
        divided_anew = over_splits(calibration, test, RATERS.get(name, 1))
        for method, make in methods(calibration).items():
            found[method].append((*coverage_and_width(make, test), divided_anew.get(method, np.full(2, np.nan))))
    rows = []
    for method, of_trainings in found.items():
        inside, width, anew = (np.array(scores) for scores in zip(*of_trainings, strict=True))
        known = ['', ''] if np.isnan(anew).any() else [f'{spread(anew[:, i, None], 1)} %' for i in range(2)]
        rows.append([TITLES[name], method, f'{spread(inside, 1)} %', f'{spread(width, 1)} %', *known])
    return rows


def draw(into: Path, measured: Sequence[str], file: Path) -> None:
    """Figure of the first training: intervals of the test cases in the order of the true volumes, misses marked."""
    rows, columns = -(-len(measured) // 3), 3
    figure = Figure(figsize=(11, 2.6 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(measured):]:
        axis.remove()
    for axis, name in zip(axes.flat, measured, strict=False):
        calibration, test = json.loads((into / f'{name}__0.json').read_text())
        make = methods(calibration)[METHODS[0]]
        test.sort(key=lambda case: case['true'])
        true = np.array([case['true'] for case in test])
        low, high = np.array([make(case) or (np.nan, np.nan) for case in test]).T / true.mean()
        true, at = true / true.mean(), np.arange(len(test))
        missed = (true < low) | (true > high)
        for which, colour, label in ((~missed, '0.6', 'interval'), (missed, 'C3', 'interval that misses')):
            axis.vlines(at[which], low[which], high[which], colour, linewidth=1, label=label)
        axis.plot(at, true, '.', color='C0', markersize=3, label='true volume')
        axis.set_ylim(0, 1.05 * max(true.max(), np.nanmax(high)))
        axis.set_title(f'{TITLES[name]}: {missed.sum()} of {len(test)} missed', fontsize=9)
        axis.set_xticks([])
        axis.tick_params('y', labelsize=7)
    axes[0, 0].set_ylabel('volume over mean true volume', fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize=8,
                  frameon=False)
    figure.savefig(file, dpi=100)


def write_page(into: Path, file: Path) -> None:
    """Of what is measured."""
    measured = [name for name in TITLES if list(into.glob(f'{name}__*.json'))]
    if not measured:
        sys.exit(f'{into} holds no measurement: name the work folders of trained models, see --help.')
    draw(into, measured, file.with_suffix('.png'))
    write(file, 'intervals', figure=f'![Intervals]({file.stem}.png)', calibration=CALIBRATION_IMAGES, test=TEST_IMAGES,
          splits=SPLITS, table=markdown(HEAD, [row for name in measured for row in table_rows(into, name)]))
