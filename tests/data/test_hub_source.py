"""Datasets on Hugging Face's hub: read from a server on loopback, pinned to a commit, cached, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffscale.core import hub_files
from diffscale.core.errors import UserError
from diffscale.data.build import hub_source
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.manifest import read_manifest
from tests.support.hub import Hub, Repo, connected, hub_server
from tests.support.sources import IMAGES, make_folder, make_hugging_face, make_webdataset
from tests.support.tables import HELD, declared

PLACE = "datasets/ada/pets"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server() as served, connected(served, monkeypatch, tmp_path / "cache"):
        yield served


def repo(root: Path, make: Callable[[Path], Path]) -> Repo:
    """The files that a function writes, as a repository."""
    root.mkdir()
    made = make(root)
    folder = made if made.is_dir() else root
    return Repo({str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})


def options(source: str, target: Path) -> BuildOptions:
    place, choices = hub_source.pin(source)
    return BuildOptions(place, str(target), (16,), workers=0, **choices)  # type: ignore[arg-type]


def downloads(hub: Hub) -> int:
    """Return the number of requests for the content of a file, or for a part of it."""
    return sum(method == "GET" and "/resolve/" in path for method, path in hub.asked)


@pytest.mark.parametrize("make", [make_hugging_face("parquet"), make_webdataset, make_folder])
def test_every_form_of_the_hub_is_read_and_pinned(make: Callable[[Path], Path], hub: Hub, tmp_path: Path):
    hub.repos[PLACE] = repo(tmp_path / "files", make)
    build(options("hf://ada/pets", tmp_path / "out"), show=False)
    dataset = Dataset.open(str(tmp_path / "out"))
    pixels, _ = dataset.gather(np.arange(len(dataset)))
    assert {image.numpy().tobytes() for image in pixels} == {image.tobytes() for image in IMAGES}
    assert read_manifest(str(tmp_path / "out")).source["path"] == f"hf://datasets/ada/pets@{hub.repos[PLACE].sha}"


@pytest.mark.parametrize("make", [make_hugging_face("parquet"), make_webdataset, make_folder])
def test_another_build_of_the_revision_downloads_nothing_again(make, hub: Hub, tmp_path: Path):
    hub.repos[PLACE] = repo(tmp_path / "files", make)
    build(options("hf://ada/pets", tmp_path / "out"), show=False)
    before = downloads(hub)
    assert before > 0
    again = replace(options("hf://ada/pets", tmp_path / "small"), resolutions=(8,))
    build(again, show=False)
    assert len(Dataset.open(str(tmp_path / "small"))) == len(IMAGES)
    assert downloads(hub) == before


def test_a_full_disk_gets_no_copies_and_the_build_goes_on(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(hub_files, "LEFT_FREE", 1 << 62)
    hub.repos[PLACE] = repo(tmp_path / "files", make_hugging_face("parquet"))
    build(options("hf://ada/pets", tmp_path / "out"), show=False)
    assert len(Dataset.open(str(tmp_path / "out"))) == len(IMAGES)
    assert not list((tmp_path / "cache").glob("**/*.parquet"))
    assert "read in place and not kept" in caplog.text


def test_the_query_chooses_configuration_split_and_columns(hub: Hub, tmp_path: Path):
    hub.repos[PLACE] = repo(tmp_path / "files", declared)
    source = "hf://ada/pets@v1?config=all&split=test&image=image&label=none"
    build(options(source, tmp_path / "out"), show=False)
    dataset = Dataset.open(str(tmp_path / "out"))
    assert (len(dataset), dataset.class_names) == (len(HELD), [])


def test_an_interrupted_build_continues_and_reads_no_finished_file_again(hub: Hub, tmp_path: Path):
    hub.repos[PLACE] = repo(tmp_path / "files", make_webdataset)

    def stop(what: str, index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(options("hf://ada/pets", tmp_path / "out"), show=False, on_task=stop)
    build(options("hf://ada/pets", tmp_path / "out"), show=False)
    assert len(Dataset.open(str(tmp_path / "out"))) == 24
    hub.repos[PLACE].files["shard-002.tar"] = hub.repos[PLACE].files["shard-000.tar"]
    with pytest.raises(UserError, match="DATASET"):  # main has another commit now
        build(options("hf://ada/pets", tmp_path / "out"), show=False)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("hf://pets", "hf://OWNER/NAME"),
        ("hf://ada/nothing", "does not exist, or it is private"),
        ("hf://ada/pets@gone", "no such revision"),
        ("hf://ada/pets?columns=a", "config, split, image, label"),
        ("hf://ada/pets?split=", "config, split, image, label"),
        ("hf://ada/gated", "accept"),
    ],
)
def test_what_cannot_be_read_is_explained_and_nothing_is_written(source: str, said: str, hub: Hub, tmp_path: Path):
    hub.repos[PLACE] = Repo({"README.md": b""})
    hub.repos["datasets/ada/gated"] = Repo({"data/train.parquet": b"PAR1"}, gated=True)
    with pytest.raises(UserError) as caught:
        build(options(source, tmp_path / "out"), show=False)
    assert said in caught.value.text()
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no network"):
        hub_source.pin("hf://ada/pets")
