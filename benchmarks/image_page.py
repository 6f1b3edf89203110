"""Pages of `images.py`."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from datasets.images import ImageSet
from datasets.phantom import CONFIRMATION, FRESH_DRAWS, NUM_FRESH, NUM_TEST, NUM_VALIDATION, PHANTOM, SMALLEST
from datasets.raters import RaterSet, image_of
from image_models import DRAWS, TIMED, Row, plotted, rows, seconds_file
from image_scores import against_truth, exact_map
from page import Column, Line, Scores, base_of, forest, table, write
from statistics_of_trainings import files_of_trainings

from nnunet_pdddpm.evaluation.scores import spread_and_correlation

EXACT_SETS = 10
CONTROL = 'stock trained longer, thresholds'
CALIBRATED_CONTROL = 'stock trained longer, one temperature, thresholds'
EMPTY = (' In {number} images most raters drew nothing: Dice and F1 are of the others, and false alarms are the share '
         'of these images with a mask that is not empty.')
SECONDS = (' Seconds: of all {samples} samples of an image, in turn on one thread, without files; mean of {images} '
           'images, models of fold 0{tuned}.')
TUNED = ' Tuned: by `nnUNetv2_pdddpm_tune`,\nin at most {minutes} minutes:\n\n{chosen}'
FITTED = ' (one ensemble)'
"""Of one model, for which a temperature or more is fitted in each training."""


def read(work: Path, name: str, row: Row) -> Scores:
    """Of the test images and trainings; empty if it is not measured."""
    found = [json.loads(file.read_text())['scores'] for file in files_of_trainings(work / 'measured',
                                                                                   f'{name}__{row.name}')]
    metrics = found[0][0] if found else {}
    scores = {metric: np.array([[image.get(metric, np.nan) for image in training] for training in found])
              for metric in metrics if not metric.startswith('areas')}
    if 'areas' in metrics:
        spreads = [spread_and_correlation([(np.array(image['areas']), np.array(image['areas_of_raters']))
                                           for image in training]) for training in found]
        scores.update({metric: np.array([[spread[metric]] for spread in spreads]) for metric in spreads[0]})
    return scores


def lines(work: Path, name: str, table_rows: list[Row]) -> list[Line]:
    """Of the rows that are measured."""
    found = [(row, read(work, name, row)) for row in table_rows]
    file = seconds_file(work, name)
    seconds = json.loads(file.read_text()) if file.is_file() else {}
    return [Line(row.title, scores, row.calls + (f'; {seconds[row.title]:.2f} s' if row.title in seconds else ''),
                 None if row.map != 'ensemble' else FITTED if row.temperature else ' (one model)', row.base)
            for row, scores in found if scores]


def write_page(name: str, image_set: ImageSet, work: Path, args: argparse.Namespace, tests: str | None = None) -> None:
    """Of what is measured, on the benchmark's own test images or others."""
    network = image_set.dataset.planned(work)
    stock, others = image_set.dataset.total_iterations
    timed = seconds_file(work, SMALLEST if image_set.kind == 'phantom' else tests or image_set.label).is_file()
    tuned = '' if image_set.kind == 'phantom' else ', as tuned in fold 0'
    common = {'samples': image_set.samples, 'batch': network['batch_size'], 'stock': stock, 'others': others,
              'seconds': SECONDS.format(samples=image_set.samples, images=TIMED, tuned=tuned) if timed else '',
              'features': network['architecture']['arch_kwargs']['features_per_stage'],
              'epochs': image_set.dataset.epochs[0]}
    if image_set.kind == 'phantom':
        return write_phantoms(image_set, work, args, common)
    command = f'.venv/bin/python benchmarks/run.py {name} -o WORK'
    if tests is None:
        common.update(title=image_set.title, source=image_set.source, command=f'NNUNET_PDDDPM_DATA=FOLDER {command}')
    else:
        folder, shrink = Path(args.data).resolve().name, image_set.shrink
        averaged = f', {shrink} x {shrink} pixels averaged' if shrink > 1 else ''
        common.update(title=f'{image_set.title.split(",")[0]}: images of {folder}',
                      source=f'All images of {folder}, none of which was trained on{averaged}. Trainings, fits and '
                             f'tuning are those of the benchmark {name}.',
                      command=f'{command} --stages evaluate -data {args.data}')
    write_raters(image_set, work, args.page, common, tests or image_set.label)


def objects(scores: Scores) -> np.ndarray:
    """Mean number of objects in a sample; nan for rows of which trainings were measured before it was counted."""
    found = scores.get('objects', np.full_like(scores['ged'], np.nan))
    return np.full_like(found, np.nan) if np.isnan(found).any() else found


RATERS = (Column('GED²', 'ged', over_images=True), Column('CRPS of the area', 'crps'),
          Column('CRPS of the number of objects', 'components'), Column('objects', objects, 1, False),
          Column('energy of quadrants', 'energy'), Column('HM-IoU', 'hm_iou', delta=False),
          Column('sd ratio', 'sd_ratio', 2, False), Column('correlation', 'correlation', 2, False))
