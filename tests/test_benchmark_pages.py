"""Pages of `benchmarks/run.py`, of made-up measurements: every row is in its table, with differences to the base."""
from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage import io

BENCHMARKS = Path(__file__).parent.parent / 'benchmarks'
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason='rows.toml is read by tomllib of Python 3.11')


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def planned(of, work: Path, patch: list[int]) -> None:
    """What the page says of plans and splits."""
    preprocessed = of.preprocessed(work)
    preprocessed.mkdir(parents=True)
    configuration = {'patch_size': patch, 'batch_size': 2, 'architecture': {'arch_kwargs': {'features_per_stage': [8]}}}
    (preprocessed / 'nnUNetPlansReduced.json').write_text(json.dumps(
        {'configurations': {of.configuration: configuration}}))
    (preprocessed / 'splits_final.json').write_text(json.dumps([{'train': ['one-a', 'one-b', 'two-a'], 'val': []}]))
    (work / 'measured').mkdir()


def measured(metrics: tuple[str, ...], rng: np.random.Generator, images: int = 4) -> list[dict[str, float]]:
    return [dict(zip(metrics, rng.random(len(metrics)).tolist(), strict=True)) for _ in range(images)]


def rows_of(page: Path) -> dict[str, list[str]]:
    """First column -> cells, of the first table that has it."""
    lines = [line.strip('| ').split(' | ') for line in page.read_text().splitlines() if line.startswith('| ')]
    return {cells[0]: cells for cells in reversed(lines)}


@pytest.mark.parametrize('name', ['phantom', 'nuclei'])
def test_page_of_images(name, tmp_path):
    models, page = import_module('image_models'), import_module('image_page')
    of = import_module('datasets.phantom').PHANTOM if name == 'phantom' else \
        import_module('datasets.raters').RATER_SETS[name]
    planned(of.dataset, tmp_path, [8, 8])
    rng = np.random.default_rng(0)
    sets = {'phantom': ['phantom_2', 'phantom_8', 'phantom_20', 'phantom_2_fresh'], 'nuclei': ['nucleus']}[name]
    metrics = {'phantom': ('ged', 'ged_biased', 'clean', 'frequency_error', 'covariance', 'variance_objects', 'nll',
                           'dice', 'crps', 'variance', 'true_variance'),
               'nuclei': ('ged', 'hm_iou', 'nll', 'ece', 'dice', 'f1', 'false_alarm', 'crps', 'components',
                          'energy')}[name]
    rows, base = models.rows(of)
    assert len({row.name for row in rows}) == len(rows) and base in {row.title for row in rows}
    for row in rows:
        for one in sets:
            for fold in range(3):
                scores = measured(metrics, rng)
                for image in scores if name == 'nuclei' else ():
                    image.update(areas=rng.random((3, 4)).tolist(), areas_of_raters=rng.random((5, 4)).tolist())
                (tmp_path / 'measured' / f'{one}__{row.name}__{fold}.json').write_text(json.dumps({'scores': scores}))
    file = tmp_path / f'{name}.md'
    models.seconds_file(tmp_path, sets[0]).write_text(json.dumps({base: 0.254}))
    page.write_page(name, of, tmp_path, Namespace(page=file))
    table = rows_of(file)
    assert table[base][1] == '1; 0.25 s' and table[rows[0].title][1] == '0'
    assert {row.title for row in rows} <= table.keys()
    assert table[base][3] == '' and ' to ' in table[rows[0].title][3]
    assert file.with_suffix('.png').stat().st_size > 5000


class MadeUpModels:
    """Of a training: every mask is the upper half of the image."""

    def __init__(self, of, work, fold, validation):
        pass

    def settings(self, row):
        return 'as they are'

    def samples(self, image, row, settings, draws):
        mask = np.zeros(image.pixels.shape, bool)
        mask[:4] = True
        return np.stack([mask] * 8), mask.astype(float)

    def expected(self, image):
        return np.full(image.pixels.shape, 0.5)


