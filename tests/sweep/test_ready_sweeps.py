"""The sweeps in the package: their trials are comparable and every setting is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.config.load import preset_names
from diffscale.sweep.ledger import Ledger
from diffscale.sweep.run import load_sweep, planned

TRIALS = {
    "quickstart": 4,
    "schedule-x-resolution": 12,
    "shift-x-input-scale": 16,
    "prediction-x-weighting": 13,
    "backbone-x-size": 24,
    "unet-ablations": 6,
    "learning-rate": 0,
}


@pytest.mark.parametrize("name", preset_names("sweeps"))
def test_a_ready_sweep_has_valid_runs(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    storage: Path = tmp_path_factory.getbasetemp() / "ready-sweeps"
    trials = planned(Ledger(load_sweep(name, [f"storage={storage}"])))
    assert len(trials) == TRIALS[name]
    for trial in trials:
        experiment = trial.experiments[0]
        dataset = open_training_data(experiment)
        build_diffusion(experiment, dataset)
        build_model(experiment, dataset)


def test_a_relative_dataset_is_that_of_the_commands_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of a TPE sweep reads its settings in a process of Ray, which refused the relative path."""
    monkeypatch.chdir(tmp_path)
    sweep = load_sweep("learning-rate", ["data.path=data/mine", "storage=runs"])
    assert sweep.overrides["data.path"] == str(tmp_path / "data/mine")
    assert sweep.overrides["storage"] == str(tmp_path / "runs")
    assert load_sweep("learning-rate", ["data.path=builtin:emoji"]).overrides["data.path"] == "builtin:emoji"
