"""Writes docs/dev/hooks.md, what the package uses of nnU-Net: `python docs/dev/hooks.py`."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import nnunetv2
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

HERE = Path(__file__).resolve().parent
PAGE, PACKAGE = HERE / 'hooks.md', HERE.parents[1] / 'nnunet_pdddpm'
HEAD = """# nnU-Net's hooks in use

`python docs/dev/hooks.py` writes this page from the code. Most of these hooks are not a public interface of nnU-Net:
check them before allowing a new version of nnunetv2. `tests/test_docs.py` fails if one is missing in the installed
nnunetv2. What is in use but has no name to be found by is in [architecture](architecture.md#hooks-of-nnu-net).
"""
MESSAGES = ('Training done.', 'Epoch ', 'split has ', 'random 80:20 ', 'predicting ', 'training_log_',
            '_timestamps', 'Could not find requested nnunet trainer ', 'Encountered inf in predicted array')
"""Parts of them, and of composed names, as they are in both codes."""
NAME = re.compile(r'\w*([a-z]_[a-z0]|[a-z][A-Z])\w*|\w+\.(json|pth)|[a-z]+_')
"""In which one sees that it is no word."""
NOT_READ = {'tests', 'dataset_conversion', 'batch_running', 'variants'}
"""Folders of nnU-Net whose names are of no use; the last has the shims of this package."""
HELD: dict[type, tuple[str, ...]] = {
    nnUNetTrainer: ('trainer',), nnUNetPredictor: ('predictor',),
    PlansManager: ('plans_manager', 'plans', 'manager', 'PlansManager'),
    ConfigurationManager: ('configuration_manager', 'configuration', 'get_configuration'),
    LabelManager: ('label_manager', 'manager', 'get_label_manager'),
    nnUNetBaseDataset: ('dataset', 'dataset_class', 'infer_dataset_class'), DefaultPreprocessor: ('preprocessor',),
    SimpleITKIO: ('reader', '_reader'), MetaLogger: ('logger',), DC_and_CE_loss: ('parts', 'cast'),
    DeepSupervisionWrapper: ('loss',)}
"""Class of nnU-Net -> what its objects are called in the package, or is called to get them."""
TREES = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob('*.py'))}


def place(file: Path) -> str:
    """A file of the package, for the page."""
    return f'`{file.relative_to(PACKAGE).as_posix()}`'


@cache
def imports() -> dict[str, dict[str, set[str]]]:
    """Module of nnunetv2 -> name that is imported from it -> files."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('nnunetv2.'):
                for name in node.names:
                    found[str(node.module)][name.name].add(place(file))
    return found


@cache
def own(theirs: type) -> set[str]:
    """Methods of a class of nnU-Net, and the attributes that its code sets."""
    inherited = [base for base in theirs.__mro__ if base.__module__.startswith('nnunetv2')]
    code = ''.join(inspect.getsource(base) for base in inherited)
    return {name for base in inherited for name in vars(base) if not name.startswith('__')} | set(
        re.findall(r'self\.(\w+)\s*[,:=]', code))


@cache
def derived() -> list[tuple[type, Path, ast.ClassDef]]:
    """The classes of the package that come from one of nnU-Net's, each with that."""
    known = {name: of for module, names in imports().items() for name in names
             if inspect.isclass(of := getattr(importlib.import_module(module), name))}
    classes = [(file, node) for file, tree in TREES.items() for node in tree.body if isinstance(node, ast.ClassDef)]
    found: dict[str, tuple[type, Path, ast.ClassDef]] = {}
    for _ in range(3):  # a class may come before that which it is derived from
        for file, node in classes:
            for base in (base.id for base in node.bases if isinstance(base, ast.Name)):
                if base in known:
                    known[node.name] = known[base]
                    found[node.name] = known[base], file, node
    return list(found.values())


@cache
def overridden() -> dict[str, tuple[set[str], str]]:
    """`CLASS.method` of nnU-Net -> files that override it, and what for, by the first sentence of its docstring."""
    rows: dict[str, tuple[set[str], str]] = {}
    for theirs, file, node in derived():
        for method in (of for of in node.body if isinstance(of, ast.FunctionDef) and of.name in own(theirs)):
            files, why = rows.get(f'{theirs.__name__}.{method.name}', (set(), ''))
            about = ' '.join((ast.get_docstring(method) or '').partition('\n\n')[0].split())
            said = re.split(r'(?<=\.) ', re.sub(r"^As [\w-]+'s\. ?", '', about))[0]
            rows[f'{theirs.__name__}.{method.name}'] = {*files, place(file)}, why or said
    return rows


@cache
def attributes(tree: ast.AST) -> list[ast.Attribute]:
    """All that are used in code."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def holder(node: ast.Attribute) -> str:
    """What an attribute is taken of, by its last name: `manager` of `self.manager.plans`, `reader` of `reader().read`.
    """
    of = node.value.func if isinstance(node.value, ast.Call) else node.value
    return getattr(of, 'attr', getattr(of, 'id', ''))


@cache
def used() -> dict[str, set[str]]:
    """`CLASS.name` of nnU-Net -> files that use this method or attribute, if none overrides it: of `self` in classes
    derived from it, and of what is called as `HELD` says."""
    found: dict[str, set[str]] = defaultdict(set)
    places = [(theirs, file, tree, names) for file, tree in TREES.items() for theirs, names in HELD.items()]
    for theirs, file, tree, names in [*places, *((*of, ('self',)) for of in derived())]:
        for node in attributes(tree):
            if node.attr in own(theirs) and holder(node) in names:
                first = [base for base in theirs.__mro__ if node.attr in own(base)][-1]
                found[f'{first.__name__}.{node.attr}'].add(place(file))
    return {name: files for name, files in found.items() if name not in overridden()}


@cache
def nnunet() -> dict[str, ast.Module]:
    """Module of nnU-Net -> its code."""
    root = Path(nnunetv2.__path__[0])
    files = [file for file in sorted(root.rglob('*.py')) if not NOT_READ & {*file.relative_to(root).parts}]
    return {'.'.join(file.relative_to(root.parent).with_suffix('').parts): ast.parse(file.read_text('utf-8'))
            for file in files}


def text(node: ast.AST | None) -> str:
    """What a constant says; the empty string of other nodes."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''


@cache
def strings(tree: ast.AST) -> set[str]:
    """Texts in code, parts of f-strings too, but no docstrings and no values of named arguments."""
    nodes = [*ast.walk(tree)]
    left_out = {id(node.value) for node in nodes if isinstance(node, (ast.Expr, ast.keyword))}
    return {text(node) for node in nodes if id(node) not in left_out}


def keys(tree: ast.AST) -> set[str]:
    """Texts by which something is taken of a dict."""
    return {text(node.slice) if isinstance(node, ast.Subscript) else text(node.args[0]) for node in ast.walk(tree)
            if isinstance(node, ast.Subscript)
            or isinstance(node, ast.Call) and node.args and getattr(node.func, 'attr', '') == 'get'}


def named() -> dict[str, set[str]]:
    """Key, file name or variable that the package has in common with nnU-Net -> files."""
    found: dict[str, set[str]] = defaultdict(set)
    dicts = [node for tree in nnunet().values() for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    their_keys = set().union(*map(keys, nnunet().values()), *({*map(text, node.keys)} for node in dicts))
    their_names = set().union(*map(strings, nnunet().values()))
    for file, tree in TREES.items():
        names = {name for name in strings(tree) & their_names if NAME.fullmatch(name)}
        for name in names | keys(tree) & their_keys - {''}:
            found[name].add(place(file))
    return found


def matched() -> dict[str, tuple[list[str], list[str]]]:
    """Part of a message -> modules of nnU-Net that write it, files that look for it."""
    found = {}
    for words in MESSAGES:
        written = [f'`{module}`' for module, tree in nnunet().items() if any(words in of for of in strings(tree))]
        read = [place(file) for file, tree in TREES.items() if any(words in of for of in strings(tree))]
        assert written and read, f'{words!r} is not in nnU-Net, or not in the package'
        found[words] = written, read
    return found


def table(title: str, about: str, *columns: str, rows: Iterable[Iterable[str]]) -> str:
    """A section of the page."""
    lines = [' | '.join(columns), '|'.join(['---'] * len(columns)), *map(' | '.join, rows)]
    lines = [f'| {line} |' if '---' not in line else f'|{line}|' for line in lines]
    return '\n'.join(['', f'## {title}', '', *([about, ''] if about else []), *lines, ''])


def listed(names: Iterable[str]) -> str:
    """In a cell."""
    return ', '.join(sorted(names, key=lambda name: name.strip('`')))


def page() -> str:
    """The whole page."""
    return ''.join([
        HEAD,
        table('Overridden', '', 'method', 'in', 'what for', rows=(
            (f'`{name}`', listed(files), why) for name, (files, why) in sorted(overridden().items()))),
        table('Used without overriding', '', 'method or attribute', 'in', rows=(
            (f'`{name}`', listed(files)) for name, files in sorted(used().items()))),
        table('Imported', '', 'module', 'names', 'in', rows=(
            (f'`{module}`', listed(f'`{name}`' for name in names), listed(set().union(*names.values())))
            for module, names in sorted(imports().items()))),
        table('Messages', "Parts of nnU-Net's logs, errors and names that the package looks for, or puts together.",
              'text', 'written by', 'looked for in', rows=(
                  (f'"{words}"', listed(written), listed(read)) for words, (written, read) in matched().items())),
        table('Names', "Keys of dicts, files, folders and variables that nnU-Net's code names as well.\nCommon words "
              "may be the package's own.", 'name', 'in', rows=(
                  (f'`{name}`', listed(files)) for name, files in sorted(named().items())))])


if __name__ == '__main__':
    PAGE.write_text(page())
    print(PAGE)
