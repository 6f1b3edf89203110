"""The benchmarks: each measures in a work folder, where what is there is not measured again, and writes its page."""
from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
MODULES = {'phantom': 'images', 'nuclei': 'images', 'cells': 'images', 'nodules': 'images', 'hippocampus': 'volumes',
           'intervals': 'intervals', 'triage': 'triage', 'speed': 'speed',
           'headline': 'figures', 'levels': 'figures', 'differences': 'figures'}
"""Name -> the module with its `STAGES` and `run`, and, if any, `NEEDS` (folders of trained models) and `arguments`."""


def main(arguments: list[str] | None = None) -> None:
    from machine import results
    from nnunet import NUM_FOLDS
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest='name', required=True, metavar='NAME')
    for name, module in MODULES.items():
        benchmark = import_module(module)
        page = f'{name}.png' if module == 'figures' else f'{name}.md'
        command = commands.add_parser(name, description=benchmark.__doc__, help=f'writes {page}')
        command.add_argument('-o', required=name != 'differences',
                             help="work folder: nnU-Net's three folders and the measurements")
        command.add_argument('-data', help='folder of the data sets (or set NNUNET_PDDDPM_DATA)')
        command.add_argument('-page', type=Path, default=results() / page,
                             help='to write (default %(default)s)')
        command.add_argument('-folds', type=int, nargs='+', default=list(range(NUM_FOLDS)), choices=range(NUM_FOLDS),
                             help='trainings (default: all); rows of an ensemble need all of them to be trained')
        command.add_argument('--stages', nargs='+', choices=benchmark.STAGES,
                             default=[of for of in benchmark.STAGES if of not in getattr(benchmark, 'ON_DEMAND', ())])
        for option, folder in getattr(benchmark, 'NEEDS', {}).items():
            command.add_argument(f'-{option}', type=Path, help=f'work folder of {folder}')
        if hasattr(benchmark, 'arguments'):
            benchmark.arguments(command, name)
    args = parser.parse_args(arguments)
    import_module(MODULES[args.name]).run(args.name, args)


if __name__ == '__main__':
    main()
