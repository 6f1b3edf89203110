"""Intervals of volumes: how many true volumes they hold, and how wide they are, by the ways to make them.

Needs the trained models of `hippocampus.py`, `phantom.py` and `raters.py`, in their work folders.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import phantom
import raters
import torch
from hippocampus import HERE, NUM_FOLDS, PDDDPM_TRAINER, fold_folder, nnunet_environment, volume_row
from phantom_data import phantom as draw_phantom
from scale import commit, machine, results
from statistics_of_trainings import files_of_trainings, spread

from nnunet_pdddpm.diffusion.drawing import drawn_logits, hard_mask
from nnunet_pdddpm.inference.counting import VoxelCounter
from nnunet_pdddpm.inference.intervals import Calibrated, Features, Rule, calibrate, signed_errors
from nnunet_pdddpm.inference.volume import Volume
from nnunet_pdddpm.network.settings import SamplingSettings
from nnunet_pdddpm.network.state import CALIBRATION

SAMPLES = 8
CALIBRATION_IMAGES, TEST_IMAGES, PHANTOM_SEED = 50, 150, 600_000
"""Phantoms of each number of objects."""
RATER_SETS = {'nuclei': 'Nuclei, total area', 'cells': 'Cells, total area'}
Rows = list[dict[str, list[float]]]
"""Of cases: the `FIELDS` of a label, and the volumes of the samples."""
Ends = tuple[float, float]
WAYS = ('as the package does it', 'the same without samples', 'relative error, no samples', 'range of 8 samples',
        '2.5 to 97.5 % quantiles of 8 samples')


def features(case: dict[str, list[float]]) -> Features:
    """Of a row."""
    return Features(*(np.array([value]) for value in case['fields'][1:6]))


@torch.inference_mode()
def of_phantoms(work: Path, fold: int, objects: int) -> tuple[Rows, Rows]:
    """Rows to calibrate by and to test: blind mask, and samples by a chain of one step, object by object; without
    mirroring."""
    from phantom_samplers import open_model, opened, temperatures
    predictor = open_model(phantom.folder(work, phantom.DENOISER), fold)
    validation = [draw_phantom(phantom.VALIDATION_SEED + i) for i in range(phantom.NUM_VALIDATION)]
    settings = replace(temperatures(predictor, validation), start=0.6, steps=1, dependence=0.0, samples=SAMPLES)
    cases = [draw_phantom(PHANTOM_SEED + i, *phantom.GRIDS[objects]) for i in range(CALIBRATION_IMAGES + TEST_IMAGES)]
    rows = [row for i, case in enumerate(cases)
            for row in rows_of(opened(predictor, case), settings.for_case(str(i)), [float(case.truth.sum())])]
    return rows[:CALIBRATION_IMAGES], rows[CALIBRATION_IMAGES:]


def rows_of(volume: Volume, settings: SamplingSettings, truths: Sequence[float]) -> Rows:
    """Of one image's foreground, in pixels, against each of its true areas."""
    predictor = volume.predictor
    counter = VoxelCounter(predictor.label_manager, {'object': (1,)}, tuple(slice(0, n) for n in volume.shape[1:]))
    for sample in range(SAMPLES):
        p, parts = volume.sample_volume(settings, sample, SAMPLES), volume.parts(settings)
        shifts = predictor.refiner.end_shifts(settings, sample, SAMPLES, parts.number)
        objects = volume.objects(settings.temperature)
        mask = hard_mask(drawn_logits(p, predictor.refiner.regions, shifts, parts.index), predictor.refiner.regions)
        counter.add(sample, slice(0, volume.shape[1]), mask, objects.index, objects.number)
    counter.add_mask([(slice(0, volume.shape[1]), volume.blind_logits())])
    features_of, sizes = counter.features(np.ones(1))[0], counter.sample_sizes()[:, 0].astype(float)
    return [volume_row(true, features_of, sizes) for true in truths]


