"""Writes docs/dev/hooks.md, what the package overrides, uses and imports of nnU-Net: `python docs/dev/hooks.py`."""
from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE, PACKAGE = HERE / 'hooks.md', HERE.parents[1] / 'nnunet_pdddpm'
HEAD = """# nnU-Net's hooks in use

`python docs/dev/hooks.py` writes this page from the code. Most of these hooks are not a public interface of nnU-Net:
check them before allowing a new version of nnunetv2. `tests/test_docs.py` fails if one is missing in the installed
nnunetv2.
"""
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


def attributes(tree: ast.AST, of: str) -> set[str]:
    """Attributes of a variable, or of an attribute, of this name."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and of in (getattr(node.value, 'id', ''), getattr(node.value, 'attr', ''))}


def used() -> dict[str, set[str]]:
    """Class of nnU-Net -> methods and attributes of it that are used and not overridden: of `self` in classes derived
    from it, and of what is called `trainer` or `predictor`."""
    found: dict[str, set[str]] = defaultdict(set)
    for theirs, _, node in derived():
        found[theirs.__name__] |= attributes(node, 'self') & own(theirs)
    for theirs in {theirs for theirs, _, _ in derived()}:
        called = theirs.__name__.removeprefix('nnUNet').lower()
        for tree in TREES.values():
            found[theirs.__name__] |= attributes(tree, called) & own(theirs)
    hooks = overridden()
    return {of: {name for name in names if f'{of}.{name}' not in hooks} for of, names in found.items()}


def page() -> str:
    """The whole page."""
    lines = [HEAD, '## Overridden', '', '| method | in | what for |', '|---|---|---|']
    hooks, rest = sorted(overridden().items()), sorted(used().items())
    lines += [f'| `{name}` | {", ".join(sorted(files))} | {why} |' for name, (files, why) in hooks]
    lines += ['', '## Used without overriding', '', '| class | methods and attributes |', '|---|---|']
    lines += [f'| `{name}` | {", ".join(f"`{of}`" for of in sorted(names))} |' for name, names in rest]
    lines += ['', '## Imported', '', '| module | names | in |', '|---|---|---|']
    lines += [f'| `{module}` | {", ".join(f"`{name}`" for name in sorted(names))} | '
              f'{", ".join(sorted(set().union(*names.values())))} |' for module, names in sorted(imports().items())]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    PAGE.write_text(page())
    print(PAGE)
