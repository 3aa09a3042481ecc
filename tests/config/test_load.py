"""Settings from presets, files and dotted overrides; every mistake explained on one screen with exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffscale.config.load import load_experiment, load_tree, merge, parse_overrides, preset_names, validate
from diffscale.core.errors import UserError


@pytest.mark.parametrize("name", [n for n in preset_names() if not n.endswith("-base")])
def test_every_preset_is_valid(name: str) -> None:
    assert load_experiment(name, ["data.path=builtin:emoji"]).name == name


def test_dotted_overrides_reach_every_depth() -> None:
    e = load_experiment("quickstart-unet", ["train.ema.halflife_fraction=0.1", "eval.solver.steps=7", "optim.lr=3e-4"])
    assert (e.train.ema.halflife_fraction, e.eval.solver.steps, e.optim.lr) == (0.1, 7, 3e-4)


def test_another_name_starts_a_section_afresh_and_a_string_is_short_for_it() -> None:
    below = {"model": {"name": "unet", "model_channels": 32}, "optim": {"lr": 1}}
    assert merge(below, {"model": {"name": "rin"}})["model"] == {"name": "rin"}
    assert merge(below, {"model": "rin"})["model"] == {"name": "rin"}
    assert merge(below, {"model": {"num_blocks": 1}})["model"] == {
        "name": "unet",
        "model_channels": 32,
        "num_blocks": 1,
    }
    assert (
        load_experiment("quickstart-unet", ["diffusion.schedule=ddpm_linear"]).diffusion.schedule.name == "ddpm_linear"
    )


MISTAKES = [
    (["quickstart-unett"], "quickstart-unet"),
    (["quickstart-unet", "trian.images=3"], "train"),
    (["quickstart-unet", "train.imagse=3"], "images"),
    (["quickstart-unet", "model.num_block=3"], "num_blocks"),
    (["quickstart-unet", "model.name=unett"], "unet"),
    (["quickstart-unet", "train.global_batch=many"], "train.global_batch"),
    (["quickstart-unet", "train.precision=bf61"], "bf16"),
    (["quickstart-unet", "diffusion.prediction=vv"], "'vv'"),
    (["quickstart-unet", "storage=ftp://host/runs"], "s3://bucket/folder"),
    (["quickstart-unet", "storage=s3://user:word@bucket/runs"], "credentials"),
    (["quickstart-unet", "train.flops=null"], "train.images"),
    (["quickstart-unet", "optim.schedule=cosine"], "train.images"),
    (["quickstart-unet", "no-equals-sign"], "no-equals-sign"),
    (["quickstart-unet", "name=${oc.env:HOME}"], "OVERRIDE"),
    (["/nowhere/at/all.yaml"], "/nowhere/at/all.yaml"),
]


@pytest.mark.parametrize(("arguments", "named"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_names_the_setting_and_what_is_valid(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_experiment(arguments[0], arguments[1:])
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00", "a: ${b}", "name: ${oc.env:HOME}", "", "&a [*a]"])
def test_a_file_that_is_no_mapping_of_settings_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError):
        validate(load_tree(str(file)))


def test_commands_print_one_screen_and_exit_with_2(tmp_path: Path) -> None:
    for command in (["diffscale.train", "quickstart-unett"], ["diffscale.tune", "quickstarts"]):
        run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=tmp_path)
        assert run.returncode == 2, run.stderr
        assert "Traceback" not in run.stderr
        assert "expected:" in run.stderr
        assert not list(tmp_path.iterdir())


def test_relative_paths_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    e = load_experiment("quickstart-unet", ["storage=runs", "data.path=../images"])
    assert e.storage == str(tmp_path / "runs")
    assert e.data.path == str(tmp_path.parent / "images")
    e = load_experiment("quickstart-unet", ["storage=s3://bucket/runs", "data.path=builtin:emoji"])
    assert (e.storage, e.data.path) == ("s3://bucket/runs", "builtin:emoji")
    monkeypatch.setenv("DIFFSCALE_STORAGE", "elsewhere")
    assert load_experiment("quickstart-unet").storage == str(tmp_path / "elsewhere")


@pytest.mark.parametrize("override", ["storage=runs", "data.path=images"])
def test_a_job_refuses_relative_paths(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="temporary"):
        load_experiment("quickstart-unet", [override])


def test_overrides_keep_yaml_types() -> None:
    tree = parse_overrides(["a.b=1e-4", "a.c=[1, 2]", "a.d=null", "a.e=true", "a.f=x"])
    assert tree == {"a": {"b": 1e-4, "c": [1, 2], "d": None, "e": True, "f": "x"}}
