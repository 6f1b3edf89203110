"""Which case to look at first: orders of test cases with artefacts, on the trained hippocampus models.

Needs the work folder of `hippocampus.py`, of which nothing is changed.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hippocampus import HERE, nnunet_environment
from scale import commit, machine, results
from scipy.special import expit
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from triage_artefacts import FAMILIES
from triage_scores import aurc, excess_aurc, failures_found, normalised_aurc, spearman

from nnunet_pdddpm.inference.dice_regression import ALL_FEATURES, KIND, LabelModel, case_estimates
from nnunet_pdddpm.inference.dice_regression import CLEAN as CLEAN_KIND
from nnunet_pdddpm.inference.quality import LabelQuality
from nnunet_pdddpm.inference.ranking import Ranking, ranking_of

CHANNELS = {'Anterior': 1, 'Posterior': 2}
CLEAN = 'clean'
FAILED = 0.8
FIRST = (0.1, 0.2)
RESAMPLINGS, SEED = 1000, 25
COMPONENTS = 10
FEWEST = 8
"""Versions of a family below which its rank correlation says nothing."""
TODAY, PACKAGE, FOLDS = "the probabilities' expected Dice", 'as the package does it', 'pairwise Dice of 3 stock folds'
REGRESSION, ENTROPY, DISTANCE = 'the regression', 'mean entropy', 'Mahalanobis distance of deep features'


@dataclass(frozen=True)
class Tests:
    """Predicted versions of test cases: arrays (versions,)."""
    dice: np.ndarray
    cases: np.ndarray
    families: np.ndarray
    scores: dict[str, np.ndarray]
    """Order -> what is the smaller the earlier a case is to be looked at."""
    lows: np.ndarray
    """Lower bounds of the Dice."""


def read_tests(into: Path, ranking: Ranking, fitted_on: np.ndarray) -> Tests:
    """All that is measured."""
    versions = [(file.stem, key.rsplit(' ', 1)[0], of) for file in sorted((into / 'test').glob('*.json'))
                for key, of in json.loads(file.read_text()).items()]
    dice = np.array([np.mean([label['dice'] for label in of['labels'].values()]) for *_, of in versions])
    judged = [ranking.judge(qualities(of)) for *_, of in versions]
    regression = {name: LabelModel.fit(fitted_on[fitted_on[:, channel, KIND] > 0, channel], ALL_FEATURES)
                  for name, channel in CHANNELS.items()}
    scores = {PACKAGE: np.array([low(one.low) for one in judged]),
              REGRESSION: np.array([by_models(regression, of) for *_, of in versions]),
              TODAY: np.array([np.mean([expit(label['features'][0]) if label['features'] else 0
                                        for label in of['labels'].values()]) for *_, of in versions]),
              FOLDS: np.array([np.mean([label['folds'] or 0 for label in of['labels'].values()])
                               for *_, of in versions]),
              ENTROPY: -np.array([of['entropy'] for *_, of in versions])}
    if (into / 'pooled.json').is_file():
        distance = mahalanobis(np.array(json.loads((into / 'pooled.json').read_text())))
        scores[DISTANCE] = -distance(np.array([of['pooled'] for *_, of in versions]))
    return Tests(dice, np.array([name for name, *_ in versions]), np.array([family for _, family, _ in versions]),
                 scores, scores[PACKAGE])


def low(bound: float | None) -> float:
    """Where a case without a bound is sorted."""
    return -1.0 if bound is None else bound


def qualities(of: dict[str, Any]) -> dict[str, LabelQuality]:
    """Of a measured version."""
    return {name: LabelQuality(None if label['features'] is None else np.array(label['features']), None)
            for name, label in of['labels'].items()}


def by_models(models: dict[str, LabelModel], of: dict[str, Any]) -> float:
    """Estimated Dice of a version, as a logit; it is used whether or not validation chooses it."""
    known = [[float(value[0]) for value in models[name].estimate(label.features[None])]
             for name, label in qualities(of).items() if label.features is not None]
    return float(case_estimates(*np.array(known).T[:, None])[0][0]) if known else -10.0


def mahalanobis(training: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Distance of features (n, F) to those of training cases: PCA, then Ledoit and Wolf's covariance."""
    components = PCA(COMPONENTS, random_state=0).fit(training)
    covariance = LedoitWolf().fit(components.transform(training))
    return lambda features: covariance.mahalanobis(components.transform(features))


def resamplings(tests: Tests) -> list[np.ndarray]:
    """Versions of test cases drawn with replacement, all versions of a case together."""
    rng, names = np.random.default_rng(SEED), np.unique(tests.cases)
    rows = {name: np.flatnonzero(tests.cases == name) for name in names}
    return [np.concatenate([rows[name] for name in rng.choice(names, len(names))]) for _ in range(RESAMPLINGS)]


def interval(values: Sequence[float]) -> str:
    """95 % of resampled values."""
    first, last = np.quantile(values, [0.025, 0.975])
    return f'({first:.3f} to {last:.3f})'


