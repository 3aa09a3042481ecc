"""Weights from Hugging Face's hub and models to it, against a server on loopback that speaks the hub's API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffscale.core.errors import UserError
from diffscale.interchange.export import export_run
from diffscale.interchange.hub_weights import fetch
from diffscale.interchange.import_run import import_run, imported_from
from diffscale.training.checkpoint import layout as ck
from tests.interchange.test_export import make_run
from tests.support.hub import TOKEN, Hub, Repo, connected, hub_server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as served, connected(served, monkeypatch, tmp_path / "cache"):
        yield served


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder, model, _ = make_run(tmp_path_factory.mktemp("runs"), "ddpm-cifar10")
    return folder, model


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_goes_to_the_hub_and_comes_back(hub: Hub, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One commit with every file and the card; imported by its id, pinned to the commit, with the card's licence."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    export_run(run[0], tmp_path / "out", "diffusers", licence="MIT", push="ada/faces", private=True)
    repo = hub.repos["models/ada/faces"]
    assert repo.private
    assert len(repo.commits) == 1
    assert repo.files == files_of(tmp_path / "out")
    front = yaml.safe_load(repo.files["README.md"].decode().split("---\n")[1])
    assert front["license"] == "mit"
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN.encode() not in everything

    repo.licence = "mit"
    settings = [f"storage={tmp_path / 'imported'}", "data.path=builtin:emoji"]
    again = import_run("ada/faces", "diffusers", settings)
    (checkpoint,) = ck.list_checkpoints(again)
    weights = ck.read_weights(checkpoint, "none")
    assert all((weights[key] == tensor).all() for key, tensor in run[1].state_dict().items())
    about = imported_from(again) or {}
    assert about["file"] == f"ada/faces@{repo.sha}:unet/diffusion_pytorch_model.safetensors"
    assert (about["licence"], about["may_be_passed_on"]) == ("mit", True)

    asked = len(hub.asked)
    assert import_run(f"ada/faces@{repo.sha}", "diffusers", [*settings, "name=cached"]) != again
    assert not any("/resolve/" in path and method == "GET" for method, path in hub.asked[asked:])


@pytest.mark.parametrize(
    ("text", "family", "said"),
    [
        ("ada/nothing", "adm", "does not exist, or it is private"),
        ("ada/gated:model.pt", "adm", "accept its terms"),
        ("ada/several", "adm", "a.pt, b.safetensors"),
        ("ada/several", "diffusers", "config.json with safetensors"),
        ("ada/several@gone", "adm", "no such revision"),
        ("ada/several:c.pt", "adm", "the repository has a.pt"),
        ("ada/broken", "adm", "an undamaged file of weights"),
        ("nowhere.pt", "adm", "a file or folder that exists"),
        ("runs/model.pt", "adm", "nothing is at the path runs/model.pt; read as a name on the hub"),
        ("./nowhere", "adm", "a model on the hub"),
    ],
)
def test_what_the_hub_cannot_give_is_explained_and_nothing_is_written(
    text: str, family: str, said: str, hub: Hub, tmp_path: Path
):
    hub.repos = {
        "models/ada/gated": Repo({"model.pt": b"weights"}, gated=True),
        "models/ada/several": Repo({"a.pt": b"", "b.safetensors": b"", "README.md": b""}),
        "models/ada/broken": Repo({"model.pt": b"no weights"}),
    }
    with pytest.raises(UserError) as caught:
        import_run(text, family, [f"storage={tmp_path / 'runs'}", "data.path=builtin:emoji"])
    assert said in caught.value.text()
    assert not (tmp_path / "runs").exists()


def test_a_path_comes_before_a_name_on_the_hub_unless_the_scheme_says_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hub.repos["models/ada/faces"] = Repo({"model.pt": b"of the hub"})
    monkeypatch.chdir(tmp_path)
    assert fetch("ada/faces", "adm").path.read_bytes() == b"of the hub"
    Path("ada").mkdir()
    Path("ada/faces").write_bytes(b"of this machine")
    assert fetch("ada/faces", "adm").path.read_bytes() == b"of this machine"
    assert fetch("hf://ada/faces", "adm").path.read_bytes() == b"of the hub"


def test_a_bad_token_and_no_network_are_explained(hub: Hub, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.repos["models/ada/model"] = Repo({"model.pt": b""})
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(UserError, match="does not accept the token"):
        import_run("ada/model", "adm", ["data.path=builtin:emoji"])
    with pytest.raises(UserError, match="does not accept the token"):
        export_run(run[0], tmp_path / "out", "safetensors", push="ada/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"):
        export_run(run[0], tmp_path / "out", "safetensors", push="ada/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for wrong in ("model", "ada/model@main", "ada/a/b"):
        with pytest.raises(UserError, match="OWNER/NAME"):
            export_run(run[0], tmp_path / "out", "safetensors", push=wrong)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no network"):
        import_run("ada/model", "adm", ["data.path=builtin:emoji"])
    assert not (tmp_path / "out").exists()


def test_weights_that_may_not_be_passed_on_go_to_private_models_alone(
    hub: Hub, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    about = {"file": "edm.pkl", "sha256": "0" * 64, "family": "edm", "recipe": "edm-cifar10"}
    about |= {"licence": "CC BY-NC-SA 4.0", "may_be_passed_on": False}
    (copy / "imported.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"CC BY-NC-SA 4\.0"):
        export_run(str(copy), tmp_path / "out", "safetensors", push="ada/faces")
    assert not hub.repos
    assert not (tmp_path / "out").exists()
    hub.repos["models/ada/public"] = Repo({})
    with pytest.raises(UserError, match="everyone sees it"):
        export_run(str(copy), tmp_path / "out", "safetensors", push="ada/public", private=True)
    export_run(str(copy), tmp_path / "out", "safetensors", push="ada/faces", private=True)
    assert "does not allow everyone" in hub.repos["models/ada/faces"].files["README.md"].decode()


def test_a_refused_commit_leaves_the_hub_without_files(
    hub: Hub, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses_commits = True
    with pytest.raises(UserError, match="--push"):
        export_run(run[0], tmp_path / "out", "safetensors", push="ada/faces")
    assert hub.repos["models/ada/faces"].files == {}
    assert (tmp_path / "out" / "model.safetensors").exists()