@torch.inference_mode()
def of_raters(of: raters.RaterSet, work: Path, data: Path, fold: int) -> tuple[Rows, Rows]:
    """Rows of validation and test images, one for each rater's area; drawn as those of phantoms."""
    from raters_rows import Models, images_of, rows
    test, validation = raters.split(of, data)
    models = Models(of, work, fold, images_of(of, data, validation[fold]))
    row = next(row for row in rows() if row.title == 'PDDDPM, start 0.6, 1 step')
    settings = replace(models.settings(row), dependence=0.0, samples=SAMPLES)

    def of_images(images: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Rows:
        return [one for name, pixels, masks in images
                for one in rows_of(models.opened((name, pixels, masks), row), settings.for_case(name),
                                   masks.sum((1, 2)).astype(float).tolist())]
    return of_images(models.validation), of_images(images_of(of, data, test))


def of_hippocampus(work: Path, fold: int) -> dict[str, tuple[Rows, Rows]]:
    """Label -> rows of the fold's validation cases, as its checkpoint has them, and of the test cases."""
    checkpoint = fold_folder(work, PDDDPM_TRAINER, fold) / 'checkpoint_final.pth'
    scores = torch.load(checkpoint, map_location='cpu', weights_only=False)['network_weights'][CALIBRATION]
    test = json.loads((work / 'measured' / f'tuned__{fold}.json').read_text())
    return {label: ([{'fields': case.tolist(), 'samples': []} for case in scores[:, 1 + i].double() if case[-1] > 0],
                    [case['volumes'][i] for case in test]) for i, label in enumerate(('Anterior', 'Posterior'))}


def measure(hippocampus_work: Path | None, phantom_work: Path | None, raters_work: Path | None, data: str | None,
            into: Path) -> None:
    """Rows of every data set and training as `DATA__FOLD.json`: lists of calibration and test rows; kept if there."""
    into.mkdir(parents=True, exist_ok=True)
    for fold in range(NUM_FOLDS):
        if hippocampus_work is not None and not (into / f'Posterior__{fold}.json').is_file():
            for label, both in of_hippocampus(hippocampus_work, fold).items():
                (into / f'{label}__{fold}.json').write_text(json.dumps(both))
        for objects in phantom.GRIDS:
            file = into / f'{objects}_objects__{fold}.json'
            if phantom_work is not None and not file.is_file():
                os.environ.update({**nnunet_environment(phantom_work), **phantom.VARIABLES})
                file.write_text(json.dumps(of_phantoms(phantom_work, fold, objects)))
        for name in RATER_SETS if raters_work is not None else ():
            file, of = into / f'{name}__{fold}.json', raters.SETS[name]
            if not file.is_file():
                os.environ.update({**nnunet_environment(raters_work), **of.variables})
                found = of_raters(of, raters_work, raters.find_data(data, of.folder, 'raters'), fold)
                file.write_text(json.dumps(found))


def ways(calibration: Rows) -> dict[str, Callable[[dict[str, list[float]]], Ends | None]]:
    """Name -> what makes the interval of a test case."""
    scores = np.array([case['fields'] for case in calibration])
    true, of = scores[:, 0], Features(*scores[:, 1:6].T)
    relative = Rule('volume')
    errors = signed_errors(relative, true, of)
    assert errors is not None
    made = [calibrate([scores], True), calibrate([scores], False),
            Calibrated(relative, errors, np.zeros(len(errors), int))]

    def calibrated(by: Calibrated | None) -> Callable[[dict[str, list[float]]], Ends | None]:
        return lambda case: None if by is None else by.interval(features(case))
    return dict(zip(WAYS, (*map(calibrated, made), lambda case: (min(case['samples']), max(case['samples'])),
                           lambda case: tuple(np.quantile(case['samples'], [0.025, 0.975]))), strict=True))


def table(into: Path, name: str) -> list[str]:
    """Lines of a data set: coverage and mean width, mean and standard deviation over trainings."""
    inside, width = ({way: [] for way in WAYS} for _ in range(2))  # of the trainings
    for file in files_of_trainings(into, name):
        calibration, test = json.loads(file.read_text())
        true = np.array([case['fields'][0] for case in test])
        for way, make in ways(calibration).items():
            low, high = np.array([make(case) or (np.nan, np.nan) for case in test]).T
            inside[way].append(100.0 * ((low <= true) & (true <= high)))
            width[way].append(100 * (high - low) / true.mean())
    return [f'| {way} | {spread(np.array(inside[way]), 1)} % | {spread(np.array(width[way]), 1)} % |' for way in WAYS]


NOTES = {
    ('Anterior', 'Posterior'): 'Hippocampus: the trainings of [hippocampus.md](hippocampus.md), calibrated on the 50 '
                               'validation cases of the fold, tested on the 50 test cases.',
    tuple(f'{objects}_objects' for objects in phantom.GRIDS):
        f'Phantoms: the trainings of [phantom.md](phantom.md), calibrated on {CALIBRATION_IMAGES} images, tested on '
        f'{TEST_IMAGES}, none of which was trained on; samples of one step from start 0.6, an object at a time.',
    tuple(RATER_SETS): 'Nuclei and cells: the trainings of [nuclei.md](nuclei.md) and [cells.md](cells.md), calibrated '
                       'on the validation images of the fold, tested on the test images, each with every rater\'s area '
                       'as a true one: as many cases, which are not independent; samples as those of phantoms.'}
"""Names of data -> how they were measured."""


def write_page(into: Path, file: Path) -> None:
    """Of what is measured."""
    names = {'Anterior': 'Hippocampus, anterior', 'Posterior': 'Hippocampus, posterior',
             **{f'{objects}_objects': f'Phantom, total of {objects} objects' for objects in phantom.GRIDS}}
    names = {name: title for name, title in {**names, **RATER_SETS}.items() if list(into.glob(f'{name}__*.json'))}
    text = ['# Intervals of volumes: coverage and width', '',
            '    .venv/bin/python benchmarks/intervals.py -hippocampus WORK -phantom WORK -raters WORK -o WORK', '',
            f'Commit {commit()}. Machine: {machine()}. Three trainings each.',
            *(note for of, note in NOTES.items() if {*of} & {*names}),
            'Stock and blind masks in float32, chains in bfloat16 where the CPU has it. ± is the standard deviation '
            'over trainings, all tested on the same images; by the number of these images alone, 50 or 150, a coverage '
            'of 95 % has a standard error of 3 or 2 %. Width: mean over the mean true volume.', '']
    for name, title in names.items():
        text += [f'## {title}', '', '| interval | holds the true volume | width |', '|---|---|---|',
                 *table(into, name), '']
    file.write_text('\n'.join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-hippocampus', type=Path, help='work folder of hippocampus.py')
    parser.add_argument('-phantom', type=Path, help='work folder of phantom.py')
    parser.add_argument('-raters', type=Path, help='work folder of raters.py, with nuclei and cells')
    parser.add_argument('-data', help='folder that contains the sets of raters.py (or set NNUNET_PDDDPM_DATA)')
    parser.add_argument('-o', required=True, type=Path, help='folder of the measurements; those there are kept')
    parser.add_argument('-table', type=Path, default=results() / 'intervals.md', help='the page to write')
    args = parser.parse_args()
    sys.path.append(str(HERE / 'trainers'))
    torch.set_num_threads(1)
    measure(*(work and work.resolve() for work in (args.hippocampus, args.phantom, args.raters)), args.data, args.o)
    write_page(args.o, args.table)


if __name__ == '__main__':
    main()
