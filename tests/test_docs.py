"""README and docs are true of the code: links, anchors, files, tests, commands, flags, defaults, settings, fields."""
from __future__ import annotations

import ast
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from scipy import stats

import nnunet_pdddpm
from nnunet_pdddpm.network.settings import CHOICES, RANGES, SamplingSettings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PACKAGE = Path(nnunet_pdddpm.__file__).parent
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.glob('**/*.md')])
CODE = sorted(file for folder in ('nnunet_pdddpm', 'trainers', 'tests', 'benchmarks', 'docs')
              for file in (ROOT / folder).rglob('*.py'))
TESTS = {name for file in (ROOT / 'tests').rglob('test_*.py')
         for name in re.findall(r'def (test_\w+)', file.read_text())}
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))

if not DOCS.is_dir():
    pytest.skip('the docs are not beside the tests', allow_module_level=True)


@pytest.fixture(scope='module')
def parsers():
    """Command -> its parser."""
    return runpy.run_path(str(DOCS / 'dev' / 'commands.py'))['commands']()


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@each_page
def test_links_anchors_and_named_files_are_there(page):
    text = page.read_text()
    for target, anchor in re.findall(r'\]\(([^)#]*)(?:#([^)]*))?\)', text):
        if '://' not in target:
            to = page.parent / target if target else page
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), f'{target}#{anchor}'
    for file in re.findall(r'(?:benchmarks|tests|docs)/[\w/.-]+\.(?:py|md|png|svg)', text):
        assert (ROOT / file).is_file(), file
    for file in re.findall(r'`(test_\w+\.py)', text):
        assert list((ROOT / 'tests').rglob(file)), file
    for file in re.findall(r'`([a-z]+/\w+\.py)', text):
        assert (PACKAGE / file).is_file() or (ROOT / file).is_file(), file


def test_pages_that_the_code_names_are_there():
    for file in CODE:
        for named in re.findall(r'docs/[\w/.-]+\.(?:md|png|svg)', file.read_text()):
            assert (ROOT / named).is_file(), (file, named)


@each_page
def test_named_tests_are_there(page):
    for name, cut in re.findall(r'(?:`|::)(test_\w+?)(\.\.\.)?(?=[`\[])', page.read_text()):
        assert any(test.startswith(name) for test in TESTS) if cut else name in TESTS, name


@each_page
def test_flags_of_the_commands_are_theirs(page, parsers):
    text = page.read_text()
    for command, arguments in re.findall(r'(nnUNetv2_pdddpm_\w+)((?: +(?!nnUNetv2_)[^\s`#|]+)*)', text):
        if command in parsers:
            used = set(re.findall(r'(?<![\w-])--?[a-zA-Z]\w*', arguments))
            assert used <= parsers[command]._option_string_actions.keys(), (command, used)
        else:
            assert any(name.startswith(command) for name in parsers), command


def test_defaults_in_the_help_of_the_commands_are_theirs(parsers):
    commands = (DOCS / 'reference' / 'commands.md').read_text()
    checked = 0
    for command, parser in parsers.items():
        for line in re.search(rf'^## {command}$(.*?)(?=^## |\Z)', commands, re.DOTALL | re.MULTILINE)[1].splitlines():
            stated = re.search(r'^\| `(-[\w-]+).*\bdefault: ([^;)|]+)', line)
            if stated:
                default = parser._option_string_actions[stated[1]].default
                if default is None or isinstance(default, bool) or stated[1] == '-np':  # in words
                    assert default is not True and not re.fullmatch(r'[\d.]+', stated[2]), (command, line)
                else:
                    said = ' '.join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
                    assert stated[2].strip() == said or stated[2].startswith('the variable nnUNet_'), (command, line)
                    checked += 1
    assert checked > 10


def test_decisions_have_the_values_of_the_defaults_and_the_names_of_constants():
    init = next(node for node in ast.walk(ast.parse((PACKAGE / 'training' / 'trainer.py').read_text()))
                if isinstance(node, ast.FunctionDef) and node.name == '__init__')
    trainer = {node.targets[0].attr: node.value.value for node in init.body if isinstance(node, ast.Assign)
               and isinstance(node.value, ast.Constant) and isinstance(node.targets[0], ast.Attribute)
               and not node.targets[0].attr.startswith('_')}
    defaults, named = {**trainer, **asdict(SamplingSettings())}, set()
    constants = {name.id for file in PACKAGE.rglob('*.py') for node in ast.parse(file.read_text()).body
                 for target in getattr(node, 'targets', [getattr(node, 'target', node)])
                 for name in ast.walk(target) if isinstance(name, ast.Name)}
    table = (DOCS / 'dev' / 'decisions.md').read_text().partition('## Removed')[0]
    for default in re.findall(r'^\| (.*?) \|', table, re.MULTILINE):
        for name, value in re.findall(r'`([a-z]\w+)`(?: = `?([\w.-]+\b))?', default):
            if name in defaults:
                named.add(name)
                here = defaults[name]
                said = here if isinstance(here, str) else f'{here:g}'
                assert value == said if value else here is True or said in re.findall(r'[\d.]+\d', default), name
        for name in re.findall(r'`([A-Z][A-Z_]+)`', default):
            assert name in constants, name
    assert named == defaults.keys()


@pytest.fixture(scope='module')
def benchmarks():
    """Name of each benchmark -> its parser."""
    if sys.version_info < (3, 11):
        pytest.skip('rows.toml is read by tomllib of Python 3.11')
    path = list(sys.path)
    main = runpy.run_path(str(ROOT / 'benchmarks' / 'run.py'))['main']
    parser = runpy.run_path(str(DOCS / 'dev' / 'commands.py'))['parser_of'](main)
    sys.path[:] = path
    return parser._subparsers._group_actions[0].choices


def test_named_benchmarks_have_these_flags(benchmarks):
    texts = [file.read_text() for file in [*PAGES, *(ROOT / 'benchmarks' / 'pages').glob('*.md')]]
    named = [found for text in texts for found in re.findall(r'benchmarks/run\.py (\S+?)((?: +[^\s`]+)*)[`\n]', text)]
    assert len(named) > 10
    for name, arguments in named:
        for one in benchmarks if name in ('NAME', '{name}') else [name]:
            known = benchmarks[one]._option_string_actions.keys()
            assert {*re.findall(r'(?<![\w-])--?[a-zA-Z]\w*', arguments)} <= known, (one, arguments)
    for stage, names in re.findall(r'`--stages (\w+)[^`]*` of ((?:`\w+`(?:, | and )?)+)', '\n'.join(texts)):
        for one in re.findall(r'\w+', names.replace(' and ', ' ')):
            assert stage in benchmarks[one]._option_string_actions['--stages'].choices, (one, stage)


@pytest.mark.parametrize('script, page', [('dev/commands.py', 'reference/commands.md'),
                                          ('dev/hooks.py', 'dev/hooks.md')])
def test_pages_made_of_the_code_are_up_to_date(script, page):
    assert runpy.run_path(str(DOCS / script))['page']() == (DOCS / page).read_text(), f'run python docs/{script}'


def test_no_attribute_of_nnunet_is_held_by_a_name_that_the_page_of_hooks_does_not_know():
    hooks, page = runpy.run_path(str(DOCS / 'dev' / 'hooks.py')), (DOCS / 'dev' / 'hooks.md').read_text()
    used = {node.attr for tree in hooks['TREES'].values() for node in hooks['attributes'](tree)}
    missing = {name for of in hooks['HELD'] for name in used & hooks['own'](of) if f'.{name}`' not in page}
    assert missing == {'log', 'run', 'verbose'}, 'add what holds it to HELD'  # these are of others


