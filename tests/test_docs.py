"""README and docs name files, tests, flags and defaults that there are."""
from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import pytest

from nnunet_pdddpm.commands import check, evaluate, predict, tune
from nnunet_pdddpm.network.settings import CHOICES, RANGES, SamplingSettings

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')])
COMMANDS = {'nnUNetv2_pdddpm_predict': predict.main, 'nnUNetv2_pdddpm_check': check.main,
            'nnUNetv2_pdddpm_predict_from_modelfolder': predict.main_modelfolder,
            'nnUNetv2_pdddpm_evaluate': evaluate.main, 'nnUNetv2_pdddpm_tune': tune.main}
TESTS = {name for file in (ROOT / 'tests').rglob('test_*.py')
         for name in re.findall(r'def (test_\w+)', file.read_text())}

if not (ROOT / 'docs').is_dir():
    pytest.skip('the docs are not beside the tests', allow_module_level=True)


@pytest.fixture(scope='module')
def flags():
    """Command -> its flags."""
    def of(main) -> set[str]:
        with pytest.MonkeyPatch.context() as patch:
            shown: list[str] = []
            patch.setattr('argparse.ArgumentParser._print_message',
                          lambda self, message, file=None: shown.append(message))
            with pytest.raises(SystemExit):
                main(['-h'])
        return set(re.findall(r'(?<![\w-])--?[a-zA-Z]\w*', ''.join(shown)))
    return {name: of(main) for name, main in COMMANDS.items()}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_are_there(page):
    text = page.read_text()
    for target in re.findall(r'\]\(([^)#]+?)(?:#[^)]*)?\)', text):
        assert '://' in target or (page.parent / target).exists(), target
    for file in re.findall(r'(?:benchmarks|tests)/[\w/]+\.py', text):
        assert (ROOT / file).is_file(), file
    for file in re.findall(r'`((?:slow/)?test_\w+\.py)', text):
        assert (ROOT / 'tests' / file).is_file(), file


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_tests_are_there(page):
    for name, cut in re.findall(r'(?:`|::)(test_\w+?)(\.\.\.)?(?=[`\[])', page.read_text()):
        assert any(test.startswith(name) for test in TESTS) if cut else name in TESTS, name


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_of_the_commands_are_theirs(page, flags):
    for command, arguments in re.findall(r'(nnUNetv2_pdddpm_\w+)((?: [^`\n#|]*)?)', page.read_text()):
        if command in flags:
            used = set(re.findall(r'(?<![\w-])--?[a-zA-Z]\w*', arguments))
            assert used <= flags[command], (command, used - flags[command])


def test_the_table_of_settings_has_their_ranges_and_defaults():
    text = (ROOT / 'docs' / 'settings.md').read_text()
    rows = [[cell.strip() for cell in line.strip('|').split('|')]
            for line in text.splitlines() if line.startswith('| `')]
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
