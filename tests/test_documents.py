"""The documents agree with the tree: links, commands, modules and decisions exist, and retired words stay retired."""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from diffscale.core.app import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README_BYTES = 12 * 1024

# Documents of the people who planned the project. They are not in the repository, so nobody could follow a reference.
ABSENT = re.compile(
    r"\bDECISIONS\b|\bREFERENCE(\.md|,? (section )?\d)"
    r"|\b(DESIGN|ASSETS|HOUSE|WORDS|RECIPES|RIN|GPU|STYLE|RAY|DUPLICATION)\.md\b"
)
# Words that meant something in this project alone, or that nobody says.
RETIRED_WORDS = re.compile(
    r"\bbeside\b"
    r"|\bhand(s|ed|ing)? over\b"
    r"|\b(make|makes|made|making) up\b(?! (for|of))"
    r"|\b(take|takes|taken|took|taking) up\b(?! to)"
    r"|\b(lay|lays|laid) over\b"
    r"|\blearn(t|s|ed)? by heart\b"
    r"|\b(is|are|was|were) (not )?to be\b"
    r"|\bnot to be had\b"
    r"|\bas it is\b",
    re.IGNORECASE,
)
DECIMAL_WITHOUT_ZERO = re.compile(r"(?<![\w.\])*`'\"/])\.\d")
RETIRED_CLASSES = {
    "Damaged",
    "FetchAhead",
    "FolderEvaluation",
    "How",
    "Judge",
    "Keeper",
    "Named",
    "Spool",
    "Unusable",
    "Wanted",
    "Way",
}
RETIRED_FUNCTIONS = {
    "ddpm_jump",
    "distrust",
    "find_checkpoints",
    "hand_over",
    "make_up",
    "rows_of",
    "there",
    "unjudged",
}
RETIRED_MODULES = {
    "assemble",
    "beside",
    "beside_task",
    "corruption",
    "fast_convolutions",
    "fetch_ahead",
    "fuse",
    "judging",
    "keeping",
    "native",
    "picture",
    "pictures",
    "read_unit",
    "setting_up",
    "settings_of",
    "spool",
    "trained",
}


