"""The imports of the project: no cycle between files, and folders that import only those below them.

Every import is read from the source with `ast`: those at the top of a file, those inside functions and those that only
a type checker sees. An import inside a function hides a cycle as easily as it saves start-up time, so each says which
it is with the comment `# import cost`.
"""

import ast
import itertools
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A folder imports itself and the folders of lower ranks. Folders of one rank do not import each other.
RANKS = [
    {"core"},
    {"records", "distributed", "kernels"},
    {"diffusion", "models", "data", "report"},
    {"config"},
    {"evaluation"},
    {"preflight"},
    {"training"},
    {"sweep", "preference", "interchange"},
    {"recommendation"},
    {"commands"},
    {"benchmarks"},
]
RANK = {layer: rank for rank, layers in enumerate(RANKS) for layer in layers}
# Tighter than their rank: pure torch, so that a person can take these folders home, and a report from records alone.
ALLOWED = {
    "diffusion": {"core", "kernels"},
    "models": {"core", "kernels"},
    "report": {"core", "records"},
}
# What diffusion/ and models/ never load.
NOT_TORCH = {"ray", "pyarrow", "pandas", "pydantic", "omegaconf", "typer"}
# What a program of one's own needs no part of when it uses the library folders alone.
OF_THE_COMMANDS = ["ray", "pandas", "torch_fidelity", "matplotlib", "plotly", "optuna", "tensorboard", "typer"]
LIBRARY_PROGRAM = """
import importlib, pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for folder in ("diffusion", "models", "data"):
    package = importlib.import_module("diffscale." + folder)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""
# Packages that take a noticeable part of a second to import.
HEAVY = {
    "matplotlib",
    "numpy",
    "omegaconf",
    "optuna",
    "pandas",
    "PIL",
    "plotly",
    "pyarrow",
    "pydantic",
    "ray",
    "scipy",
    "timm",
    "torch",
    "torch_fidelity",
    "torchvision",
}


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    importer: str  # dotted name of the importing module
    target: str  # dotted name of the imported module
    place: str  # file:line
    in_function: bool
    type_checking: bool
    comment: bool  # says "# import cost"


@cache
def modules() -> dict[str, Path]:
    """Return the files of diffscale/ and benchmarks/ by dotted name; a package has the name of its folder."""
    found = {}
    for package in ("diffscale", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports() -> list[Import]:
    """Return every import of the project, those inside functions included."""
    return [found for name, path in modules().items() for found in _imports_of(name, path)]


def _imports_of(name: str, path: Path) -> list[Import]:
    source = path.read_text()
    lines = source.splitlines()
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, type_checking: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            for target in _targets(node, name, path):
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                found.append(Import(name, target, place, in_function, type_checking, "# import cost" in text))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                visit(child, inside, True)
            for child in node.orelse:
                visit(child, inside, type_checking)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, inside, type_checking)

    visit(ast.parse(source), False, False)
    return found


def _targets(node: ast.Import | ast.ImportFrom, importer: str, path: Path) -> list[str]:
    """Return the modules that a statement names; `from package import module` names the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
        base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
    inner = [f"{base}.{alias.name}" for alias in node.names]
    targets = [name if name in modules() else base for name in inner]
    return list(dict.fromkeys(targets))


def _ours(name: str) -> bool:
    return name.split(".")[0] in ("diffscale", "benchmarks")


def _layer(module: str) -> str:
    """Return the layer of a module; the `__main__` of data/ and models/ is a command."""
    package, *rest = module.split(".")
    if package == "benchmarks":
        return "benchmarks"
    is_folder = bool(rest) and (ROOT / "diffscale" / rest[0]).is_dir()
    if not is_folder or (rest[-1] == "__main__" and rest[0] in ("data", "models")):
        return "commands"
    return rest[0]


def _cycles(edges: dict[str, dict[str, str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan), and modules that import themselves."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def connect(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in edges.get(node, {}):
            if target not in index:
                connect(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1 or node in edges.get(node, {}):
                found.append(component)

    for node in edges:
        if node not in index:
            connect(node)
    return found


def _shortest_cycle(component: list[str], edges: dict[str, dict[str, str]]) -> list[str]:
    """Return one shortest chain of modules from a module of the component back to itself."""
    best: list[str] = []
    for start in component:
        chains = [[start]]
        seen = {start}
        while chains and (not best or len(chains[0]) < len(best)):
            chain = chains.pop(0)
            for target in edges.get(chain[-1], {}):
                if target == start:
                    best = [*chain, start] if not best or len(chain) + 1 < len(best) else best
                elif target in component and target not in seen:
                    seen.add(target)
                    chains.append([*chain, target])
    return best


def test_no_file_imports_itself_through_others() -> None:
    edges: dict[str, dict[str, str]] = {}
    for found in imports():
        if found.target in modules():
            edges.setdefault(found.importer, {}).setdefault(found.target, found.place)
    chains = [_shortest_cycle(component, edges) for component in _cycles(edges)]
    chain_texts = [
        "\n".join(f"  {edges[here][there]} imports {there}" for here, there in itertools.pairwise(chain))
        for chain in chains
    ]
    assert not chains, "cycles between files:\n" + "\n\n".join(chain_texts)


def test_folders_import_only_those_below_them() -> None:
    against = []
    for found in imports():
        if not _ours(found.target):
            continue
        importer, target = _layer(found.importer), _layer(found.target)
        if importer == target or found.target in ("diffscale", "benchmarks"):
            continue
        allowed = ALLOWED.get(importer)
        fine = target in allowed if allowed else RANK.get(target, len(RANKS)) < RANK.get(importer, -1)
        if not fine:
            against.append(f"{found.place}: {importer} imports {found.target} ({target})")
    assert not against, "imports against the layers:\n" + "\n".join(sorted(against))


def test_every_folder_has_a_layer() -> None:
    unknown = {_layer(name) for name in modules()} - set(RANK)
    assert not unknown, f"folders without a layer in RANKS: {sorted(unknown)}"


def test_the_package_imports_no_benchmark_and_no_test() -> None:
    outside = [
        f"{found.place}: {found.target}"
        for found in imports()
        if found.importer.split(".")[0] == "diffscale" and found.target.split(".")[0] in ("benchmarks", "tests")
    ]
    assert not outside


@pytest.mark.parametrize("folder", ["diffusion", "models"])
def test_the_mathematics_is_plain_torch(folder: str) -> None:
    others = [
        f"{found.place}: {found.target}"
        for found in imports()
        if _layer(found.importer) == folder and found.target.split(".")[0] in NOT_TORCH
    ]
    assert not others


def test_the_library_folders_load_without_the_packages_of_the_commands() -> None:
    program = [sys.executable, "-c", LIBRARY_PROGRAM, ",".join(OF_THE_COMMANDS)]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_an_import_inside_a_function_says_what_it_saves() -> None:
    silent = {
        f"{found.place}: {found.target}"
        for found in imports()
        if found.in_function
        and not found.type_checking
        and not found.comment
        and (_ours(found.target) or found.target.split(".")[0] in HEAVY)
    }
    assert not silent, f"{len(silent)} imports without `# import cost`:\n" + "\n".join(sorted(silent))


def test_a_cycle_is_found_and_printed() -> None:
    edges = {"a": {"b": "a.py:1"}, "b": {"c": "b.py:1"}, "c": {"a": "c.py:1", "d": "c.py:2"}, "d": {}}
    (component,) = _cycles(edges)
    assert sorted(component) == ["a", "b", "c"]
    assert len(_shortest_cycle(component, edges)) == 4