def test_other_images_are_evaluated_into_a_page_of_their_own_that_says_so(tmp_path, monkeypatch):
    images, of = import_module('images'), import_module('datasets.raters').RATER_SETS['nuclei']
    monkeypatch.setattr(import_module('image_models'), 'Models', MadeUpModels)
    monkeypatch.setattr(images, 'enter', lambda of, work: None)
    work, folder, rng = tmp_path / 'work', tmp_path / 'other_lab', np.random.default_rng(0)
    planned(of.dataset, work, [8, 8])
    for kind in ('images', 'raters'):
        (folder / kind).mkdir(parents=True)

    def write(name):
        for file, values in ((f'images/{name}', 256), (f'raters/{name}__e6', 2), (f'raters/{name}__e7', 2)):
            io.imsave(folder / f'{file}.png', rng.integers(0, values, (16, 16), np.uint8), check_contrast=False)
    write('three')
    write('four')
    args = Namespace(o=str(work), data=str(folder), stages=['evaluate'], folds=[0], page=images.results() / 'nuclei.md')
    before = args.page.read_text()
    images.run('nuclei', args)
    assert args.page == work / 'other_lab_of_nucleus.md' and (images.results() / 'nuclei.md').read_text() == before
    text = args.page.read_text()
    assert text.startswith('# Nuclei in brain sections: images of other_lab\n')
    assert f'run.py nuclei -o WORK --stages evaluate -data {folder}\n' in text
    assert 'All images of other_lab, none of which was trained on, 2 x 2 pixels averaged. ' in text
    assert '2 test images' in text and 'one laboratory' not in text
    assert 'Not measured yet: PDDDPM as tuned, with mirroring.' in text
    write('one')
    with pytest.raises(SystemExit, match='other_lab holds one, which was trained on'):
        images.run('nuclei', args)


def test_page_of_volumes(tmp_path):
    volumes, of = import_module('volumes'), import_module('datasets.hippocampus').HIPPOCAMPUS
    planned(of, tmp_path, [8, 8, 8])
    rows, base = volumes.rows()
    rng = np.random.default_rng(0)
    for row in rows[:-1]:
        for fold in range(1 if row.ensemble else 3):
            (tmp_path / 'measured' / f'{row.name}__{fold}.json').write_text(json.dumps(measured(('dice', 'nll'), rng)))
    (tmp_path / 'README.md').write_text('# Results\n\n| page | commit | date | machine |\n| [of before](x.md) | |\n')
    volumes.write_page(tmp_path, tmp_path / 'page.md')
    pages = rows_of(tmp_path / 'README.md')
    _, commit, _, machine = pages['[page](page.md)']
    assert f'Commit {commit}' in (tmp_path / 'page.md').read_text() and 'CPU cores' in machine
    assert (tmp_path / 'README.md').read_text().startswith('# Results\n\n') and '[of before](x.md)' not in pages
    table = rows_of(tmp_path / 'page.md')
    assert {row.title for row in rows[:-1]} <= table.keys()
    assert table[base][2] == '' and '(one model)' in table['stock, ensemble of the 3 folds'][1]
    assert f'Not measured yet: {rows[-1].title}.' in (tmp_path / 'page.md').read_text()


def test_page_of_intervals(tmp_path, monkeypatch):
    intervals = import_module('intervals')
    monkeypatch.setattr(intervals, 'SPLITS', 10)
    rng = np.random.default_rng(0)

    def case() -> dict[str, Any]:
        true = float(rng.gamma(5, 2))
        volume = true * float(np.exp(0.1 * rng.normal()))
        return {'true': true, 'mask': volume, 'samples': (volume * np.exp(0.02 * rng.normal(size=8))).tolist()}
    for fold in range(3):
        (tmp_path / f'8_objects__{fold}.json').write_text(json.dumps([[case() for _ in range(n)] for n in (50, 80)]))
    intervals.write_page(tmp_path, tmp_path / 'page.md')
    lines = [line.strip('| ').split(' | ') for line in (tmp_path / 'page.md').read_text().splitlines()]
    table = {line[1]: line for line in lines if line[0] == 'Phantom, total of 8 objects'}
    inside, anew = (float(table['as the package does it'][i].split(' ')[0]) for i in (2, 4))
    assert 85 < inside <= 100 and 92 < anew < 99
    assert float(table['range of 8 samples'][2].split(' ')[0]) < 60


