"""A finished run's folder says what it is: its best value with interval and protocol, and how to use and cite it."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from diffscale.core.app import load_command
from diffscale.core.progress import Lines, shown_by
from diffscale.records.store import read_records
from diffscale.training.evaluate_runs import evaluate_run
from diffscale.training.run import train

from .small import BATCH, experiment

FD = "fd_efficientnet_lite0"
EVALUATED = {
    "metrics": [FD],
    "n_generated": 48,
    "points": [0.5, 1.0],
    "n_reference": 64,
    "workers": "training",
    "solver": {"name": "ddim", "steps": 2},
}


@pytest.fixture(scope="module")
def finished(shared_storage: Path, private_ray: None) -> tuple[Path, str]:
    """The folder of a run that has finished, and what its command showed meanwhile."""
    e = experiment(shared_storage, name="readme", train={"images": 20 * BATCH}, eval=EVALUATED)
    shown: list[str] = []
    with pytest.MonkeyPatch.context() as patch, shown_by(Lines(seconds=0)):
        patch.setattr("diffscale.core.progress._print", shown.append)
        result = train(e, here=True)
    assert result.finished
    return Path(result.run_folder), "\n".join(shown)


def test_the_readme_has_the_best_value_with_interval_and_protocol(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    text, records = (folder / "README.md").read_text(), read_records([str(folder)])
    best = min(records, key=lambda record: record.value)
    assert f"**Best {FD}: {best.value:.5g}** (95 % interval {best.value_low:.4g} to {best.value_high:.4g})" in text
    assert "48 samples against 64 reference images at 8 pixels, ddim with 2 evaluations of the network" in text
    assert text.count(f"| {FD} |") == 2, "a row for each evaluation"
    assert f"@misc{{{best.run_id}," in text


def test_its_commands_work_as_they_stand(finished: tuple[Path, str], tmp_path: Path, monkeypatch) -> None:
    folder, _ = finished
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    (line,) = re.findall(r"^    diffscale export (.*)$", (folder / "README.md").read_text(), re.M)
    run, out, *options = shlex.split(line)
    load_command("export")(args=[run, os.path.expanduser(out), *options], standalone_mode=False)
    assert (tmp_path / "readme" / "model.safetensors").exists()


def test_a_later_evaluation_of_more_samples_is_its_best_value(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    (record,) = evaluate_run(str(folder), ["eval.n_generated=64"])
    assert f"**Best {FD}: {record.value:.5g}**" in (folder / "README.md").read_text()


def test_the_command_shows_training_and_its_evaluations(finished: tuple[Path, str]) -> None:
    _, shown = finished
    assert re.search(r"^readme: [\d,]+ of 240 images .*evaluating", shown, re.M), shown
    assert re.search(r"^readme: 240 of 240 images in ", shown, re.M), shown
