"""Places that cannot be written, are files, or are missing: one screen that names the place, exit code 2, no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffscale.core.errors import UserError
from diffscale.core.places import explain, require_writable
from tests.support.commands import ray_runs, run_command

TINY = (
    "quickstart-unet",
    "data.resolution=8",
    "model.model_channels=16",
    "model.channels_per_head=16",
    "train.flops=null",
    "train.images=64",
    "train.gpu=false",
    "eval.n_generated=0",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file where a folder is expected."""
    path = tmp_path / "file"
    path.write_text("")
    return path


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that is mounted read-only: root may write to a folder without permissions."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def refused(name: str, *arguments: str, place: Path | str) -> str:
    before = ray_runs()
    ended = run_command(name, *arguments)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    assert str(place) in ended.err
    assert len(ended.err.splitlines()) < 24
    assert ray_runs() == before
    return ended.err


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    require_writable(str(tmp_path), "storage")
    require_writable(str(tmp_path / "a" / "b"), "storage")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_a_folder_is_named(file: Path) -> None:
    for place in (file, file / "below"):
        with pytest.raises(UserError, match="is a file"):
            require_writable(str(place), "storage")


@pytest.mark.parametrize("option", [(), ("--dry-run",)])
def test_a_storage_that_cannot_be_written_is_refused_before_anything_is_built(
    file: Path, option: tuple[str, ...]
) -> None:
    for place in (file, file / "below", Path("/proc/none")):
        assert "storage = " in refused("train", *TINY, f"storage={place}", *option, place=place)


def test_a_read_only_storage_is_refused(read_only: Path) -> None:
    assert "Read-only" in refused("train", *TINY, f"storage={read_only / 'x'}", place=read_only)
    assert "Read-only" in refused("tune", "quickstart", f"storage={read_only / 'x'}", "--dry-run", place=read_only)


def test_an_unwritable_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null/x")
    for name in ("DIFFSCALE_CACHE", "XDG_CACHE_HOME", "DIFFSCALE_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    assert "HOME = " in refused("train", *TINY, f"storage={tmp_path}", place="/dev/null/x")
    assert "storage = " in refused("train", *TINY, place="/dev/null/x")


def test_an_unwritable_cache_is_refused(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSCALE_CACHE", str(file))
    assert "DIFFSCALE_CACHE = " in refused("train", *TINY, f"storage={tmp_path}", place=file)


def test_no_folder_for_temporary_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null/x"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/dev/null/x")
    assert "TMPDIR = " in refused("train", *TINY, f"storage={tmp_path}", place="/dev/null/x")


def test_every_command_that_writes_names_a_file_in_place_of_its_folder(file: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    refused("tune", "quickstart", f"storage={file}", place=file)
    refused("quickstart", "--storage", str(file), "--out", str(tmp_path / "out"), place=file)
    refused("quickstart", "--storage", str(tmp_path / "runs"), "--out", str(file / "out"), place=file)
    refused("data", "build", str(images), str(file), "--resolution", "8", "--workers", "0", place=file)
    refused("data", "build", str(images), str(file / "below"), "--resolution", "8", "--workers", "0", place=file)
    refused("evaluate", str(images), "--reference", str(images), "--out", str(file / "rows.json"), place=file)


def test_every_command_that_reads_names_a_file_in_place_of_a_folder(file: Path) -> None:
    refused("runs", str(file), place=file)
    refused("report", str(file), "--out", str(file.parent / "report"), place=file)
    refused("sample", str(file), place=file)
    refused("ema", str(file), "--std", "0.1", place=file)
    refused("evaluate", str(file), "--reference", str(file), place=file)
    refused("train", *TINY, f"data.path={file}", f"storage={file.parent}", place=file)


def test_only_errors_about_places_are_explained() -> None:
    assert explain(PermissionError(13, "Permission denied", "/a/b")) is not None
    assert explain(OSError(5, "Input/output error")) is None
    assert explain(FileNotFoundError(2, "No such file", "/a/b")) is None
    assert explain(OSError("no number")) is None


def test_an_unwritable_token_is_refused_before_ray_starts(file: Path) -> None:
    program = "from diffscale.distributed.connect import connect; connect()"
    environment = os.environ | {"RAY_AUTH_TOKEN_PATH": str(file / "token")}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        environment.pop(name, None)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert f"RAY_AUTH_TOKEN_PATH = '{file}/token'" in ended.stderr
