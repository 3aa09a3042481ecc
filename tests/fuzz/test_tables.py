"""Random tables, tars and arrays of known images: the same images, splits and classes come back, or a UserError that
names a choice. Damaged ones are read or refused, and no process dies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from diffscale.core.errors import UserError
from diffscale.data import Choices, Dataset, open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
from tests.support.datasets import pictures, png
from tests.support.tables import class_label, write_table, write_tar

from .mutate import damaged_bytes, fuzz, fuzz_apart

SIDE = 4
PIXELS = pictures(30, SIDE, seed=7)
NAMES = ["ant", "bee", "cat", "dog"]
TYPES: dict[str, tuple[Callable[[list[int]], pa.Array], list[str]]] = {
    "declared": (lambda c: pa.array(c, pa.int64()), NAMES),
    "int8": (lambda c: pa.array(c, pa.int8()), [*"0123"]),
    "gaps": (lambda c: pa.array([2000 + 7 * i for i in c], pa.uint16()), ["2000", "2007", "2014", "2021"]),
    "text": (lambda c: pa.array([NAMES[i] for i in c]), NAMES),
    "categories": (lambda c: pa.array([NAMES[i] for i in c]).dictionary_encode(), NAMES),
    "floats": (lambda c: pa.array([float(i) for i in c]), [*"0123"]),
    "bool": (lambda c: pa.array([i > 1 for i in c]), ["False", "False", "True", "True"]),
}
PLACES = {
    "hub": lambda split, i: f"data/{split}-{i:05d}-of-00009",
    "converted": lambda split, i: f"default/{split}/{i:04d}",
    "plain": lambda split, i: f"{split}_{i}",
    "folders": lambda split, i: f"{split}/part-{i}",
}


@dataclass(frozen=True)
class Case:
    """A random dataset. files: (split, images); classes: of each image."""

    files: list[tuple[str, list[int]]]
    classes: list[int]
    place: str
    held: str
    form: str
    kind: str
    group: int
    image: str
    others: list[str]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    order = draw(st.permutations(range(len(PIXELS))))
    cuts = sorted(draw(st.sets(st.integers(1, len(PIXELS) - 1), min_size=1, max_size=4)))
    pieces = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, len(PIXELS)], strict=True)]
    held = draw(st.sampled_from(["validation", "val", "test", "dev"]))
    splits = ["train", *(draw(st.sampled_from(["train", held])) for _ in pieces[1:])]
    return Case(
        files=list(zip(splits, pieces, strict=True)),
        classes=draw(st.lists(st.integers(0, 3), min_size=len(PIXELS), max_size=len(PIXELS))),
        place=draw(st.sampled_from(sorted(PLACES))),
        held=held,
        form=draw(st.sampled_from(["parquet", "arrow"])),
        kind=draw(st.sampled_from(sorted(TYPES))),
        group=draw(st.integers(1, 12)),
        image=draw(st.sampled_from(["image", "img", "picture"])),
        others=draw(st.lists(st.sampled_from(["id", "caption", "size", "second image"]), unique=True)),
    )


OTHERS: dict[str, Callable[[list[int]], Any]] = {
    "id": lambda rows: [10**12 + i for i in rows],
    "caption": lambda rows: [f"a photo of number {i}" for i in rows],
    "size": lambda rows: [[SIDE, SIDE]] * len(rows),
    "second image": lambda rows: [{"bytes": png(PIXELS[0]), "path": None}] * len(rows),
}


def write(case: Case, root: Path) -> None:
    for i, (split, rows) in enumerate(case.files):
        file = root / f"{PLACES[case.place](split, i)}.parquet"
        columns = {name: OTHERS[name](rows) for name in case.others}
        columns[case.image] = [{"bytes": png(PIXELS[j]), "path": None} for j in rows]
        columns["label"] = TYPES[case.kind][0]([case.classes[j] for j in rows])
        features = {"label": class_label(*NAMES)} if case.kind == "declared" else {}
        write_table(file, columns, case.group, **features)
        if case.form == "arrow":
            table = pq.read_table(file)
            file.unlink()
            arrow = str(file.with_suffix(".arrow"))
            with pa.OSFile(arrow, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=case.group)


def check(case: Case, dataset: Dataset) -> None:
    names = TYPES[case.kind][1]
    for split, found in (("train", dataset), ("held", dataset.heldout)):
        rows = [j for name, part in case.files if (name == "train") == (split == "train") for j in part]
        assert (found is None) == (not rows)
        if found is not None:
            pixels, labels = found.gather(np.arange(found.n))
            got = {x.tobytes(): found.class_names[int(y)] for x, y in zip(pixels.numpy(), labels, strict=True)}
            assert got == {PIXELS[j].tobytes(): names[case.classes[j]] for j in rows}
            counts = dict(zip(found.class_names, found.class_counts, strict=True))
            wanted = [names[case.classes[j]] for j in rows]
            assert {name: n for name, n in counts.items() if n} == {name: wanted.count(name) for name in wanted}


def test_random_tables_give_what_was_written(tmp_path):
    def read(case: Case) -> None:
        try:
            compare(case)
        except UserError as error:  # nothing in these tables leaves a choice open
            raise AssertionError(error.text()) from error

    def compare(case: Case) -> None:
        for name in ("source", "out"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        write(case, tmp_path / "source")
        source, choices = str(tmp_path / "source"), Choices()
        if "second image" in case.others and case.image == "picture":
            with pytest.raises(UserError, match="image_column"):
                open_dataset(resolve(source, SIDE, "/unused"))
            choices = Choices(image_column="picture")
        check(case, open_dataset(resolve(source, SIDE, "/unused", choices)))
        options = BuildOptions(source, str(tmp_path / "out"), (SIDE,), workers=0, image_column=choices.image_column)
        build(options, show=False)
        check(case, open_dataset(str(tmp_path / "out")))

    fuzz(cases(), read)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_damaged_tables(tmp_path, form):
    case = Case([("train", [*range(8)])], [0, 1] * 15, "plain", "test", form, "text", 3, "image", ["id"])
    write(case, tmp_path / "source")
    file = next((tmp_path / "source").iterdir())

    def read(data: bytes) -> None:
        file.write_bytes(data)
        dataset = open_dataset(resolve(str(file), SIDE, "/unused"))
        dataset.gather(np.arange(min(dataset.n, 1000)))

    fuzz_apart(damaged_bytes(file.read_bytes()), read)


def test_damaged_tars(tmp_path):
    members = [(f"{i}.{s}", png(PIXELS[i]) if s == "png" else b"1") for i in range(4) for s in ("png", "cls")]
    whole = write_tar(tmp_path / "a.tar", members).read_bytes()

    def read(data: bytes) -> None:
        (tmp_path / "a.tar").write_bytes(data)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        build(BuildOptions(str(tmp_path / "a.tar"), str(tmp_path / "out"), (SIDE,), workers=0), show=False)

    fuzz(damaged_bytes(whole), read)