def pooled_table(tests: Tests) -> list[str]:
    """Lines: scores of each order over all versions, the difference to the stock folds, and whether that is a gain."""
    lines = ['| order | AURC | excess | normalised AURC | difference to the stock folds | Spearman | failures in the '
             'first 10 % | first 20 % |', '|---|---|---|---|---|---|---|---|']
    draws = resamplings(tests)
    drawn = {name: np.array([normalised_aurc(of[i], tests.dice[i]) for i in draws])
             for name, of in tests.scores.items()}
    of_folds = normalised_aurc(tests.scores[FOLDS], tests.dice)
    for name, score in tests.scores.items():
        value = normalised_aurc(score, tests.dice)
        difference = '' if name == FOLDS else f'{value - of_folds:+.3f} {interval(drawn[name] - drawn[FOLDS])}'
        found = ' | '.join(f'{100 * failures_found(score, tests.dice, FAILED, share):.0f} %' for share in FIRST)
        lines.append(f'| {name} | {aurc(score, tests.dice):.4f} | {excess_aurc(score, tests.dice):.4f} | {value:.3f} '
                     f'{interval(drawn[name])} | {difference} | {spearman(score, tests.dice):.2f} | {found} |')
    gains = drawn[PACKAGE] - drawn[FOLDS]
    said = 'is reached' if np.quantile(gains, 0.975) < 0 else 'is not reached'
    return [*lines, '', f'The goal, a normalised AURC below that of the stock folds by more than its interval at a '
                        f'third of their cost, {said}: {100 * np.mean(gains < 0):.0f} % of the resamplings are below.']


def family_table(tests: Tests) -> list[str]:
    """Lines: Spearman of each order in each family of which there are enough versions."""
    lines = ['| | versions | mean Dice | below 0.8 | ' + ' | '.join(tests.scores) + ' | lower bound held |',
             '|---|---|---|---|' + '---|' * (len(tests.scores) + 1)]
    for family in (CLEAN, *FAMILIES):
        here = tests.families == family
        dice = tests.dice[here]
        lines.append(f'| {family} | {here.sum()} | {dice.mean():.3f} | {(dice < FAILED).sum()} | '
                     + ' | '.join(f'{spearman(of[here], dice):.2f}' if here.sum() >= FEWEST else '–'
                                  for of in tests.scores.values())
                     + f' | {100 * (dice >= tests.lows[here]).mean():.0f} % |')
    return lines


def clean_difference(tests: Tests) -> str:
    """Spearman of the package's order less today's, on the images as they are."""
    def better(i: np.ndarray) -> float:
        i = i[tests.families[i] == CLEAN]
        return spearman(tests.scores[PACKAGE][i], tests.dice[i]) - spearman(tests.scores[TODAY][i], tests.dice[i])
    return f'{better(np.arange(len(tests.dice))):+.3f} {interval([better(i) for i in resamplings(tests)])}'


def write_page(into: Path, file: Path) -> None:
    """Of what is measured."""
    fitted_on = np.array(json.loads((into / 'fit.json').read_text()))
    ranking = ranking_of(fitted_on, CHANNELS)
    tests = read_tests(into, ranking, fitted_on)
    kinds = fitted_on[..., KIND].max(1)
    held = 100 * (tests.dice >= tests.lows).mean()
    text = ['# Which case to look at first', '',
            '    .venv/bin/python benchmarks/triage.py -hippocampus WORK -o WORK', '',
            f'Commit {commit()}. Machine: {machine()}. The hippocampus models of [hippocampus.md](hippocampus.md), '
            f'fold 0: one training. All without mirroring, so that {len(tests.dice)} versions of '
            f'{len(np.unique(tests.cases))} test cases could be predicted: each as it is, '
            f'and with some of {len(FAMILIES)} families of artefacts; families and three strengths take turns. They '
            f'are made on the raw images, in other forms than those that the package fits on '
            f'(`benchmarks/triage_artefacts.py`, `nnunet_pdddpm/tuning/artefacts.py`). Every order is of the same '
            f'masks, those of PDDDPM, and judged by their Dice, the mean over two labels. Intervals: 95 %, bootstrap '
            f'over cases with all their versions together. The regression\'s penalty was chosen on the validation rows '
            f'of this training, and one of its features was exchanged after 20 versions of two of these test cases had '
            f'been seen: its row is no fair test.', '',
            f'What the package says after validation on {(kinds == CLEAN_KIND).sum()} cases and '
            f'{(kinds > CLEAN_KIND).sum()} copies: "{ranking.describe()}"', '',
            'Normalised AURC: 0 is the best order, 1 one at random. The regression is shown whether or not validation '
            'chose it. Failures: Dice below 0.8.', '', '## All versions together', '', *pooled_table(tests), '',
            f'The lower bound is to hold in 90 % of the versions and held in {held:.0f} %.', '',
            '## Spearman by family', '', *family_table(tests), '',
            f"On the images as they are, the package's order less that of the probabilities' expected Dice: "
            f'{clean_difference(tests)}.', '']
    file.write_text('\n'.join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('-hippocampus', type=Path, required=True, help='work folder of hippocampus.py')
    parser.add_argument('-o', type=Path, required=True, help='folder of the measurements; those there are kept')
    parser.add_argument('-cases', type=int, default=50, help='test cases (default %(default)s)')
    parser.add_argument('-rounds', type=int, default=2, help='artefacts of each case, up to 27 (default %(default)s)')
    parser.add_argument('-table', type=Path, default=results() / 'triage.md', help='the page to write')
    parser.add_argument('--stages', nargs='+', choices=('measure', 'table'), default=['measure', 'table'])
    args = parser.parse_args()
    work, into = args.hippocampus.resolve(), args.o.resolve()
    os.environ.update(nnunet_environment(work))
    sys.path.append(str(HERE / 'trainers'))
    torch.set_num_threads(1)
    if 'measure' in args.stages:
        from triage_rows import measure_pooled, measure_tests, measure_validation  # reads nnU-Net's folders
        into.mkdir(parents=True, exist_ok=True)
        measure_validation(work, into)
        measure_pooled(work, into)
        measure_tests(work, into, args.cases, args.rounds)
    if 'table' in args.stages:
        write_page(into, args.table)


if __name__ == '__main__':
    main()
