"""`diffscale COMMAND`: help without heavy imports, completion, versions, and errors on one screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from diffscale import __version__
from diffscale.core.app import COMMANDS, load_command


def diffscale(*arguments: str, module: str = "diffscale", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200", "TERM": "dumb"} | environment,
    )


def test_help_says_one_line_about_each_command() -> None:
    run = diffscale("--help")
    assert run.returncode == 0
    for name, text in COMMANDS.items():
        assert f"{name} " in run.stdout
        assert text in " ".join(run.stdout.split())  # click wraps lines


def test_help_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys\nfrom diffscale.core.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('heavy:', sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'ray', 'pyarrow', 'pandas'}))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "heavy: []" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_loads_and_has_help(name: str) -> None:
    command = load_command(name)
    assert command.help or getattr(command, "commands", None)
    assert isinstance(command, typer.core.TyperCommand | typer.core.TyperGroup)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_every_command_is_a_module_too(name: str) -> None:
    for run in (diffscale("--help", module=f"diffscale.{name}"), diffscale(name, "--help")):
        assert run.returncode == 0, run.stderr
        assert "Usage:" in run.stdout


def test_version() -> None:
    assert diffscale("--version").stdout.strip() == f"diffscale {__version__}"


def test_an_unknown_command_names_the_nearest() -> None:
    run = diffscale("trian")
    assert run.returncode == 2
    assert "COMMAND = 'trian'" in run.stderr
    assert "train (the nearest)" in run.stderr
    assert "Traceback" not in run.stderr


def test_an_error_of_a_command_has_no_traceback(tmp_path: Path) -> None:
    run = diffscale("report", "--out", str(tmp_path / "report"), DIFFSCALE_STORAGE=str(tmp_path))
    assert run.returncode == 2
    assert not list(tmp_path.iterdir()), "nothing is written"
    assert run.stderr.startswith("error: RUNS = ")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("words", "expected"), [("diffscale s", "settings"), ("diffscale report --", "--out")])
def test_shell_completion(words: str, expected: str) -> None:
    run = diffscale(_DIFFSCALE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" ")))
    assert expected in run.stdout.split()
