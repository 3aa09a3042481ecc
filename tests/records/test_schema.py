"""The direction of every metric, the settings of a recipe, and the generated table of columns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffscale import records
from diffscale.config.load import load_experiment
from diffscale.evaluation.metrics.registry import INCEPTION_NAMES, KINDS
from diffscale.records.__main__ import README
from diffscale.records.schema import ADDED_LATER, Record, columns_table, higher_is_better, is_recipe_setting
from diffscale.report.stats.frontier import is_on_frontier
from diffscale.sweep.ledger import Ledger
from diffscale.sweep.settings import Sweep

DIRECTIONS = {
    "fd": False,
    "fd_inf": False,
    "kid": False,
    "sfid": False,
    "precision": True,
    "recall": True,
    "f_score": True,
    "density": True,
    "coverage": True,
    "is": True,
}
RECORDED = {
    "fid": False,
    "fid_inf": False,
    "fid_clean": False,
    "fid[3]": False,
    "fd_efficientnet_lite0": False,
    "fd_clip-vit-b-32_antialiased": False,
    "fd_inf_dinov2_vitl14": False,
    "kid_dinov2_vitl14[12]": False,
    "kid_std": False,
    "is_std": False,
    "is_clean_std": False,
    "inception_score": True,
    "inception_score_tf1": True,
    "is_clean": True,
    "f_score_clean": True,
    "f_score_dinov2_vitl14": True,
    "precision_efficientnet_lite0": True,
    "recall[0]": True,
    "density[3]": True,
    "coverage_dinov2_vitl14_clean[7]": True,
    "memorisation": False,
    "val_loss": False,
}


def test_every_kind_of_metric_has_its_direction() -> None:
    assert set(DIRECTIONS) == set(KINDS), "say here which way a new kind of metric is better"
    assert {kind: higher_is_better(kind) for kind in KINDS} == DIRECTIONS
    assert {name: higher_is_better(name) for name in INCEPTION_NAMES} == {
        name: DIRECTIONS[kind] for name, kind in INCEPTION_NAMES.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["_clean", "_efficientnet_lite0", "_dinov2_vitl14_tf1", "[3]", "_clean[3]"])
def test_network_resize_and_class_leave_the_direction(kind: str, suffix: str) -> None:
    assert higher_is_better(kind + suffix) == DIRECTIONS[kind]


@pytest.mark.parametrize(("metric", "higher"), RECORDED.items())
def test_direction_of_recorded_names(metric: str, higher: bool) -> None:
    assert higher_is_better(metric) is higher


@pytest.mark.parametrize("metric", ["f_score", "inception_score", "precision", "fid"])
def test_a_sweep_uses_this_direction(metric: str, tmp_path: Path) -> None:
    overrides = {"eval.metrics": [metric], "storage": str(tmp_path)}
    sweep = Sweep(name="s", base="quickstart-unet", overrides=overrides, space={"train.seed": {"grid": [0, 1]}})
    assert Ledger(sweep).higher_is_better is higher_is_better(metric)


def test_no_other_table_of_directions() -> None:
    package = Path(records.__file__).parents[1]
    own = {package / "records" / "schema.py"}
    for file in set(package.rglob("*.py")) - own:
        text = file.read_text(encoding="utf-8")
        assert "def higher_is_better" not in text, file
        assert "HIGHER_IS_BETTER =" not in text, file


def test_a_frontier_rises_for_metrics_of_which_more_is_better() -> None:
    compute, value = [1.0, 2.0, 3.0], [0.1, 0.3, 0.2]
    assert list(is_on_frontier(compute, value, higher_is_better("f_score"))) == [True, True, False]


def test_recipe_settings_are_those_that_run_id_hashes_less_seed_length_and_numerics() -> None:
    experiment = load_experiment("quickstart-unet", ["train.images=100"])
    free = {"train.seed", "train.images", "train.compile", "train.channels_last", "train.activation_checkpointing"}
    extra = {"data.decoder", "train.winograd", *ADDED_LATER}
    hashed = set(_flat(experiment.weights_settings()))
    recipe = {key for key in experiment.dotted() if is_recipe_setting(key)}
    assert hashed - free == recipe - extra


def test_readme_is_current() -> None:
    assert columns_table() in README.read_text(encoding="utf-8"), "run python -m diffscale.records --write"


def test_command_prints_the_table() -> None:
    run = subprocess.run([sys.executable, "-m", "diffscale.records"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0
    assert run.stdout.strip() == columns_table()
    assert all(f"`{name}`" in run.stdout for name in Record.model_fields)


def _flat(tree: dict, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        keys += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys
