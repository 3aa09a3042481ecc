"""Sources as people bring them: what a build finds in them, what it leaves out, and where it asks.

Each test is one kind of report about this field's tools. The truth is in how the source was made.
"""

from __future__ import annotations

import csv
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffscale.core.errors import UserError
from diffscale.data import open_dataset
from diffscale.data.__main__ import app
from diffscale.data.build.build import BuildOptions, build, examine
from diffscale.data.build.items import BuildSource, Reading
from diffscale.data.build.sources import open_source
from tests.support import tables
from tests.support.datasets import png
from tests.support.sources import (
    IMAGES,
    SPLIT_SOURCES,
    SPLIT_TRUTH,
    TREES,
    add_file,
    make_folder,
    split_tree,
    write_folder,
    write_tar,
)

PNG = [png(image) for image in IMAGES]


def listed(source: Path, **choices: str) -> tuple[dict[str, tuple[str | None, str | None]], BuildSource]:
    """Return {name: (split, class)} of the images of a source, and the source."""
    opened = open_source(str(source), 5, source.parent / "work", Reading(**choices))
    return {item.name: (unit.split, item.label) for unit in opened.units for item in unit.items}, opened


def options(source: Path, out: Path, **others) -> BuildOptions:
    return BuildOptions(str(source), str(out), (16,), workers=0, **others)


def rejected(out: Path) -> dict[str, str]:
    with open(out / "rejected.csv") as file:
        return {row["image"]: row["reason"] for row in csv.DictReader(file)}


CORPUS = {**SPLIT_SOURCES, **tables.SPLIT_SOURCES}


@pytest.mark.parametrize("kind", CORPUS)
def test_every_container_gives_the_same_images_splits_and_classes(tmp_path, kind):
    (tmp_path / "source").mkdir()
    source = CORPUS[kind](tmp_path / "source")
    labels = str(tmp_path / "source" / "labels.csv") if kind == "csv" else None
    build(options(source, tmp_path / "out", labels=labels), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    found = {}
    for split in (dataset, dataset.heldout):
        pixels, numbers = split.gather(np.arange(split.n))
        for image, number in zip(pixels.numpy(), numbers, strict=True):
            found[image.tobytes()] = (split.split_name, dataset.class_names[int(number)])
    assert found == SPLIT_TRUTH


NOISE = {
    "a hidden folder": {".ipynb_checkpoints/train/0.png": PNG[0], ".git/config": b""},
    "a cache of the hub": {".cache/huggingface/x.lock": b"", ".gitattributes": b""},
    "a folder of macOS": {"__MACOSX/train/cat/._0.png": PNG[0], "train/cat/._0.png": b"x", ".DS_Store": b""},
    "files of Windows": {"train/cat/Thumbs.db": b"x", "desktop.ini": b"x"},
    "a folder of Synology": {"train/@eaDir/cat/0.png": PNG[0]},
    "annotations": {"annotations/cat.json": b"{}", "README.md": b"cats"},
    "hidden thumbnails": {"train/cat/.thumbnails/0.png": PNG[0]},
}


@pytest.mark.parametrize("container", TREES)
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("around", ["", "photos/"])
def test_hidden_and_side_files_change_nothing_and_are_listed(tmp_path, container, noise, around):
    files = {around + name: data for name, data in {**split_tree("Train", "valid"), **NOISE[noise]}.items()}
    found, source = listed(TREES[container](tmp_path, files))
    assert len(found) == 24
    assert {label for _, label in found.values()} == {"ant", "bee", "cat"}
    assert sum(split == "heldout" for split, _ in found.values()) == 6
    assert {name for name, _ in source.left_out} == {around + name for name in NOISE[noise]}
    assert source.refused == []


@pytest.mark.parametrize("container", TREES)
def test_an_archive_lists_its_files_in_any_order_and_each_once(tmp_path, container):
    files = dict(reversed(split_tree("a/training", "a/Test").items()))
    found, _ = listed(TREES[container](tmp_path, files))
    assert {name: split for name, (split, _) in found.items()} == {
        name: "train" if "training" in name else "heldout" for name in files
    }


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("container", ["zip", "tar"])
def test_of_files_of_one_name_in_an_archive_the_last_is_used(tmp_path, container):
    """As when the archive is extracted; the others are listed."""
    path = tmp_path / f"x.{container}"
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for data in (PNG[0], PNG[1]):
                archive.writestr("a/x.png", data)
    else:
        import tarfile

        with tarfile.open(path, "w") as tar:
            for data in (PNG[0], PNG[1]):
                add_file(tar, "a/x.png", data)
    build(options(path, tmp_path / "out"), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    assert np.array_equal(dataset.gather(np.arange(dataset.n))[0].numpy(), IMAGES[1:2])
    assert "same name" in rejected(tmp_path / "out")["a/x.png"]


def test_years_as_names_of_folders_are_two_classes(tmp_path):
    files = {f"{year}/{i}.png": PNG[i] for i, year in enumerate(["1990", "2005"] * 4)}
    build(options(write_folder(tmp_path, files), tmp_path / "out"), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.class_names == ["1990", "2005"]
    assert sorted(dataset.gather(np.arange(8))[1].tolist()) == [0] * 4 + [1] * 4


def test_numbers_from_one_make_no_class_zero_and_01_is_another_class_than_1(tmp_path):
    files = {f"{name}/{i}.png": PNG[i] for i, name in enumerate(["1", "2", "3", "01"] * 3)}
    build(options(write_folder(tmp_path, files), tmp_path / "out"), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.class_names == ["01", "1", "2", "3"]
    assert dataset.n == 12


def test_class_numbers_of_a_list_have_no_empty_classes(tmp_path):
    labels = b'{"labels": [["0.png", 1990], ["1.png", 2005]]}'
    files = {"0.png": PNG[0], "1.png": PNG[1], "dataset.json": labels}
    build(options(write_folder(tmp_path, files), tmp_path / "out"), show=False)
    assert open_dataset(str(tmp_path / "out")).class_names == ["1990", "2005"]


@pytest.mark.parametrize("container", TREES)
@pytest.mark.parametrize("around", ["", "set/"])
def test_a_dataset_json_gives_labels_in_every_container_or_says_that_there_are_none(tmp_path, container, around):
    names = [f"{i:05d}/img{i}.png" for i in range(3)]
    files = {around + name: PNG[i] for i, name in enumerate(names)}
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    listed_labels = ", ".join(f'["{name}", {i % 2}]' for i, name in enumerate(names))
    with_labels = {**files, f"{around}dataset.json": f'{{"labels": [{listed_labels}]}}'.encode()}
    found, source = listed(TREES[container](tmp_path / "with", with_labels))
    assert [label for _, label in found.values()] == ["0", "1", "0"]
    assert source.left_out == []
    found, _ = listed(TREES[container](tmp_path / "without", {**files, f"{around}dataset.json": b'{"labels": null}'}))
    assert [label for _, label in found.values()] == [None] * 3


@pytest.mark.parametrize(
    "text",
    ["[]", '{"labels": {"a": 1}}', '{"labels": [["a.png", 1.5]]}', '{"labels": [["a.png", -1]]}', "{", '{"a": 1}'],
)
def test_a_dataset_json_that_is_none_is_one_message(tmp_path, text):
    source = write_folder(tmp_path, {"a.png": PNG[0], "dataset.json": text.encode()})
    with pytest.raises(UserError, match=r"dataset\.json"):
        listed(source)


def test_a_dataset_json_with_two_classes_for_a_file_is_refused(tmp_path):
    text = b'{"labels": [["a.png", 1], ["a.png", 2]]}'
    with pytest.raises(UserError, match="two classes"):
        listed(write_folder(tmp_path, {"a.png": PNG[0], "dataset.json": text}))


@pytest.mark.parametrize("other", ["samples.npz", "samples.npy", "samples.tar"])
def test_images_next_to_arrays_or_tars_are_a_question_that_kind_decides(tmp_path, other):
    source = write_folder(tmp_path, {f"{i}.png": PNG[i] for i in range(5)})
    if other.endswith("tar"):
        write_tar(tmp_path, {"x/y.png": PNG[9]}).rename(source / other)
    elif other.endswith("npz"):
        np.savez(source / other, IMAGES)
    else:
        np.save(source / other, IMAGES)
    kind = "tar" if other.endswith("tar") else "array"
    with pytest.raises(UserError) as error:
        listed(source)
    assert "5 of the kind folder (0.png, 1.png and 3 more)" in error.value.text()
    assert f"--kind folder or --kind {kind}" in error.value.text()
    found, opened = listed(source, kind="folder")
    assert len(found) == 5
    assert [name for name, _ in opened.left_out] == [other]
    _, opened = listed(source, kind=kind)
    assert [name for name, _ in opened.left_out] == [f"{i}.png" for i in range(5)]


def test_a_link_gives_no_copies_and_a_link_elsewhere_is_followed_once(tmp_path):
    source = write_folder(tmp_path, {f"a/{i}.png": PNG[i] for i in range(3)})
    elsewhere = write_folder(tmp_path / "elsewhere", {f"{i}.png": PNG[i] for i in range(3, 6)})
    os.symlink("..", source / "a" / "up")
    os.symlink(source, source / "a" / "root")
    os.symlink(tmp_path, source / "a" / "above")
    os.symlink("0.png", source / "a" / "again.png")
    os.symlink(source / "a", source / "same")
    os.symlink(elsewhere, source / "b")
    os.symlink(elsewhere, source / "c")
    os.symlink(elsewhere / "3.png", source / "a" / "d.png")
    (tmp_path / "alone").write_bytes(PNG[7])
    os.symlink("../../alone", source / "a" / "e.png")
    os.symlink("../../alone", source / "a" / "f.png")
    os.symlink("nowhere", source / "broken.png")
    os.mkfifo(source / "a" / "pipe.png")
    found, opened = listed(source)
    names = ["a/0.png", "a/1.png", "a/2.png", "a/e.png", "b/3.png", "b/4.png", "b/5.png"]
    assert found == {name: (None, name[0]) for name in names}
    why = dict(opened.refused + opened.left_out)
    assert set(why) >= {
        "a/up",
        "a/root",
        "a/above",
        "a/again.png",
        "same",
        "c",
        "broken.png",
        "a/pipe.png",
        "a/d.png",
        "a/f.png",
    }
    assert "read under its own name" in why["same"]
    assert "neither a file nor a folder" in why["a/pipe.png"]


def test_files_that_are_links_into_a_hidden_folder_are_images(tmp_path):
    """The layout of git annex and DVC."""
    source = write_folder(tmp_path, {".git/annex/0": PNG[0], ".git/annex/1": PNG[1], "a/x.txt": b""})
    for i in range(2):
        os.symlink(f"../.git/annex/{i}", source / "a" / f"{i}.png")
    found, _ = listed(source)
    assert found == {"a/0.png": (None, "a"), "a/1.png": (None, "a")}
    build(options(source, tmp_path / "out"), show=False)
    assert open_dataset(str(tmp_path / "out")).n == 2


def test_names_that_are_not_utf8_are_used_and_listed(tmp_path):
    source = write_folder(tmp_path, {"a/0.png": PNG[0]})
    latin = os.fsencode(source) + b"/caf\xe9"
    os.mkdir(latin)
    for name in (b"/\xe9.png", b"/\xe8.txt"):
        with open(latin + name, "wb") as file:
            file.write(PNG[1])
    build(options(source, tmp_path / "out"), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.n == 2
    assert dataset.class_names == ["a", "caf\\xe9"]
    assert sorted(dataset.name(i) for i in range(2)) == ["a/0.png", "caf\\xe9/\\xe9.png"]
    assert "caf\\xe9/\\xe8.txt" in rejected(tmp_path / "out")
    assert "caf\\xe9 1" in examine(options(source, tmp_path / "new"))


def test_two_spellings_of_one_letter_are_one_class(tmp_path):
    """macOS writes é as e and an accent, other systems as one letter."""
    files = {"train/caf\u00e9/0.png": PNG[0], "val/cafe\u0301/1.png": PNG[1]}
    found, _ = listed(write_folder(tmp_path, files))
    assert [label for _, label in found.values()] == ["caf\u00e9"] * 2


def test_every_file_that_is_not_used_is_listed_with_the_reason(tmp_path):
    files = {f"a/{i}.png": PNG[i] for i in range(3)}
    unread = {f"a/x.{end}": PNG[4] for end in ("jfif", "heic", "jxl", "tga")}
    others = {"a/x": PNG[5], "readme.md": b"", ".hidden/y.png": PNG[6], "a/.z.png": PNG[7]}
    source = write_folder(tmp_path, files | unread | others)
    build(options(source, tmp_path / "out"), show=False)
    why = rejected(tmp_path / "out")
    assert set(why) == set(unread) | set(others)
    assert why["a/x.heic"] == "images with the extension .heic are not read"
    assert why["a/x"] == "it has no extension"
    assert why[".hidden/y.png"] == "in the hidden folder .hidden"
    manifest = open_dataset(str(tmp_path / "out")).manifest
    assert (manifest.rejected, manifest.source["left_out"]) == (4, 4)
    with pytest.raises(UserError, match="strict"):
        build(options(source, tmp_path / "strict", strict=True), show=False)


def test_a_strict_build_accepts_files_that_are_no_images(tmp_path):
    build(options(make_folder(tmp_path / "source"), tmp_path / "out", strict=True), show=False)
    assert open_dataset(str(tmp_path / "out")).n == 24


def test_the_plan_says_what_was_found_and_nothing_is_written(tmp_path):
    source = write_folder(
        tmp_path, split_tree() | {"train/cat/x.heic": PNG[0], "notes.txt": b"", "val/owl/0.png": PNG[1]}
    )
    text = examine(options(source, tmp_path / "out"))
    assert f"source      {source}, read as folder" in text
    assert "images      18 for training, 7 held out" in text
    assert "4: ant 6 + 2, bee 6 + 2, cat 6 + 2, owl 0 + 1 (training + held out)" in text
    assert "not usable  1 file, listed in rejected.csv" in text
    assert "1: images with the extension .heic are not read (train/cat/x.heic)" in text
    assert "1: .txt is not an extension of images (notes.txt)" in text
    assert "classes without images for training: owl" in text
    assert sorted(os.listdir(tmp_path)) == ["tree"]


def test_a_dry_run_of_the_command_prints_the_plan_alone(tmp_path):
    source = make_folder(tmp_path / "source")
    arguments = ["build", str(source), str(tmp_path / "out"), "--resolution", "16", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert result.stdout.startswith("source ")
    assert "classes     3: ant 8, bee 8, cat 8" in result.stdout
    assert os.listdir(tmp_path) == ["source"]


def test_the_plan_shows_no_control_characters_of_a_name(tmp_path):
    text = examine(options(write_folder(tmp_path, {"a\x1b[2Jb/0.png": PNG[0]}), tmp_path / "out"))
    assert "\x1b" not in text
    assert "a\\x1b[2Jb" in text


def test_a_share_is_held_out_of_a_source_with_training_images_alone(tmp_path):
    """It was ignored where the folder was called train."""
    source = write_folder(tmp_path, split_tree("train", "train"))
    build(options(source, tmp_path / "out", split=0.3), show=False)
    dataset = open_dataset(str(tmp_path / "out"))
    assert 1 <= dataset.heldout.n <= 14
    assert dataset.n + dataset.heldout.n == 24
    assert "about 30% are held out" in examine(options(source, tmp_path / "new", split=0.3))
    (source / "val" / "cat").mkdir(parents=True)
    (source / "val" / "cat" / "0.png").write_bytes(PNG[0])
    assert "--split 0.3 is not used" in examine(options(source, tmp_path / "new", split=0.3))


@pytest.mark.parametrize("kind", ["array", "table"])
def test_a_choice_about_folders_is_refused_for_a_source_without(tmp_path, kind):
    np.savez(tmp_path / "x.npz", IMAGES)
    for name in ("labels", "folders"):
        with pytest.raises(UserError, match="folders, zips and tars"):
            listed(tmp_path / "x.npz", kind=kind, **{name: "none"})


def test_a_kind_that_the_source_is_not_is_refused(tmp_path):
    source = make_folder(tmp_path / "source")
    write_tar(tmp_path, {"a/x.png": PNG[0]})
    for path, kind in (
        (source, "zip"),
        (tmp_path / "tree.tar", "folder"),
        (tmp_path / "tree.tar", "zip"),
        (source, "tar"),
    ):
        with pytest.raises(UserError):
            listed(path, kind=kind)


def test_tars_of_one_folder_are_splits_classes_or_pieces_by_their_names(tmp_path):
    for i, names in enumerate((("train", "val"), ("cats", "dogs"), ("part-0", "part-1"), ("n01440764", "n02102040"))):
        folder = tmp_path / str(i)
        for name in names:
            (folder / name).mkdir(parents=True)
            write_tar(folder / name, {f"{name}{j}.png": PNG[j] for j in range(2)}).rename(folder / f"{name}.tar")
        found, _ = listed(folder)
        expected = {
            "train": [("train", None), ("heldout", None)],
            "cats": [(None, "cats"), (None, "dogs")],
            "part-0": [(None, None), (None, None)],
            "n01440764": [(None, "n01440764"), (None, "n02102040")],
        }[names[0]]
        assert list(found.values()) == [found for found in expected for _ in range(2)]


def test_a_question_about_a_packed_tar_names_the_tar(tmp_path):
    source = write_tar(tmp_path, {"cat/0.png": PNG[0], "dog/1.png": PNG[1], "test/2.png": PNG[2]}, "w:gz")
    with pytest.raises(UserError) as error:
        listed(source)
    assert error.value.value == str(source)


def test_a_tar_that_is_cut_off_or_joined_is_refused(tmp_path):
    """tarfile takes a damaged header for the end of the archive."""
    whole = write_tar(tmp_path, {f"a/{i}.png": PNG[i] for i in range(5)}).read_bytes()
    end = whole.rstrip(b"\0")
    for cut in (len(end) // 2, len(end) - 2000, 1024 + 100, 512 * 3):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="tar archive"):
            listed(tmp_path / "cut.tar")
    (tmp_path / "joined.tar").write_bytes(whole + whole)
    with pytest.raises(UserError, match="joined"):
        listed(tmp_path / "joined.tar")
