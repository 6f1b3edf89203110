"""Page of `triage.py`: how good each order of the test cases is."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from artefacts import FAMILIES, STRENGTHS
from datasets.versions import CLEAN, SUBJECTS, Subject
from orders import failures_found, normalised_aurc
from page import markdown, write
from scipy.special import expit
from statistics_of_trainings import difference, files_of_trainings, spread

from nnunet_pdddpm.inference.dice_regression import (
    ALL_FEATURES,
    KIND,
    LabelModel,
    case_estimates,
    rank_correlation,
)
from nnunet_pdddpm.inference.quality import LabelQuality
from nnunet_pdddpm.inference.ranking import Ranking, ranking_of

FAILED, FIRST = 0.8, 0.2
"""Dice of a failure; part of the list that is looked at."""
RESAMPLINGS, LOTS, SEED = 1000, 200, 25
FEWEST = 8
"""Versions of a family below which its rank correlation says nothing."""
PACKAGE, EXPECTED = 'as the package does it', "the probabilities' expected Dice"
FOLDS, ENTROPY = 'pairwise Dice of 3 stock folds', 'mean entropy'
DIFFERENCE = 'difference to the stock folds'
REGRESSION = 'the regression'


@dataclass(frozen=True)
class Training:
    """Predicted versions of test cases, of one training: arrays (versions,)."""
    dice: np.ndarray
    cases: np.ndarray
    families: np.ndarray
    scores: dict[str, np.ndarray]
    """Order -> what is the smaller the earlier a case is to be looked at."""
    lows: np.ndarray
    """The package's lower bounds, nan where it gives none."""
    ranking: Ranking

    def drawn(self) -> list[np.ndarray]:
        """Versions drawn with replacement, all versions of a case together."""
        rng, names = np.random.default_rng(SEED), np.unique(self.cases)
        rows = {name: np.flatnonzero(self.cases == name) for name in names}
        return [np.concatenate([rows[name] for name in rng.choice(names, len(names))]) for _ in range(RESAMPLINGS)]


def read(subject: Subject, into: Path) -> Training:
    """All that is measured of one."""
    fitted_on = np.array(json.loads((into / 'fit.json').read_text()))
    ranking = ranking_of(fitted_on, subject.labels)
    versions = [(file.stem, key.rsplit(' ', 1)[0], one) for file in sorted((into / 'test').glob('*.json'))
                for key, one in json.loads(file.read_text()).items()]
    found, labels = [one for *_, one in versions], [[*one['labels'].values()] for *_, one in versions]
    regression = {name: LabelModel.fit(fitted_on[fitted_on[:, channel, KIND] > 0, channel], ALL_FEATURES)
                  for name, channel in subject.labels.items()}
    lows = np.array([ranking.judge(qualities(one)).low for one in found], float)
    scores = {PACKAGE: np.zeros(len(lows)) if ranking.key is None else np.nan_to_num(lows, nan=-1.0),
              REGRESSION: np.array([by_models(regression, one) for one in found]),
              EXPECTED: np.array([np.mean([expit(one['features'][0]) if one['features'] else 0 for one in of_labels])
                                  for of_labels in labels]),
              FOLDS: np.array([np.mean([one['folds'] or 0 for one in of_labels]) for of_labels in labels]),
              ENTROPY: -np.array([one['entropy'] for one in found])}
    return Training(np.array([np.mean([one['dice'] for one in of_labels]) for of_labels in labels]),
                    np.array([name for name, *_ in versions]), np.array([family for _, family, _ in versions]), scores,
                    lows, ranking)


def qualities(version: dict[str, Any]) -> dict[str, LabelQuality]:
    """Of a measured version."""
    return {name: LabelQuality(None if label['features'] is None else np.array(label['features']), None)
            for name, label in version['labels'].items()}


def by_models(models: dict[str, LabelModel], version: dict[str, Any]) -> float:
    """Estimated Dice of a version, as a logit; it is used whether or not validation chooses it."""
    known = [[float(value[0]) for value in models[name].estimate(label.features[None])]
             for name, label in qualities(version).items() if label.features is not None]
    return float(case_estimates(*np.array(known).T[:, None])[0][0]) if known else -10.0


def table_of_orders(trainings: list[Training]) -> str:
    """Scores of each order over all versions, and the difference to the stock folds with its intervals."""
    rows = []
    lots_of_folds = mixed_lots(trainings, FOLDS)
    for name in trainings[0].scores:
        lots, differences = mixed_lots(trainings, name), ('', '', '')
        if name != FOLDS:
            differences = (against(trainings, name, FOLDS), over_cases(trainings, name),
                           difference(lots, lots_of_folds))
        values = [spread(np.array([[of(one.scores[name], one.dice)] for one in trainings]))
                  for of in (normalised_aurc, rank_correlation)]
        rows.append([name, values[0], *differences[:2], values[1], spread(lots), differences[2]])
    return markdown(['order', 'normalised AURC', DIFFERENCE, 'its bootstrap over cases', 'Spearman',
                     'failures found in mixed lots', DIFFERENCE], rows)


def against(trainings: list[Training], name: str, base: str,
            metric: Callable[[np.ndarray, np.ndarray], float] = normalised_aurc, family: str | None = None) -> str:
    """A score of one order less that of another, over all versions or those of a family."""
    def less(one: Training, i: np.ndarray) -> float:
        i = i if family is None else i[one.families[i] == family]
        return metric(one.scores[name][i], one.dice[i]) - metric(one.scores[base][i], one.dice[i])
    found = np.array([[less(one, np.arange(len(one.dice)))] for one in trainings])
    return difference(found, np.zeros_like(found))


