"""The page of a data set of `raters.py`."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from hippocampus import fold_folder
from raters import CONFIGURATION, DENOISER, NUM_FOLDS, SETS, TUNING_MINUTES, RaterSet
from raters_rows import AS_TUNED, FOR_MEAN, Row, rows
from raters_rows import SAMPLES as SAMPLES_OF_IMAGE
from scale import AUTOCAST, PLANS, PLANS_IN_WORDS, commit, machine
from statistics_of_trainings import difference, files_of_trainings, spread

from nnunet_pdddpm.evaluation.scores import spread_and_correlation

BASE = 'second network, cross-entropy alone, one temperature, copula of objects'
SAMPLES = {'ged': 'GED²', 'crps': 'CRPS of the area', 'components': 'CRPS of the number of objects', 'energy': 'energy of quadrants'}
OF_MASK = {'nll': 'NLL', 'ece': 'ECE', 'dice': 'Dice', 'f1': 'F1 of objects'}
TEXT = """# {title}

    NNUNET_PDDDPM_DATA=FOLDER .venv/bin/python benchmarks/raters.py {name} -o WORK

Commit {commit}. Machine: {machine}. {plans}: features {features}, batches of {batch} patches of {patch}, predicted whole; training in
{autocast}. {test} test images; the others in three folds, each of which is a training ({train} images or fewer, one
case for each rater's mask). Stock: {stock:,} iterations; all others {others:,} more, from stock's weights. {samples}
independent samples an image, no mirroring but in the last row; means of chains and of the SSN are of {draws} draws. Temperatures and the copula's shared part are fitted on the fold's
validation images. SSN: Monteiro et al. 2020, arXiv 2006.06015. Tuned: by `nnUNetv2_pdddpm_tune`, {minutes} minutes:

{tuned}

± is the standard deviation over trainings. Δ is the paired difference to the best that needs no diffusion, the second
network whose objects are drawn by a copula, with a 95 % interval by Student's t over the trainings: it is for these test
images, and not corrected for the number of rows. Only the last row was chosen before, by tuning. GED² is fair. Areas are
relative to the stock model's expectation, in quadrants of the box in which it expects anything. sd ratio: spread of the
samples' areas over that of the raters around them, 1 is right. Correlation: of the areas in quadrants (the raters':
{correlation:+.2f}). Calls: of a network beside the stock model, for a sample.

## Samples

"""


def read(of: RaterSet, work: Path, row: Row) -> list[list[dict]]:
    """Scores of the test images, of each training."""
    return [json.loads(file.read_text())['scores']
            for file in files_of_trainings(work / 'measured', f'{of.label}__{row.name}')]


def column(found: list[list[dict]], metric: str) -> np.ndarray:
    """(trainings, images)"""
    return np.array([[image[metric] for image in training] for training in found])


def spreads(found: list[list[dict]]) -> dict[str, np.ndarray]:
    """(trainings, 1) of `spread_and_correlation`."""
    of = [spread_and_correlation([(np.array(image['areas']), np.array(image['areas_of_raters'])) for image in training])
          for training in found]
    return {name: np.array([[one[name]] for one in of]) for name in of[0]}


def lines(found: dict[Row, list[list[dict]]], metrics: dict[str, str], wide: bool) -> list[str]:
    """Of a table."""
    base = next(of for row, of in found.items() if row.title == BASE)
    text = ['| | calls | ' + ' | '.join(f'{title} | Δ' for title in metrics.values())
            + (' | HM-IoU | sd ratio | correlation |' if wide else ' |'),
            '|---' * (2 + 2 * len(metrics) + 3 * wide) + '|']
    for row, of in found.items():
        cells = [row.title, str(row.calls) if row.title != AS_TUNED else '']
        for metric in metrics:
            values = column(of, metric)
            digits = 4 if metric == 'nll' else 3
            if row.of_map == 'ensemble':  # one model, whatever the training
                cells += [f'{values.mean():.{digits}f} (one model)', '']
                continue
            cells += [spread(values, digits), '' if row.title == BASE else difference(values, column(base, metric), digits)]
        if wide:
            of_areas = spreads(of)
            cells += [spread(column(of, 'hm_iou')), spread(of_areas['sd_ratio'], 2), f'{of_areas["correlation"].mean():+.2f}']
        text.append(f'| {" | ".join(cells)} |')
    return text


def write_table(of: RaterSet, work: Path, file: Path) -> None:
    """The page, of the rows that are measured."""
    found = {row: scores for row in rows(True) if (scores := read(of, work, row))}
    preprocessed = work / 'nnUNet_preprocessed' / of.dataset
    plans = json.loads((preprocessed / f'{PLANS}.json').read_text())['configurations'][CONFIGURATION]
    splits = json.loads((preprocessed / 'splits_final.json').read_text())
    tuned = [f'- fold {fold}: ' + '; '.join(json.loads(report.read_text())['log']) for fold in range(NUM_FOLDS)
             if (report := fold_folder(work, DENOISER, fold, of.dataset, CONFIGURATION) / 'sampling_sweep.json').is_file()]
    text = TEXT.format(
        title=of.title, name=next(name for name, one in SETS.items() if one is of), commit=commit(), machine=machine(),
        plans=PLANS_IN_WORDS, features=plans['architecture']['arch_kwargs']['features_per_stage'],
        batch=plans['batch_size'], patch=' x '.join(map(str, plans['patch_size'])), autocast=AUTOCAST,
        test=len(next(iter(found.values()))[0]), train=len({case.split('__')[0] for case in splits[0]['train']}),
        stock=of.iterations[0], others=of.iterations[1], minutes=TUNING_MINUTES, samples=SAMPLES_OF_IMAGE, draws=FOR_MEAN, tuned='\n'.join(tuned),
        correlation=spreads(next(iter(found.values())))['correlation_reference'].mean())
    file.write_text(text + '\n'.join([*lines(found, SAMPLES, True), '', '## The mean of the samples', '',
                                      *lines(found, OF_MASK, False)]) + '\n')
