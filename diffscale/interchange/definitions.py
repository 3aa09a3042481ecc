"""Source of a class with all that it uses of diffscale, as one file that needs no diffscale."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE = __name__.partition(".")[0]


class _Definition(NamedTuple):
    """A function, class or constant of a module."""

    text: str
    uses: frozenset[str]  # names, the builtin and local ones among them


class _Module(NamedTuple):
    definitions: Mapping[str, _Definition]  # in the order of the file
    ours: Mapping[str, str]  # module by the name that is imported from it
    others: Mapping[str, str]  # statement that imports a name of another package


def self_contained(module: str, root: str, instead: Mapping[str, type], doc: str) -> str:
    """Return Python code that defines a class, every definition that it uses, and nothing else.

    Definitions keep their text, in an order in which the file loads. Types with a range (core/ranges.py) become plain
    ones. Raises ValueError if two of them have one name.

    module, root: where the class is and its name; the module is read, not imported
    instead: classes that take the place of constants of `module`
    doc: of the file
    """
    needed: dict[str, set[str]] = {}  # names by module
    imports: set[str] = set()

    def need(place: str, name: str) -> None:
        read = _read(place)
        if name in read.ours:
            need(read.ours[name], name)
        elif name in read.others:
            imports.add(read.others[name])
        elif name in read.definitions and name not in needed.setdefault(place, set()):
            needed[place].add(name)
            if place == module and name in instead:
                need(instead[name].__module__, instead[name].__name__)
                return
            for used in read.definitions[name].uses:
                need(place, used)

    need(module, root)
    places = _in_order([*(kind.__module__ for kind in instead.values()), module])
    chosen = [(place, name) for place in places for name in _read(place).definitions if name in needed.get(place, ())]
    names = [name for _, name in chosen]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{root} needs two definitions of the name {', '.join(twice)}")
    parts = [
        f"{name} = {instead[name].__name__}"
        if place == module and name in instead
        else _read(place).definitions[name].text
        for place, name in chosen
    ]
    return (
        "\n\n\n".join([f'"""{doc}"""\n\nfrom __future__ import annotations\n\n' + "\n".join(sorted(imports)), *parts])
        + "\n"
    )


def _in_order(modules: list[str]) -> list[str]:
    """Return the modules and those that they import, each after what it imports."""
    found: list[str] = []
    for name in modules:
        found += [other for other in _in_order(sorted(set(_read(name).ours.values()))) if other not in found]
        found += [name] if name not in found else []
    return found


@cache
def _read(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    source = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
    lines = source.splitlines()
    definitions: dict[str, _Definition] = {}
    ours: dict[str, str] = {}
    others: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == PACKAGE:
            ours |= {alias.name: str(node.module) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others |= {a.asname or a.name: ast.unparse(ast.ImportFrom(node.module, [a], 0)) for a in node.names}
        elif isinstance(node, ast.Import):
            others |= {(a.asname or a.name).partition(".")[0]: ast.unparse(ast.Import([a])) for a in node.names}
        else:
            definitions |= dict.fromkeys(_defined(node), _definition(node, lines))
    return _Module(definitions, ours, others)


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]


def _definition(node: ast.stmt, lines: list[str]) -> _Definition:
    plain = _without_range(node)
    uses = frozenset(n.id for n in ast.walk(plain) if isinstance(n, ast.Name))
    if plain is not node:
        return _Definition(ast.unparse(plain), uses)
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    first = min([node.lineno, *(d.lineno for d in decorators)])
    return _Definition("\n".join(lines[first - 1 : node.end_lineno]), uses)


def _without_range(node: ast.stmt) -> ast.stmt:
    """Return `Name = int` for `Name = Annotated[int, Ge(0)]`, and any other statement unchanged."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
        kind, parts = node.value.value, node.value.slice
        if isinstance(kind, ast.Name) and kind.id == "Annotated" and isinstance(parts, ast.Tuple):
            return ast.Assign(node.targets, parts.elts[0], lineno=node.lineno)
    return node
