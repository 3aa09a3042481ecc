"""`diffscale settings`: every setting is listed, described in the README, and valid in the JSON schema."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jsonschema
import pytest

from diffscale.config.describe import all_settings, find_settings, settings_table
from diffscale.config.load import load_experiment
from diffscale.core.errors import UserError
from diffscale.settings import README
from diffscale.sweep.settings import Budget, Scheduler, Search, Sweep


def test_every_setting_of_a_run_is_listed() -> None:
    listed = {".".join(part.partition("[")[0] for part in s.key.split(".")) for s in all_settings()}
    assert set(load_experiment("quickstart-unet").dotted()) <= listed
    assert all(s.type for s in all_settings())


def test_every_setting_has_a_description() -> None:
    assert [s.key for s in all_settings() if not s.description or "\n" in s.description] == []
    for model in (Sweep, Search, Scheduler, Budget):
        nested = ("search", "scheduler", "budget")
        missing = [n for n, f in model.model_fields.items() if not f.description and n not in nested]
        assert missing == [], model


def test_every_number_has_a_range() -> None:
    numbers = [s for s in all_settings() if re.match(r"(int|float)\b", s.type)]
    assert len(numbers) > 100
    assert [s.key for s in numbers if "," not in s.type] == []
    assert find_settings("model.dropout")[0].type == "float, at least 0, below 1"
    assert find_settings("optim.lr")[0].type == "float, above 0"


def test_a_key_or_its_beginning_narrows() -> None:
    assert [s.key for s in find_settings("train.ema.power")] == ["train.ema.power"]
    assert {s.key for s in find_settings("train.ema")} >= {"train.ema.power", "train.ema.halflife_images"}
    assert {"model[unet].num_blocks", "model[edm2].num_blocks"} <= {s.key for s in find_settings("model.num_blocks")}
    assert find_settings("optim.lr")[0].default == "0.0002"


@pytest.mark.parametrize(("key", "near"), [("train.imagse", "train.images"), ("lr", "optim.lr"), ("modle", "model")])
def test_an_unknown_key_names_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UserError, match=near):
        find_settings(key)


def test_readme_is_current() -> None:
    assert settings_table() in README.read_text(encoding="utf-8"), "run python -m diffscale.settings --write"


def test_command_and_schema() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diffscale", "settings", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert "optim.lr: float, above 0 = 0.0002" in run("optim").stdout
    schema = json.loads(run("--json-schema").stdout)
    jsonschema.validate(load_experiment("quickstart-unet").model_dump(mode="json"), schema)
    wrong = run("trian")
    assert wrong.returncode == 2
    assert "train (the nearest)" in wrong.stderr
