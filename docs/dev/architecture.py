"""Draws docs/dev/architecture.svg, the arrows that tests/test_imports.py keeps: `python docs/dev/architecture.py`."""
from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).resolve().parent
PICTURE = HERE / 'architecture.svg'
WHAT = {'commands': 'the command line', 'training': "nnU-Net's trainer", 'tuning': 'settings and calibration',
        'inference': 'a case: image to files', 'network': 'what nnU-Net sees; checkpoints', 'diffusion': 'mathematics',
        'evaluation': 'metrics', 'report': 'report.html', 'demo': 'phantoms'}
PLACES = {'commands': (1, 0), 'training': (1, 1), 'tuning': (1, 2), 'inference': (1, 3), 'network': (1, 4),
          'diffusion': (1, 5), 'evaluation': (0, 3), 'report': (2, 1), 'demo': (0, 1)}
"""Package -> column, row."""
WIDTH, HEIGHT, COLUMN, ROW, LEFT, TOP = 236, 58, 290, 92, 16, 14


def arrows() -> tuple[dict[str, set[str]], set[str]]:
    """Package -> those that it may import, and the modules that all may."""
    found = {}
    for node in ast.parse((HERE.parents[1] / 'tests' / 'test_imports.py').read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ('MAY_USE', 'BASE'):
                found[name] = eval(compile(ast.Expression(node.value), 'test_imports.py', 'eval'))
    return found['MAY_USE'], found['BASE']


def direct(may_use: dict[str, set[str]], one: str, other: str) -> bool:
    """Whether there is no way from one package to the other but the arrow itself."""
    def reached(package: str) -> set[str]:
        return may_use[package].union(*(reached(of) for of in may_use[package]))
    return all(other not in reached(between) for between in may_use[one] - {other})


def line(one: str, other: str) -> str:
    """The arrow between two packages."""
    (column, row), (to_column, to_row) = PLACES[one], PLACES[other]
    x, y = LEFT + COLUMN * column + WIDTH / 2, TOP + ROW * row + HEIGHT
    to_x, to_y = LEFT + COLUMN * to_column + WIDTH / 2, TOP + ROW * to_row
    side = 40 * (to_column > column) - 40 * (to_column < column)  # not all at one point
    x, to_x, to_y = x + side, to_x - side, to_y - 3
    if side and to_row > row + 1:  # from the side, past what lies between
        x, to_x, to_y = x + 1.5 * side, to_x - 1.9 * side, to_y + 20
    return (f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="#333" stroke-width="1.8" '
            f'marker-end="url(#head)"/>')


def box(x: float, y: float, width: float, colour: str, title: str, *texts: str) -> str:
    """A rectangle with lines of text in it."""
    middle = f'x="{x + width / 2:g}" text-anchor="middle"'
    below = ''.join(f'<text {middle} y="{y + 34 + 15 * i:g}" font-size="10.5">{text}</text>'
                    for i, text in enumerate(texts))
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{HEIGHT}" rx="6" fill="{colour}" stroke="#555"/>'
            f'<text {middle} y="{y + 18:g}" font-weight="bold">{title}</text>{below}')


def picture() -> str:
    """The SVG: an arrow where there is no other way, the further packages that one may import as text."""
    may_use, base = arrows()
    width, height = 2 * LEFT + 2 * COLUMN + WIDTH, 2 * TOP + 6 * ROW + HEIGHT
    parts = []
    for one, others in may_use.items():
        drawn = {other for other in others if direct(may_use, one, other)}
        parts += [line(one, other) for other in sorted(drawn)]
        also = [f'also: {", ".join(sorted(others - drawn))}'] if others - drawn else []
        column, row = PLACES[one]
        parts.append(box(LEFT + COLUMN * column, TOP + ROW * row, WIDTH, '#eef3fa', one, WHAT[one], *also))
    parts.append(box(LEFT, TOP + 6 * ROW, width - 2 * LEFT, '#f4f4f4', ', '.join(sorted(base)),
                     'modules that every package may import'))
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="14"'
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" orient="auto" ' \
           'markerUnits="userSpaceOnUse"><path d="M0 0L8 4L0 8z" fill="#333"/></marker>'
    return '\n'.join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f'<defs>{head}</defs>',
                      f'<rect width="{width}" height="{height}" fill="white"/>', *parts, '</svg>', ''])


if __name__ == '__main__':
    PICTURE.write_text(picture())
    print(PICTURE)
