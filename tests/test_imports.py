"""The arrows between the packages point one way, and no module imports another in a circle, not even for its types."""
from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import nnunet_pdddpm

ROOT = Path(nnunet_pdddpm.__file__).parent
MODULES = {'.'.join(('nnunet_pdddpm', *file.relative_to(ROOT).with_suffix('').parts)).removesuffix('.__init__'): file
           for file in ROOT.rglob('*.py')}
BASE = {'cpu', 'file_names', 'files', 'geometry', 'image_files', 'labels', 'logs', 'memory', 'texts', 'versions'}
MAY_USE = {'diffusion': set(), 'network': {'diffusion'}, 'evaluation': set(), 'inference': {'diffusion', 'network'},
           'report': {'inference'}, 'demo': {'inference'},
           'tuning': {'diffusion', 'network', 'inference', 'evaluation'},
           'training': {'diffusion', 'network', 'tuning'},
           'commands': {'network', 'inference', 'evaluation', 'report', 'demo', 'tuning', 'training'}}
"""Package -> those that it may import, beside the modules of BASE."""


def imported(file: Path, modules: Iterable[str] = MODULES) -> set[str]:
    """Those of the modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (file, node.lineno)  # a relative import would not be seen
            found |= {node.module, *(f'{node.module}.{name.name}' for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & {*modules}


def test_the_arrows_between_packages():
    for module, file in MODULES.items():
        package, *_ = (*module.split('.')[1:], 'nnunet_pdddpm')
        used = {(*other.split('.')[1:], '')[0] for other in imported(file)} - {'', package} - BASE
        assert used <= MAY_USE.get(package, set()), (module, used)


def test_no_module_imports_another_in_a_circle():
    graph = {module: imported(file) - {module} for module, file in MODULES.items()}
    assert len(graph) > 50 and sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_benchmark_imports_another_in_a_circle():
    folder = Path(__file__).parent.parent / 'benchmarks'
    if not folder.is_dir():
        pytest.skip('the benchmarks are not beside the tests')
    files = {'.'.join(file.relative_to(folder).with_suffix('').parts): file for file in folder.rglob('*.py')}
    graph = {module: imported(file, files) - {module} for module, file in files.items()}
    assert len(graph) > 10 and sum(map(len, graph.values())) > 20
    TopologicalSorter(graph).prepare()
