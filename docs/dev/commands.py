"""Writes docs/reference/commands.md from the commands' parsers: `python docs/dev/commands.py`.

The actions are rendered here and not by argparse, whose lines depend on the terminal and on the Python version.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Collection
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).resolve().parent.parent / 'reference' / 'commands.md'
HEAD = """# Commands

`python docs/dev/commands.py` writes this page from the `--help` of the commands. See also the
[sampling settings](settings.md), the [output files](outputs.md), and nnU-Net's
[documentation of its own commands](https://github.com/MIC-DKFZ/nnUNet/tree/master/documentation).

The exit status is 0 if everything was done, 1 if something could not be done (one sentence says what and why), and 2 if
the command line is wrong.
"""
VARIABLES = ('nnUNet_npp', 'nnUNet_nps', 'nnUNet_def_n_proc')
"""That change defaults."""


class Parsed(Exception):
    """A command has made its parser."""


def parser_of(main: Callable[..., None]) -> argparse.ArgumentParser:
    """The parser with which a command would read its arguments."""
    found: list[argparse.ArgumentParser] = []

    def parse_args(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(self)
        raise Parsed
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    with mock.patch.object(argparse.ArgumentParser, 'parse_args', parse_args), \
            mock.patch.dict(os.environ, kept, clear=True):
        try:
            main()
        except Parsed:
            return found[0]
    raise AssertionError(f'{main} parses no arguments')


def commands() -> dict[str, argparse.ArgumentParser]:
    """Name of each command -> its parser, in the order in which they are used."""
    from nnunet_pdddpm.commands import check, demo, evaluate, predict, tune
    mains = {'check': check.main, 'predict': predict.main, 'predict_from_modelfolder': predict.main_modelfolder,
             'evaluate': evaluate.main, 'tune': tune.main, 'demo': demo.main}
    return {f'nnUNetv2_pdddpm_{name}': parser_of(main) for name, main in mains.items()}


def usage(action: argparse.Action) -> str:
    """How an argument is written: its names, and what stands for its value."""
    value = action.metavar or ('{' + ','.join(map(str, action.choices)) + '}' if action.choices else
                               {int: 'N', float: 'X'}.get(action.type, 'VALUE'))  # type: ignore[call-overload]
    value = {'+': f'{value} ...', '?': f'[{value}]', 0: '', None: value}[action.nargs]  # type: ignore[index]
    return ', '.join(f'`{f"{name} {value}".strip()}`' for name in action.option_strings or [''])


def description(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """Its help, with the default put in; that of `-np` depends on the machine."""
    default = "nnU-Net's own" if action.dest == 'np' else action.default
    text = (action.help or '') % {**vars(action), 'prog': parser.prog, 'default': default}
    return 'required; ' * (action.required and bool(action.option_strings)) + text


def section(name: str, parser: argparse.ArgumentParser, known: Collection[str]) -> str:
    """Markdown of a command: a table for each group of its arguments, without the known ones of another command."""
    tables: dict[str, list[str]] = {}
    for group in parser._action_groups:
        own = group.title not in ('positional arguments', 'optional arguments', 'options')
        for action in group._group_actions:
            if action.dest != 'help' and (row := f'| {usage(action)} | {description(action, parser)} |') not in known:
                title = f'**{group.title}**: {group.description or ""}'.removesuffix(': ') if own else ''
                tables.setdefault(title, []).append(row)
    lines = [f'## {name}', '', parser.description or '']
    for title, rows in tables.items():
        lines += ['', *([title, ''] if title else []), '| argument | meaning |', '|---|---|', *rows]
    return '\n'.join(lines) + '\n'


def page() -> str:
    """The whole page."""
    sections: dict[str, str] = {}
    for name, parser in commands().items():
        shared = sections.get(name.removesuffix('_from_modelfolder'), '')
        note = '\nAll other arguments are those of `nnUNetv2_pdddpm_predict`, except `-d`, `-c`, `-tr`, `-p`, ' \
               '`-num_parts` and\n`-part_id`.\n'
        sections[name] = section(name, parser, shared.splitlines()) + note * bool(shared)
    return '\n'.join([HEAD, *sections.values()])


if __name__ == '__main__':
    PAGE.write_text(page())
    print(PAGE)
