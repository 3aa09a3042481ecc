"""Random trees and lists of labels against the truth from which they were written, in every container."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

from hypothesis import strategies as st

from diffscale.data.build.items import Reading
from diffscale.data.build.labels import read_labels
from diffscale.data.build.layout import IMAGES, PAIRED
from diffscale.data.build.names import class_of, printable
from diffscale.data.build.sources import open_source
from diffscale.data.format.split_names import mentioned, split_of
from tests.support.sources import TREES

from .mutate import damaged_bytes, fuzz

LETTERS = st.characters(codec="utf-8", exclude_characters='/\\\0:"', exclude_categories=["Cc", "Cs", "Zs", "Zl", "Zp"])
WORDS = st.text(LETTERS, min_size=1, max_size=8) | st.integers(0, 3000).map(str)
TRAIN, HELD_OUT = (
    st.sampled_from(["train", "Train", "training", "TRAIN2017", "train_images", "trainset"]),
    st.sampled_from(["val", "valid", "Validation", "test", "TEST", "eval", "heldout", "held-out", "val2017"]),
)
AROUND = st.sampled_from(["", "photos/", "My Photos/2024/", "é/"])
NOISE = {
    **dict.fromkeys((".git/0.png", "__MACOSX/a/._0.png", ".ipynb_checkpoints/x/1.png", "@eaDir/2.png"), b"x"),
    **dict.fromkeys(("readme.txt", "annotations/a.json", "Thumbs.db", ".DS_Store"), b"x"),
}


def is_class(name: str) -> bool:
    """Return whether a name can be nothing else than a class."""
    hidden = name.startswith(".") or name in ("__MACOSX", "@eaDir", "annotations")
    return not (hidden or split_of(name) or mentioned(name) or name in (".", "..") or name.lower() in IMAGES | PAIRED)


CLASSES = st.lists(WORDS.filter(is_class), min_size=2, max_size=4, unique_by=class_of)


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict[str, bytes], dict[str, tuple[str | None, str | None]], dict[str, bytes]]:
    """Return the files of a tree with one reading, the (split, class) of each image, and the other files."""
    classes = draw(CLASSES)
    around = draw(AROUND)
    order = draw(st.sampled_from(["class", "split", "split/class", "class/split"]))
    folder_of = {"train": draw(TRAIN), "heldout": draw(HELD_OUT)}
    truth: dict[str, tuple[str | None, str | None]] = {}
    for i in range(draw(st.integers(4, 12))):
        label = classes[i % len(classes)]
        split = "heldout" if i >= len(classes) and draw(st.booleans()) else "train"
        folders = order.replace("split", folder_of[split]).replace("class", label)
        name = f"{around}{folders}/{i:02d}.PNG"
        truth[name] = (split if "split" in order else None, class_of(label) if "class" in order else None)
    others = {around + name: data for name, data in NOISE.items() if draw(st.booleans())}
    return dict.fromkeys(truth, b"image"), truth, others


def found_in(source: Path, **choices: str) -> tuple[dict[str, tuple[str | None, str | None]], list[str]]:
    opened = open_source(str(source), 3, source.parent / "work", Reading(**choices))
    found = {item.name: (unit.split, item.label) for unit in opened.units for item in unit.items}
    return found, [name for name, _ in opened.refused + opened.left_out]


def test_trees_with_one_reading_are_read_as_they_were_written(tmp_path):
    def read(value) -> None:
        (files, truth, others), container = value
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        found, unused = found_in(TREES[container](tmp_path, files | others))
        assert found == truth
        assert sorted(unused) == sorted(others)

    fuzz(st.tuples(trees(), st.sampled_from(sorted(TREES))), read)


PARTS = st.sampled_from(["train", "val", "cat", "dog", "1", "2", ".x", "images", "masks", "test", "a", "é", "data"])
PATHS = st.builds(
    lambda folders, file: "/".join([*folders, file]),
    st.lists(PARTS, max_size=4),
    st.sampled_from(["0.png", "1.jpg", "2.heic", "x", "y.txt", ".z.png", "Thumbs.db", "dataset.json"]),
)


def test_of_any_tree_every_file_is_used_or_listed_or_the_source_is_a_question(tmp_path):
    def read(value) -> None:
        names, container = value
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        found, unused = found_in(TREES[container](tmp_path, dict.fromkeys(names, b'{"labels": null}')))
        assert sorted([*found, *unused, *({n for n in names if n.endswith("dataset.json")} - set(unused))]) == sorted(
            names
        )
        labels = {label for _, label in found.values()}
        assert None not in labels or len(labels) == 1, "all have a class or none has"

    fuzz(st.tuples(st.sets(PATHS, min_size=1, max_size=12), st.sampled_from(sorted(TREES))), read)


CELLS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8).filter(
    lambda text: text == text.strip() and text
)


@st.composite
def lists(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """Return the text of a CSV, and the label of each file."""
    labels = draw(st.lists(CELLS, min_size=1, max_size=6))
    header = ["file", "label", *draw(st.lists(st.sampled_from(["width", "height", "comment"]), unique=True))]
    rows = [{"file": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    header = draw(st.permutations(header))
    out = io.StringIO(newline="")
    out.write(draw(st.sampled_from(["", "\ufeff"])))
    writer = csv.writer(
        out,
        delimiter=draw(st.sampled_from(",;\t")),
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    )
    writer.writerow(header)
    writer.writerows([row.get(column) or draw(CELLS) for column in header] for row in rows)
    return out.getvalue(), {row["file"]: class_of(row["label"]) for row in rows}


def test_lists_of_labels_are_read_as_they_were_written(tmp_path):
    def read(value: tuple[str, dict[str, str]]) -> None:
        text, truth = value
        (tmp_path / "labels.csv").write_bytes(text.encode())
        assert read_labels(str(tmp_path / "labels.csv")).labels == truth

    fuzz(lists(), read)


def test_damaged_lists_of_labels(tmp_path):
    valid = "file,split,label\n" + "".join(f'"{i}.png",train,"cat {i}"\n' for i in range(20))

    def read(data: bytes) -> None:
        (tmp_path / "labels.csv").write_bytes(data)
        found = read_labels(str(tmp_path / "labels.csv"))
        assert all(printable(name) == name for name in found.labels or {})

    fuzz(damaged_bytes(valid.encode()), read)


def test_damaged_archives(tmp_path):
    for container in ("zip", "tar"):
        whole = TREES[container](tmp_path, {f"{'ab'[i % 2]}/{i}.png": b"x" * 100 for i in range(6)})
        data = whole.read_bytes()

        def read(damaged: bytes, whole: Path = whole) -> None:
            whole.write_bytes(damaged)
            found_in(whole)

        fuzz(damaged_bytes(data), read)