@pytest.mark.parametrize('table', ['README.md', 'docs/results/README.md'])
def test_numbers_with_a_fraction_in_the_tables_of_results_are_on_the_pages_that_they_name(table):
    pages, number = [], re.compile(r'[-+]?\d+\.\d+')
    for row in (ROOT / table).read_text().splitlines():
        if not row.startswith('| ') or 'commit' in row or re.search(r'\| \d{4}-\d\d-\d\d \|', row):
            continue
        named = re.findall(r'\]\((?:docs/results/)?(\w+\.md)\)', row)
        pages = named or pages  # "the same" is that of the row before
        known = {float(value) for page in pages if (DOCS / 'results' / page).is_file()
                 for value in number.findall((DOCS / 'results' / page).read_text())}
        for value in number.findall(re.sub(r'\]\(.*?\)|`.*?`', '', row)) if pages else ():
            digits = len(value.split('.')[1])
            assert any(abs(round(one, digits) - float(value)) < 1e-9 for one in known), (pages, value, row)
        for difference, low, high in re.findall(r'([-+][\d.]+)(?: \(|, )([-+][\d.]+) to ([-+][\d.]+)[);]', row):
            said = f'{difference} ({low} to {high})'
            assert any(said in (DOCS / 'results' / page).read_text() for page in pages), row


DIFFERENCE = re.compile(r'([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\)')
VERDICTS = {True: ('win', '**win**', 'loss'), False: ('none found', 'undecided')}


@pytest.mark.parametrize('page', [ROOT / 'README.md', DOCS / 'results' / 'README.md'], ids=['README', 'results'])
def test_a_win_or_a_loss_is_a_difference_whose_interval_excludes_0(page):
    checked = 0
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('| ').split(' | ')] if line.startswith('| ') else []
        for cell, verdict in zip(cells, cells[1:], strict=False):
            if found := DIFFERENCE.fullmatch(cell):
                _, low, high = map(float, found.groups())
                assert verdict.strip(' |') in VERDICTS[low > 0 or high < 0], line
                checked += 1
    assert checked > 6


def test_after_correction_for_four_data_sets_the_probabilities_win_on_nuclei_only():
    """Bonferroni, by the t of three trainings that the intervals of the table stand for."""
    table = (DOCS / 'results' / 'README.md').read_text().partition('## Probabilities')[2].partition('\n\nThe second')[0]
    p = {}
    for name, difference in re.findall(r'^\| \[(\w+)\]\([^|]*\|[^|]*\|[^|]*\| ([^|]*) \| win', table, re.MULTILINE):
        mean, low, high = map(float, DIFFERENCE.fullmatch(difference).groups())
        p[name] = 2 * stats.t.sf(abs(mean) / ((high - low) / 2 / stats.t.ppf(0.975, 2)), 2)
    assert len(p) == 4 and [name for name, value in p.items() if value < 0.05 / 4] == ['nuclei']


def test_the_list_of_results_names_the_commit_of_each_page():
    listed = (DOCS / 'results' / 'README.md').read_text()
    for page in (DOCS / 'results').glob('*.md'):
        commit = re.search(r'^Commit (.*?)[.] Machine', page.read_text(), re.MULTILINE)
        assert commit and f'| [{page.stem}]({page.name}) | {commit[1]} | 20' in listed or page.name == 'README.md'


def test_the_picture_of_the_architecture_is_up_to_date():
    script = runpy.run_path(str(DOCS / 'dev' / 'architecture.py'))
    assert script['picture']() == (DOCS / 'dev' / 'architecture.svg').read_text(), 'run python docs/dev/architecture.py'


def test_the_table_of_settings_has_their_ranges_and_defaults():
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in (DOCS / 'reference' / 'settings.md').read_text().splitlines() if line.startswith('| `')]
    stated = {}
    for names, _, allowed, default in (row for row in rows if len(row) == 4):
        for name, value in zip(re.findall(r'`(\w+)`', names), default.split(', '), strict=True):
            stated[name] = allowed, value.strip('`')
    settings = asdict(SamplingSettings())
    assert stated.keys() == settings.keys()
    for name, (allowed, value) in stated.items():
        assert value == (settings[name] if name in CHOICES else f'{settings[name]:g}')
        if name in RANGES:
            low, high = RANGES[name]
            assert allowed.replace(',', ' to') == f'{low:.10g} to {high:.10g}'