def test_rows_of_unlike_trainings_are_paired_by_those_that_both_have(tmp_path, monkeypatch):
    page, figures = import_module('page'), []
    scores = {title: {'dice': np.array(values)[:, None]} for title, values in (
        ('base', [1.0, 2, 3]), ('one', [1.5]), ('all', [2.0, 3, 4]), ('same', [1.0, 2, 4]))}
    lines, column = [page.Line(title, of) for title, of in scores.items()], page.Column('Dice', 'dice', 1)
    lines.append(page.Line('left out', scores['all']))
    monkeypatch.setattr(page.Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    page.forest(page.table(lines, [column], 'base'), {'base': None, 'one': None, 'all': None, 'same': 'other'}, 'Dice',
                'base', 'higher', tmp_path / 'forest.md')
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ['all', 'same\n(minus that of: other)']
    better, undecided = axis.lines[1], axis.lines[3]
    assert better.get_markerfacecolor() == 'C2' and undecided.get_color() == '0.5'
    assert [line.get_xdata()[0] for line in axis.lines[1::2]] == [1, 0.3]
    of_two = page.Line('of two', {'dice': scores['base']['dice'][:2]})
    text = page.table([of_two, *lines[1:3]], [column], 'of two')
    assert '| one (1 training) | 1.5 | +0.5 |' in text and '| all | 3.0 ± 1.0 | +1.0 |' in text
    with pytest.raises(SystemExit, match='"base".* is not measured'):
        page.base_of(lines[1:], 'base')


def test_rows_and_columns_have_bases_of_their_own_and_intervals_over_images():
    page = import_module('page')
    of = {title: {'ged': np.add.outer([shift, shift + 0.1, shift - 0.1], [0.0, 0.2]), 'dice': np.full((3, 2), shift)}
          for title, shift in (('base', 1.0), ('mirrored', 2.0), ('tuned', 4.0), ('fitted', 5.0))}
    of['fitted']['dice'] = np.full((3, 2), np.nan)
    lines = [page.Line('base', of['base']), page.Line('mirrored', of['mirrored']),
             page.Line('tuned', of['tuned'], base='mirrored'),
             page.Line('fitted', of['fitted'], note=' (one ensemble)')]
    columns = (page.Column('GED²', 'ged', 1, over_images=True),
               page.Column('Dice', 'dice', 1, base='mirrored', also_to='tuned'))
    head, _, *rows = page.table(lines, columns, 'base').splitlines()
    assert head == '| | GED² | Δ | over images | Dice | Δ | Δ to tuned |'
    same = '-2.0 (-2.0 to -2.0)'
    assert rows == ['| base | 1.1 ± 0.1 |  |  | 1.0 ± 0.0 | -1.0 (-1.0 to -1.0) | -3.0 (-3.0 to -3.0) |',
                    f'| mirrored | 2.1 ± 0.1 | +1.0 (+1.0 to +1.0) | +1.0 to +1.0 | 2.0 ± 0.0 |  | {same} |',
                    '| tuned | 4.1 ± 0.1 | +2.0 (+2.0 to +2.0) | +2.0 to +2.0 | 4.0 ± 0.0 | +2.0 (+2.0 to +2.0) |  |',
                    '| fitted | 5.1 ± 0.1 (one ensemble) |  |  | – |  |  |']


def test_where_most_raters_drew_nothing_a_mask_is_a_false_alarm_and_has_no_dice():
    scores, image = import_module('image_scores'), import_module('datasets.images').Image
    empty, something = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    something[2:5, 2:6] = True
    for raters, mask, dice, alarm in (([empty, empty, something], something, np.nan, 1.0),
                                      ([empty] * 3, empty, np.nan, 0.0), ([something] * 3, something, 1.0, np.nan)):
        found = scores.against_raters(image('', something, np.stack(raters)), np.stack([mask, empty]),
                                      mask.astype(float), something.astype(float))
        np.testing.assert_equal((found['dice'], found['f1'], found['false_alarm']), (dice, dice, alarm))
        assert found['objects'] == mask.any() / 2


def test_exact_samples_have_no_distance_however_few_they_are():
    scores, phantom = import_module('image_scores'), import_module('datasets.phantom_drawing').phantom
    rng, found = np.random.default_rng(0), {4: [], 16: []}
    for case in map(phantom, range(40)):
        for number, of in found.items():
            of.append(scores.ged(case, np.stack([case.draw(rng) for _ in range(number)]))[0])
    assert np.abs([np.mean(of) for of in found.values()]).max() < 0.03


def test_phantoms_are_prepared_in_an_empty_folder(tmp_path):
    phantoms = replace(import_module('datasets.phantom').PHANTOM, number=6)
    phantoms.prepare(tmp_path)
    of, splits = phantoms.dataset, phantoms.dataset.splits(tmp_path)
    assert of.planned(tmp_path)['batch_size'] == 4
    assert of.planned(tmp_path)['architecture']['arch_kwargs']['features_per_stage'] == [16, 32, 64]
    assert [len(split['val']) for split in splits] == [2, 2, 2] and not {*splits[0]['train']} & {*splits[0]['val']}
    assert len(list(of.preprocessed(tmp_path).glob('*_2d/phantom_*.pkl'))) == 6


def test_page_of_speed_compares_what_was_measured_in_the_same_repeat(tmp_path):
    speed = import_module('speed')
    seconds = {name: [1.0 + i, 3.0 + 2 * i] for i, name in enumerate((*speed.METHODS, *speed.STEPS))}
    for dataset in speed.DATASETS:
        speed.file_of(tmp_path, dataset).write_text(json.dumps({'float32': seconds}))
    (tmp_path / speed.EXPORT).write_text(json.dumps({'stock': 10.0, 'rest': 11.0, 'samples': 7.0}))
    speed.write_page(tmp_path, tmp_path / 'page.md')
    page = (tmp_path / 'page.md').read_text()
    assert f'| MSLesion | float32 | {list(speed.METHODS)[1]} | 3.50 | 1.83 (1.67 to 2.00) |' in page
    assert f'| {speed.STEPS[1]} | 14.00 | 1.12 (1.12 to 1.12) |' in page
    assert f'- {list(speed.METHODS)[1]}: at most 2.05: reached (1.83 to 1.83)' in page
    assert f'- {list(speed.METHODS)[2]}: at most 1.25: **missed** (2.67 to 2.67)' in page
    assert '1.80 times the 10.0 s' in page
    assert (tmp_path / 'page.png').is_file()


@pytest.mark.parametrize('name', ['intervals', 'triage_page'])
def test_no_page_of_nothing(name, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('as it was')
    with pytest.raises(SystemExit, match='holds no measurement'):
        import_module(name).write_page(tmp_path, page)
    assert page.read_text() == 'as it was'


def test_differences_of_a_page_are_in_percent_of_the_error_of_its_base(tmp_path, monkeypatch):
    page, figures = import_module('page'), import_module('figures')
    monkeypatch.setattr(figures, 'results', lambda: tmp_path)
    rng, columns = np.random.default_rng(0), (page.Column('GED²', 'ged', 4), page.Column('Dice', 'dice', 4))
    base, one = ({'ged': 0.1 + shift + 0.01 * rng.random((3, 2)), 'dice': 0.9 - shift + 0.01 * rng.random((3, 2))}
                 for shift in (0.0, 0.05))
    lines = [page.Line('ensemble', base, note=' (one model)'), page.Line('base', base), page.Line('one', one)]
    table = page.table(lines, columns, 'base')
    (tmp_path / 'made_up.md').write_text(f'# Title\n\n{table}\n\nWords.\n')
    for column, error in (('GED²', lambda of: of['ged'].mean()), ('Dice', lambda of: 1 - of['dice'].mean())):
        mean, low, high = figures.difference(figures.Place('made_up', 'one', column))
        assert low < mean < high
        assert mean == pytest.approx(100 * (error(one) - error(base)) / error(base), abs=0.1)


def test_figures_are_drawn_from_the_pages_of_results(tmp_path):
    import_module('figures').run('differences', Namespace(page=tmp_path / 'differences.png'))
    for name in ('differences', 'phantom', 'nuclei', 'cells', 'nodules', 'hippocampus'):
        assert (tmp_path / f'{name}.png').stat().st_size > 5000
