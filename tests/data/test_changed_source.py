"""A source that has changed since its dataset was built is noticed when the same command is given again."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from diffscale.core.errors import UserError
from diffscale.data import open_dataset
from diffscale.data.build.build import BuildOptions, build, examine
from diffscale.data.format.manifest import read_manifest, write_manifest
from tests.support.datasets import png
from tests.support.sources import IMAGES, TREES, write_folder

BMP = {f"{'ab'[i % 2]}/{i}.bmp": png(IMAGES[i], "BMP") for i in range(6)}  # files of one size
OTHER = png(IMAGES[9], "BMP")


def options(source: Path, tmp_path: Path, **others) -> BuildOptions:
    return BuildOptions(str(source), str(tmp_path / "out"), (16,), workers=0, **others)


@pytest.mark.parametrize("container", TREES)
@pytest.mark.parametrize("change", ["grown", "shrunk", "replaced", "renamed"])
def test_a_source_that_grew_shrank_or_has_another_file_is_noticed(tmp_path, container, change):
    source = TREES[container](tmp_path, BMP)
    build(options(source, tmp_path), show=False)
    files = dict(BMP)
    if change == "grown":
        files["b/new.bmp"] = OTHER
    elif change == "shrunk":
        del files["b/1.bmp"]
    elif change == "replaced":
        files["b/1.bmp"] = OTHER
    else:
        files["a/1.bmp"] = files.pop("b/1.bmp")
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    TREES[container](tmp_path, files)
    with pytest.raises(UserError) as error:
        build(options(source, tmp_path), show=False)
    assert "SOURCE" in error.value.text()
    assert "the source as it was when" in error.value.text()
    if change == "grown" and container != "tar":
        assert "7 files" in error.value.text()
    with pytest.raises(UserError):
        examine(options(source, tmp_path))


@pytest.mark.parametrize("container", TREES)
def test_the_same_source_copied_again_is_the_same(tmp_path, container):
    """Times alone are no change: a source may have been copied or unpacked again."""
    source = TREES[container](tmp_path, BMP)
    build(options(source, tmp_path), show=False)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    for file in source.rglob("*.bmp") if source.is_dir() else [source]:
        os.utime(file, (time.time() + 100, time.time() + 100))
    build(options(source, tmp_path), show=False)
    (source.parent / "unrelated.txt").write_text("x")
    build(options(source, tmp_path), show=False)
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_arrays_and_lists_of_labels_that_changed_are_noticed(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    build(options(tmp_path / "x.npy", tmp_path), show=False)
    np.save(tmp_path / "x.npy", IMAGES[::-1])
    with pytest.raises(UserError, match="other files"):
        build(options(tmp_path / "x.npy", tmp_path), show=False)
    source = write_folder(tmp_path, {"0.bmp": OTHER, "1.bmp": BMP["a/0.bmp"]})
    labels = tmp_path / "l.csv"
    labels.write_text("file,label\n0.bmp,a\n1.bmp,b\n")
    listed = BuildOptions(str(source), str(tmp_path / "listed"), (16,), workers=0, labels=str(labels))
    build(listed, show=False)
    labels.write_text("file,label\n0.bmp,b\n1.bmp,a\n")
    with pytest.raises(UserError, match="other files, or labels"):
        build(listed, show=False)


def test_a_dataset_without_a_noted_state_or_source_is_complete(tmp_path):
    """Datasets of earlier versions, and those whose source was removed after the build."""
    source = write_folder(tmp_path, BMP)
    build(options(source, tmp_path), show=False)
    manifest = read_manifest(str(tmp_path / "out"))
    noted = {key: value for key, value in manifest.source.items() if key not in ("fingerprint", "left_out")}
    write_manifest(str(tmp_path / "out"), manifest.model_copy(update={"source": noted}))
    (source / "new.bmp").write_bytes(OTHER)
    build(options(source, tmp_path), show=False)
    write_manifest(str(tmp_path / "out"), manifest)
    shutil.rmtree(source)
    with pytest.raises(UserError, match="does not exist"):
        examine(options(source, tmp_path))
    build(options(source, tmp_path), show=False)
    assert open_dataset(str(tmp_path / "out")).n == 6


@pytest.mark.parametrize("change", ["grown", "replaced", "touched"])
def test_a_source_that_changed_during_an_interruption_is_noticed(tmp_path, change):
    source = write_folder(tmp_path, BMP)
    chosen = options(source, tmp_path, unit_bytes=2 * 16 * 16 * 3)

    def stop(title: str, index: int) -> None:
        if index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(chosen, show=False, on_task=stop)
    if change == "touched":
        os.utime(source / "a" / "0.bmp", (1, 1))
        build(chosen, show=False)
        assert open_dataset(str(tmp_path / "out")).n == 6
        return
    (source / "a" / ("new.bmp" if change == "grown" else "0.bmp")).write_bytes(OTHER)
    with pytest.raises(UserError, match=r"remove .* to start again"):
        build(chosen, show=False)