OF_MEAN = (Column('NLL', 'nll', 4, also_to=CALIBRATED_CONTROL), Column('ECE', 'ece'),
           Column('Dice', 'dice', base=CONTROL), Column('F1 of objects', 'f1', base=CONTROL))
FALSE_ALARMS = (Column('false alarms', 'false_alarm', base=CONTROL),)


def write_raters(image_set: RaterSet, work: Path, page: Path, common: dict[str, object], tests: str) -> None:
    """Page of masks of several people."""
    table_rows, base_title = rows(image_set)
    found = lines(work, tests, table_rows)
    base, titles = base_of(found, base_title), {line.title for line in found}
    missing = [row.title for row in table_rows if row.title not in titles]
    patch, chosen = image_set.dataset.planned(work)['patch_size'], image_set.dataset.tuned(work)
    counted = [line.scores['objects_of_raters'] for line in found if 'objects_of_raters' in line.scores]
    trained = sorted(len({image_of(case) for case in split['train']}) for split in image_set.dataset.splits(work))
    empty = int((~np.isnan(base['false_alarm'][0])).sum())
    of_samples = table(found, RATERS, base_title)
    write(page, 'raters', **common, of_samples=of_samples,
          figure=forest(of_samples, plotted(table_rows), 'GED²', base_title, 'lower', page),
          of_mean=table(found, OF_MEAN + FALSE_ALARMS * (empty > 0), base_title),
          patch=' x '.join(map(str, patch)), test=base['ged'].shape[1], draws=DRAWS,
          tuned=TUNED.format(minutes=image_set.dataset.tuning_minutes, chosen=chosen) if chosen else '',
          train=' to '.join(f'{number:,}' for number in sorted({trained[0], trained[-1]})),
          missing=f' Not measured yet: {"; ".join(missing)}.' if missing else '',
          correlation=base['correlation_reference'].mean(),
          control=CONTROL,
          of_raters=f' (the raters\': {counted[0].mean():.1f})' if counted else '',
          empty=EMPTY.format(number=empty) if empty else '')


def correlation(scores: Scores) -> np.ndarray:
    """Of the objects of a sample, pooled over images: (trainings, 1)."""
    return (scores['covariance'].sum(1) / np.maximum(scores['variance_objects'].sum(1), 1e-12))[:, None]


def sd_ratio(scores: Scores) -> np.ndarray:
    """Of the total over the exact one: (trainings, 1)."""
    return np.sqrt(scores['variance'].mean(1) / scores['true_variance'].mean(1))[:, None]


SHAPES = (Column('one of the shapes', 'clean', delta=False), Column('frequency error', 'frequency_error', delta=False),
          Column('correlation of the objects', correlation, 2, False))
TWO = (Column('GED²', 'ged', 4, over_images=True), Column('GED², biased', 'ged_biased', 4, False), *SHAPES,
       Column('NLL', 'nll', 4), Column('Dice of the mean', 'dice', 4))
CONFIRMED = (TWO[0], Column('one of the shapes', 'clean'), Column('frequency error', 'frequency_error'), *TWO[-2:])
MANY = (Column('CRPS of the total', 'crps', 4), Column('sd ratio', sd_ratio, 2, False), *SHAPES)


def exact(name: str) -> Scores:
    """Of exact samples, with the exact probability map: the mean of ten sets, as one training."""
    images = PHANTOM.tests()[name]

    def one_set(repeat: int) -> list[dict[str, float]]:
        found = []
        for number, image in enumerate(images):
            rng = np.random.default_rng(100 * number + repeat + 1)
            masks = np.stack([image.known.draw(rng) for _ in range(PHANTOM.samples)])
            found.append(against_truth(image.known, masks, exact_map(image.known), number))
        return found
    sets = [one_set(repeat) for repeat in range(EXACT_SETS)]
    return {metric: np.mean([[image[metric] for image in one] for one in sets], 0, keepdims=True)
            for metric in sets[0][0]}


def write_phantoms(image_set: ImageSet, work: Path, args: argparse.Namespace, common: dict[str, object]) -> None:
    """Page of phantoms."""
    table_rows, base_title = rows(image_set)
    tables = {}
    for number, name in {**{number: f'phantom_{number}' for number in NUM_TEST}, 'fresh': CONFIRMATION}.items():
        found = lines(work, name, [row for row in table_rows if row.is_measured_on(name)])
        ideal = Line('exact samples', exact(name), '', '')
        columns = MANY if number in (8, 20) else CONFIRMED if name == CONFIRMATION else TWO
        tables[f'of_{number}'] = table([*found, ideal], columns, base_title) if found else 'Not measured.'
        if number == 2:
            tables['figure'] = forest(tables['of_2'], plotted(table_rows), 'GED²', base_title, 'lower', args.page)
    write(args.page, 'phantom', **common, **tables, number=PHANTOM.number, validation=NUM_VALIDATION, two=NUM_TEST[2],
          eight=NUM_TEST[8], twenty=NUM_TEST[20], fresh=NUM_FRESH, draws=DRAWS, fresh_draws=FRESH_DRAWS)