def over_cases(trainings: list[Training], name: str) -> str:
    """95 % interval, of these trainings, of the difference in the normalised AURC to the stock folds."""
    resampled = np.mean([[normalised_aurc(one.scores[name][i], one.dice[i]) - normalised_aurc(
        one.scores[FOLDS][i], one.dice[i]) for i in one.drawn()] for one in trainings], 0)
    return '{:+.3f} to {:+.3f}'.format(*np.quantile(resampled, [0.025, 0.975]))


def family_table(trainings: list[Training]) -> str:
    """Spearman of each order in each family of which there are enough versions, mean over trainings."""
    orders, rows = list(trainings[0].scores), []
    for family in (CLEAN, *FAMILIES):
        parts = [(one, one.families == family) for one in trainings]
        dice, low = (np.concatenate([getattr(one, name)[part] for one, part in parts]) for name in ('dice', 'lows'))
        number, failed = parts[0][1].sum(), f'{failing(dice):.0f} %'
        cells = [f'{np.mean([rank_correlation(one.scores[name][part], one.dice[part]) for one, part in parts]):.2f}'
                 if number >= FEWEST else '–' for name in orders]
        rows.append([family, str(number), f'{dice.mean():.3f}', failed, *cells, share_held(dice, low)])
    return markdown(['', 'versions', 'mean Dice', 'below 0.8', *orders, 'lower bound held'], rows)


def share_held(dice: np.ndarray, lows: np.ndarray) -> str:
    """In how many of the versions with a bound it held, in words."""
    there = np.isfinite(lows)
    return f'{100 * (dice[there] >= lows[there]).mean():.0f} %' if there.any() else '–'


def mixed_lots(trainings: list[Training], name: str | None) -> np.ndarray:
    """Share of the failures of mixed lots that an order (None: the best) has in the first part of the list, of each
    training (trainings, 1)."""
    def share(one: Training) -> float:
        rng, clean = np.random.default_rng(SEED), np.flatnonzero(one.families == CLEAN)
        spoilt, score = np.flatnonzero(one.families != CLEAN), one.dice if name is None else one.scores[name]
        lots = (np.concatenate([clean, rng.choice(spoilt, round(len(clean) / 10), False)]) for _ in range(LOTS))
        return float(np.mean([failures_found(score[i], one.dice[i], FAILED, FIRST) for i in lots]))
    return np.array([[share(one)] for one in trainings])


def failing(dice: np.ndarray) -> float:
    """Share of failures, in %."""
    return 100 * float((dice < FAILED).mean())


def section(subject: Subject, trainings: list[Training]) -> str:
    """Of one data set."""
    one = trainings[0]
    dice, lows = (np.concatenate([getattr(each, name) for each in trainings]) for name in ('dice', 'lows'))
    share, clean = 100 * np.isfinite(lows).mean(), one.families == CLEAN
    as_is = np.concatenate([each.families for each in trainings]) == CLEAN
    said = [f'- fold {fold}: "{each.ranking.describe()}"' for fold, each in enumerate(trainings)]
    return '\n'.join([
        f'## {subject.name.capitalize()}', '',
        f'{len(one.dice)} versions of {len(np.unique(one.cases))} test cases, {len(trainings)} '
        f'training{"s" * (len(trainings) > 1)}. What the package says after validation:', '', *said, '',
        table_of_orders(trainings), '',
        f'Of the versions {failing(one.dice):.0f} % fail. A mixed lot: all cases as they are, of which '
        f'{failing(one.dice[clean]):.0f} % fail, and for every ten of them one version with an artefact, at random, '
        f'mean of {LOTS} lots. Failures found: the share of them in the first {100 * FIRST:.0f} % of the list. The '
        f'best order has {spread(mixed_lots(trainings, None))}.', '',
        f'The lower bound is made to hold in 90 % of images like the validation cases and their copies. Versions have '
        f'stronger and other artefacts. {share:.0f} % of the versions have a bound'
        + (f'; it held in {share_held(dice, lows)} of these, and in {share_held(dice[as_is], lows[as_is])} of the '
           f'cases as they are.' if share else '.'), '',
        f"Spearman on the images as they are, the package's order less {EXPECTED}: "
        f'{against(trainings, PACKAGE, EXPECTED, rank_correlation, CLEAN)}.', '',
        'Spearman by family:', '', family_table(trainings)])


def write_page(into: Path, file: Path) -> None:
    """Of what is measured."""
    found = [(subject, [read(subject, folder) for folder in files_of_trainings(into, name, '')])
             for name, subject in SUBJECTS.items()]
    if not any(trainings for _, trainings in found):
        sys.exit(f'{into} holds no measurement: name the work folders of trained models, see --help.')
    measured = [subject.name for subject, trainings in found if trainings]
    missing = [name for name in SUBJECTS if name not in measured]
    write(file, 'triage', families=len(FAMILIES), strengths=STRENGTHS,
          subjects=' and '.join(f'[{name}.md]({name}.md)' for name in measured),
          missing=f' Not measured yet: {", ".join(missing)}.' if missing else '',
          sections='\n\n'.join(section(subject, trainings) for subject, trainings in found if trainings))