@cache
def files() -> tuple[Path, ...]:
    """Return the files of the repository, except measured results and this test."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.stdout.splitlines() if not name.startswith("benchmarks/results/"))
    return tuple(p for p in paths if p.is_file() and not p.is_symlink() and p != Path(__file__).resolve())


@cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore") if path.suffix not in (".gz", ".arrow", ".png") else ""


def documents() -> list[Path]:
    return [p for p in files() if p.suffix == ".md"]


def sources() -> list[Path]:
    return [p for p in files() if p.suffix == ".py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_with(pattern: re.Pattern[str], path: Path, content: str | None = None) -> list[str]:
    content = text(path) if content is None else content
    return [
        f"{name_of(path)}:{number}: {line.strip()[:110]}"
        for number, line in enumerate(content.splitlines(), 1)
        if pattern.search(line)
    ]


@cache
def prose(path: Path) -> str:
    """Return a file with everything blanked but what people read: docstrings, comments, text outside of code."""
    content = text(path)
    if path.suffix == ".md":
        return _without_code(content)
    if path.suffix != ".py":
        return "\n".join(line.partition("#")[2] for line in content.splitlines())
    lines = content.splitlines()
    kept = [""] * len(lines)
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            kept[token.start[0] - 1] += token.string
    for node in ast.walk(ast.parse(content)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text:
            kept[node.lineno - 1 : node.end_lineno] = lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(kept)


def _without_code(markdown: str) -> str:
    kept, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        is_code = fenced or line.startswith(("```", "    "))
        kept.append("" if is_code else re.sub(r"`[^`]*`", "", line))
    return "\n".join(kept)


def code_of(markdown: str) -> Iterator[str]:
    """Yield the shell lines and inline code of a document, without comments."""
    language, fenced = "", False
    for line in markdown.splitlines():
        if line.startswith("```"):
            fenced, language = not fenced, line.removeprefix("```").strip()
        elif (fenced and language != "python") or (not fenced and line.startswith("    ")):
            yield line.partition("#")[0]
        elif not fenced:
            yield from re.findall(r"`([^`]+)`", line)


def test_nothing_refers_to_a_document_that_is_not_here() -> None:
    found = [line for path in files() for line in lines_with(ABSENT, path)]
    assert not found, "\n".join(found)


def test_every_relative_link_leads_somewhere() -> None:
    broken = []
    for path in documents():
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", _without_code(text(path))):
            link = (target[0] or target[1]).partition("#")[0]
            if link and not re.match(r"[a-z]+:", link) and not (path.parent / link).exists():
                broken.append(f"{name_of(path)}: {link}")
    assert not broken, "\n".join(broken)


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_BYTES


def test_every_cited_decision_exists() -> None:
    made = {int(n) for n in re.findall(r"\*\*Decision (\d+)\.", (ROOT / "CONTRIBUTING.md").read_text())}
    assert made == set(range(1, max(made) + 1))
    cited = {}
    for path in files():
        for first, second in re.findall(r"\b[Dd]ecisions? (\d+)(?:(?:,| and| or) (\d+))?", text(path)):
            cited |= {int(n): name_of(path) for n in (first, second) if n}
    assert not {n: where for n, where in cited.items() if n not in made}


def test_every_module_that_a_document_runs_exists() -> None:
    missing = set()
    for path in files():
        if path.suffix in (".md", ".py", ".yaml", ".sbatch", ".sh", "") and "results" not in path.parts:
            for module in re.findall(r"python -m ((?:diffscale|benchmarks)(?:\.[a-z_0-9]+)*)", text(path)):
                place = ROOT / module.replace(".", "/")
                if not place.with_suffix(".py").exists() and not (place / "__main__.py").exists():
                    missing.add(f"{name_of(path)}: python -m {module}")
    assert not missing, "\n".join(sorted(missing))


def test_every_command_that_a_document_names_exists() -> None:
    unknown = set()
    for path in documents():
        for code in code_of(text(path)):
            for command in re.findall(r"(?<![\w/.=-])diffscale ([a-z]+)\b", code):
                if command not in COMMANDS:
                    unknown.add(f"{name_of(path)}: diffscale {command}")
    assert not unknown, "\n".join(sorted(unknown))


def test_retired_names_are_not_defined_again() -> None:
    found = []
    for path in sources():
        if path.stem in RETIRED_MODULES:
            found.append(name_of(path))
        for node in ast.walk(ast.parse(text(path))):
            is_class = isinstance(node, ast.ClassDef) and node.name in RETIRED_CLASSES
            is_function = isinstance(node, ast.FunctionDef) and node.name in RETIRED_FUNCTIONS
            if is_class or is_function:
                found.append(f"{name_of(path)}:{node.lineno}: {node.name}")
    assert not found, "\n".join(found)


def test_retired_words_stay_retired() -> None:
    found = [line for path in files() for line in lines_with(RETIRED_WORDS, path, prose(path))]
    assert not found, f"{len(found)} lines:\n" + "\n".join(found)


def test_decimals_have_their_zero() -> None:
    read = [p for p in files() if p.suffix in (".py", ".md")]
    found = [line for path in read for line in lines_with(DECIMAL_WITHOUT_ZERO, path, prose(path))]
    assert not found, f"{len(found)} lines:\n" + "\n".join(found)


def test_the_readme_s_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the snippets one after the other, as a reader would, with the committed records in place of RUNS."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(snippets) == 3
    code = "\n".join(snippets).replace('"RUNS"', repr(str(ROOT / "benchmarks/results/unet-ablations/records.jsonl")))
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["result"].measurements) == 1  # type: ignore[attr-defined]
    assert len(names["analysis"].points)  # type: ignore[attr-defined]
