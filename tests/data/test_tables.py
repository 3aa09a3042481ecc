"""How tables are understood: configurations, splits, columns and labels, read directly and built."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffscale.core.errors import UserError
from diffscale.data import Choices, Dataset, Loader, open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
from tests.support.datasets import pictures, png
from tests.support.sources import CLASSES, IMAGES
from tests.support.tables import (
    HELD,
    IMAGE,
    SPLIT_SOURCES,
    TRAIN,
    class_label,
    images,
    numbers,
    with_features,
    write_table,
)

SIX = range(6)


def opened(place: Path, **choices) -> Dataset:
    """The dataset read directly."""
    return open_dataset(resolve(str(place), 16, "/unused", Choices(**choices)))


def images_table(rows) -> pa.Table:
    return pa.table({"image": images(rows)})


def built(place: Path, out: Path, **choices) -> Dataset:
    build(BuildOptions(str(place), str(out), (16,), workers=0, **choices), show=False)
    return open_dataset(str(out))


def beside(folder: Path, name: str) -> Path:
    """A place for a dataset that is not in its source."""
    return folder.with_name(f"{folder.name}-{name}")


def content(dataset: Dataset) -> dict[bytes, str]:
    """The class of each image, by its pixels."""
    pixels, labels = dataset.gather(np.arange(dataset.n))
    names = dataset.class_names or [""]
    return {x.tobytes(): names[int(y)] for x, y in zip(pixels.numpy(), labels, strict=True)}


def truth(rows, names=CLASSES) -> dict[bytes, str]:
    return {IMAGES[i].tobytes(): names[i % len(names)] for i in rows}


def rejected(out: Path) -> list[str]:
    with open(out / "rejected.csv") as file:
        return [row["reason"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("layout", SPLIT_SOURCES)
def test_every_layout_gives_the_same_images_splits_and_classes(tmp_path, layout):
    (tmp_path / "source").mkdir()
    source = SPLIT_SOURCES[layout](tmp_path / "source")
    found = [built(source, tmp_path / "out")]
    if layout in ("hub", "converted", "saved", "declared"):
        found.append(opened(source))
    for dataset in found:
        assert dataset.class_names == CLASSES
        assert content(dataset) == truth(TRAIN)
        assert dataset.class_counts == (6, 6, 6)
        assert dataset.heldout is not None
        assert content(dataset.heldout) == truth(HELD)
        assert dataset.heldout.class_counts == (2, 2, 2)


def test_configurations_are_not_joined_unless_a_person_says_so(tmp_path):
    """The hub's folders of several configurations are different datasets, perhaps of the same images."""
    write_table(tmp_path / "cropped" / "train-0.parquet", {"image": images(SIX), "label": numbers(SIX)})
    write_table(tmp_path / "full" / "train-0.parquet", {"image": images(range(6, 12)), "label": numbers(SIX)})
    for read in (lambda **c: opened(tmp_path, **c), lambda **c: built(tmp_path, beside(tmp_path, "out"), **c)):
        with pytest.raises(UserError, match="cropped, full"):
            read()
    assert content(opened(tmp_path, config="full")) == truth(range(6, 12), ["0", "1", "2"])
    assert opened(tmp_path, config="*").n == 12
    assert built(tmp_path, beside(tmp_path, "one"), config="cropped").n == 6
    with pytest.raises(UserError, match="no such configuration"):
        opened(tmp_path, config="half")


def test_configurations_of_the_hubs_conversion_and_of_a_readme_are_found(tmp_path):
    for config in ("default", "other"):
        write_table(tmp_path / "converted" / config / "train" / "0000.parquet", {"image": images(SIX)})
    with pytest.raises(UserError, match="default, other"):
        opened(tmp_path / "converted")
    for file in ("a", "b", "c"):
        write_table(tmp_path / "listed" / f"{file}.parquet", {"image": images(SIX)})
    configs = "configs:\n- config_name: x\n  data_files: a.parquet\n- config_name: y\n  data_files: [b.parquet]\n"
    (tmp_path / "listed" / "README.md").write_text(f"---\n{configs}---\n")
    with pytest.raises(UserError, match="x, y"):
        opened(tmp_path / "listed")
    built(tmp_path / "listed", tmp_path / "out", config="x")


def test_pieces_in_numbered_folders_are_one_dataset(tmp_path):
    for number, rows in enumerate((TRAIN, HELD)):
        write_table(tmp_path / "data" / f"{number:03d}" / "0.parquet", {"image": images(rows)})
    assert opened(tmp_path).n == 24


def test_several_columns_of_images_are_refused_unless_one_is_chosen_or_called_image(tmp_path):
    red = pa.array([{"bytes": png(np.full((16, 16, 3), (255, 0, 0), np.uint8)), "path": None}] * 6)
    both = {"conditioning_image": red, "image": images(SIX)}
    write_table(tmp_path / "one.parquet", both, conditioning_image=IMAGE, image=IMAGE)
    assert content(opened(tmp_path / "one.parquet")) == truth(SIX, [""])
    chosen = opened(tmp_path / "one.parquet", image_column="conditioning_image")
    assert (chosen.gather(np.arange(6))[0].numpy() == (255, 0, 0)).all()
    assert chosen.content_hash != opened(tmp_path / "one.parquet").content_hash
    write_table(tmp_path / "two.parquet", {"input": red, "edited": images(SIX)})
    with pytest.raises(UserError, match=r"--image-column(.|\n)*input, edited"):
        built(tmp_path / "two.parquet", tmp_path / "out")
    assert content(built(tmp_path / "two.parquet", tmp_path / "out", image_column="edited")) == truth(SIX, [""])
    with pytest.raises(UserError, match=r"data.image_column(.|\n)*input, edited"):
        opened(tmp_path / "two.parquet", image_column="label")


def test_several_columns_of_labels_are_refused_unless_one_is_chosen_or_called_label(tmp_path):
    """CIFAR-100 has fine_label and coarse_label."""
    columns = {"img": images(SIX), "fine_label": numbers(SIX), "coarse_label": [0, 1] * 3}
    fine, coarse = class_label(*CLASSES), class_label("x", "y")
    write_table(tmp_path / "a.parquet", columns, img=IMAGE, fine_label=fine, coarse_label=coarse)
    with pytest.raises(UserError, match=r"data.label_column(.|\n)*fine_label, coarse_label, none"):
        opened(tmp_path / "a.parquet")
    assert content(opened(tmp_path / "a.parquet", label_column="fine_label")) == truth(SIX)
    assert built(tmp_path / "a.parquet", tmp_path / "out", label_column="coarse_label").class_names == ["x", "y"]
    assert opened(tmp_path / "a.parquet", label_column="none").num_classes == 0
    write_table(tmp_path / "b.parquet", columns | {"label": ["q"] * 6}, img=IMAGE, fine_label=fine)
    assert opened(tmp_path / "b.parquet").class_names == ["q"]


VALUES = {
    "int8": (pa.array([0, 1, 2] * 2, pa.int8()), ["0", "1", "2"]),
    "uint16": (pa.array([0, 1, 2] * 2, pa.uint16()), ["0", "1", "2"]),
    "gaps": (pa.array([1990, 2005, 2010] * 2, pa.int64()), ["1990", "2005", "2010"]),
    "from one": (pa.array([1, 2, 3] * 2, pa.int32()), ["1", "2", "3"]),
    "text": (pa.array(["b", "a", "c"] * 2), ["a", "b", "c"]),
    "large text": (pa.array(["b", "a", "c"] * 2, pa.large_string()), ["a", "b", "c"]),
    "categories": (pa.array(["b", "a", "c"] * 2).dictionary_encode(), ["a", "b", "c"]),
    "bool": (pa.array([True, False, True] * 2), ["False", "True"]),
    "whole floats": (pa.array([0.0, 2.0, 4.0] * 2), ["0", "2", "4"]),
    "half floats": (pa.array(np.array([0, 1, 2] * 2, np.float16)), ["0", "1", "2"]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_labels_of_any_type_are_the_values_that_occur(tmp_path, kind):
    column, names = VALUES[kind]
    write_table(tmp_path / "a.parquet", {"image": images(SIX), "label": column}, group=4)
    text = [str(int(v)) if isinstance(v, float) else str(v) for v in column.to_pylist()]
    for dataset in (opened(tmp_path / "a.parquet"), built(tmp_path / "a.parquet", tmp_path / "out")):
        assert dataset.class_names == names
        assert content(dataset) == {IMAGES[i].tobytes(): text[i] for i in SIX}
        assert sum(dataset.class_counts) == 6


@pytest.mark.parametrize(
    "column",
    [pa.array([0.5, 1.0] * 3), pa.array([[1, 2]] * 6), pa.array(["x" * 5000] * 6), pa.array([10**10 + i for i in SIX])],
    ids=["fractions", "lists", "captions", "ids"],
)
def test_a_column_of_no_classes_is_refused_and_can_be_left_out(tmp_path, column):
    write_table(tmp_path / "a.parquet", {"image": images(SIX), "label": column})
    with pytest.raises(UserError, match=r"data.label_column = 'label'"):
        opened(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"--label-column = 'label'"):
        built(tmp_path / "a.parquet", tmp_path / "out")
    assert built(tmp_path / "a.parquet", tmp_path / "out", label_column="none").num_classes == 0


def test_ids_are_classes_if_a_person_names_the_column(tmp_path):
    write_table(tmp_path / "a.parquet", {"image": images(SIX), "label": [10**10, 10**12, 10**10] * 2})
    assert opened(tmp_path / "a.parquet", label_column="label").class_names == ["10000000000", "1000000000000"]


def test_files_whose_class_names_differ_are_not_one_dataset(tmp_path):
    for file, names in (("train-0", ("cat", "dog")), ("train-1", ("dog", "cat"))):
        write_table(
            tmp_path / f"{file}.parquet", {"image": images(SIX), "label": [0, 1] * 3}, label=class_label(*names)
        )
    with pytest.raises(UserError, match="other classes"):
        opened(tmp_path)


def test_a_test_split_without_labels_is_held_out_without_classes(tmp_path):
    """-1 is the hub's sign for a label that is not published."""
    with_features(tmp_path / "train-00000-of-00001.parquet", TRAIN)
    columns = {"image": images(HELD), "label": [-1] * 6}
    write_table(tmp_path / "test-00000-of-00001.parquet", columns, image=IMAGE, label=class_label(*CLASSES))
    dataset = opened(tmp_path)
    assert (dataset.class_counts, dataset.heldout.num_classes, dataset.heldout.class_counts) == ((6, 6, 6), 0, ())
    assert content(dataset.heldout) == truth(HELD, [""])
    out = built(tmp_path, beside(tmp_path, "out"))
    assert (out.n, out.heldout) == (18, None)
    with_features(tmp_path / "validation-00000-of-00001.parquet", HELD)  # as ImageNet has all three
    assert content(opened(tmp_path).heldout) == truth(HELD)


@pytest.mark.parametrize("missing", [-1, None])
def test_rows_without_a_label_among_others_are_refused_directly_and_listed_by_a_build(tmp_path, missing):
    labels = [0, 1, 2, 0, missing, missing]
    write_table(tmp_path / "a.parquet", {"image": images(SIX), "label": labels}, label=class_label(*CLASSES))
    with pytest.raises(UserError, match=r"2 of 6 rows"):
        opened(tmp_path / "a.parquet")
    assert built(tmp_path / "a.parquet", tmp_path / "out").n == 4
    assert rejected(tmp_path / "out") == ["the row has no label"] * 2


def test_minus_one_among_numbers_without_names_may_be_a_class_and_is_refused(tmp_path):
    write_table(tmp_path / "a.parquet", {"image": images(SIX), "label": [-1, 1] * 3})
    for read in (opened, lambda place: built(place, tmp_path / "out")):
        with pytest.raises(UserError, match="3 rows have the label -1"):
            read(tmp_path / "a.parquet")


def test_a_training_split_without_any_label_has_no_classes(tmp_path):
    write_table(tmp_path / "a.parquet", {"image": images(SIX), "label": [-1] * 6}, label=class_label(*CLASSES))
    for dataset in (opened(tmp_path / "a.parquet"), built(tmp_path / "a.parquet", tmp_path / "out")):
        assert (dataset.num_classes, dataset.class_counts) == (0, ())


def test_splits_of_other_names_are_left_out(tmp_path):
    """SVHN has train, test and extra, STL-10 train, test and unlabeled."""
    with_features(tmp_path / "train-00000-of-00001.parquet", TRAIN)
    with_features(tmp_path / "extra-00000-of-00001.parquet", HELD)
    assert opened(tmp_path).n == built(tmp_path, beside(tmp_path, "out")).n == 18
    both = built(tmp_path, beside(tmp_path, "both"), split_names="train=train,train=extra")
    assert both.n == 24
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "other-00000-of-00001.parquet")
    with pytest.raises(UserError, match="extra, other"):
        opened(tmp_path)


def test_a_saved_split_of_another_name_is_no_configuration(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = {"train": TRAIN, "test": HELD, "unsupervised": SIX}
    DatasetDict({name: Dataset(images_table(part)) for name, part in rows.items()}).save_to_disk(tmp_path / "saved")
    for dataset in (opened(tmp_path / "saved"), built(tmp_path / "saved", tmp_path / "out")):
        assert content(dataset) == truth(TRAIN, [""])
        assert content(dataset.heldout) == truth(HELD, [""])


def test_a_share_of_a_table_without_held_out_images_can_be_held_out(tmp_path):
    write_table(tmp_path / "a.parquet", {"image": images(range(24))})
    dataset = built(tmp_path / "a.parquet", tmp_path / "out", split=0.3)
    assert dataset.n + dataset.heldout.n == 24
    assert 1 <= dataset.heldout.n <= 14


def save(file: Path, **arrays: np.ndarray) -> Path:
    np.savez(file, **arrays)
    return file


def test_arrays_that_could_be_meant_are_asked_for(tmp_path):
    masks, labels = np.zeros((6, 16, 16), np.uint8), np.arange(6) % 3
    two = save(tmp_path / "a.npz", pictures=IMAGES[:6], masks=masks, fine=labels, coarse=labels // 2)
    with pytest.raises(UserError, match=r"--image-column(.|\n)*pictures, masks"):
        built(two, tmp_path / "out")
    with pytest.raises(UserError, match=r"--label-column(.|\n)*fine, coarse"):
        built(two, tmp_path / "out", image_column="pictures")
    dataset = built(two, tmp_path / "out", image_column="pictures", label_column="fine")
    assert content(dataset) == truth(SIX, ["0", "1", "2"])
    several = save(tmp_path / "b.npz", images=IMAGES[:6], labels=np.zeros((6, 14), np.uint8), ids=np.arange(6))
    with pytest.raises(UserError, match=r"labels \(6, 14\)"):
        built(several, tmp_path / "several")
    assert built(several, tmp_path / "several", label_column="none").num_classes == 0


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([5, 9, 5, 9, 5, 9], np.uint8), ["5", "9"]),
        (np.array(["b", "a"] * 3), ["a", "b"]),
        (np.array([b"b", b"a"] * 3), ["a", "b"]),
        (np.array([True, False] * 3), ["False", "True"]),
        (np.array([1.0, 0.0] * 3), ["0", "1"]),
        (np.array([-1] * 6), []),
    ],
)
def test_labels_of_arrays_are_the_values_that_occur(tmp_path, labels, names):
    assert built(save(tmp_path / "a.npz", images=IMAGES[:6], labels=labels), tmp_path / "out").class_names == names


def test_arrays_of_ids_and_splits_without_labels(tmp_path):
    ids = save(tmp_path / "ids.npz", images=IMAGES[:6], labels=10**10 + np.arange(6))
    with pytest.raises(UserError, match="looks like an id"):
        built(ids, tmp_path / "out")
    unlabelled = save(tmp_path / "a.npz", x_train=IMAGES[:6], y_train=np.arange(6), x_test=IMAGES[6:])
    dataset = built(unlabelled, tmp_path / "out")
    assert (dataset.n, dataset.num_classes, dataset.heldout) == (6, 6, None)
    assert any("no labels" in reason for reason in rejected(tmp_path / "out"))


def test_a_folder_of_images_with_a_metadata_parquet_is_no_table(tmp_path):
    """The hub's ImageFolder."""
    write_table(tmp_path / "source" / "train" / "metadata.parquet", {"file_name": [f"{i}.png" for i in SIX]})
    for i in SIX:
        (tmp_path / "source" / "train" / f"{i}.png").write_bytes(png(IMAGES[i]))
    assert content(built(tmp_path / "source", tmp_path / "out")).keys() == truth(SIX).keys()


def encoded(pixels) -> dict:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


def test_colour_is_not_guessed_from_a_few_rows(tmp_path):
    """Those looked at first are grey: 64 of 400 rows. A row in colour is refused when it is used, never made grey."""
    colour, grey = pictures(400, 16), pictures(400, 16, channels=1)[..., 0]
    looked_at = {*np.linspace(0, 399, 8).astype(int).tolist()}
    few = [encoded(grey[i] if i in looked_at else colour[i]) for i in range(400)]
    pq.write_table(pa.table({"image": few}), tmp_path / "few.parquet")
    assert opened(tmp_path / "few.parquet").channels == 3  # 56 more are looked at
    rows = [encoded(image) for image in grey]
    rows[200] = encoded(colour[200])
    pq.write_table(pa.table({"image": rows}), tmp_path / "one.parquet")
    dataset = opened(tmp_path / "one.parquet")
    assert dataset.channels == 1
    with pytest.raises(UserError, match=r"data.channels(.|\n)*images in colour"):
        dataset.gather(np.arange(400))
    with pytest.raises(UserError, match=r"data.channels"):
        list(Loader(dataset, seed=0, global_batch=40, stop=400))
    for channels in (1, 3):
        told = opened(tmp_path / "one.parquet", channels=channels)
        assert told.gather(np.arange(400))[0].shape == (400, 16, 16, channels)


def test_held_out_images_have_the_colours_of_the_training_images(tmp_path):
    write_table(tmp_path / "train.parquet", {"image": images(TRAIN)})
    grey = [encoded(image) for image in pictures(6, 16, channels=1)[..., 0]]
    write_table(tmp_path / "test.parquet", {"image": pa.array(grey)})
    assert opened(tmp_path).heldout.channels == open_dataset(opened(tmp_path).path, "heldout").channels == 3


def test_without_a_resolution_all_images_have_one_size(tmp_path):
    pixels = [np.zeros((16, 20, 3), np.uint8)] * 99 + [np.zeros((12, 16, 3), np.uint8)]
    pq.write_table(pa.table({"image": [encoded(p) for p in pixels[::-1]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data.resolution(.|\n)*12 and 16"):
        open_dataset(str(tmp_path / "a.parquet"))
    assert opened(tmp_path / "a.parquet").resolution == 16


def test_choices_for_a_dataset_in_our_format_are_refused(tmp_path):
    write_table(tmp_path / "a.parquet", {"image": images(SIX)})
    out = built(tmp_path / "a.parquet", tmp_path / "out")
    with pytest.raises(UserError, match="was built"):
        resolve(out.path, 16, "/unused", Choices(channels=1))
    with pytest.raises(UserError, match="was built"):
        resolve("builtin:emoji", 16, str(tmp_path), Choices(label_column="x"))


HOSTILE = {
    "ten digits": lambda n: pa.array(10**10 + np.arange(n)),
    "other numbers": lambda n: pa.array(np.arange(n)),
    "captions": lambda n: pa.array([f"a photo of number {i} " * 4 for i in range(n)]),
    "one long text": lambda n: pa.DictionaryArray.from_arrays(np.zeros(n, np.int32), ["x" * (1 << 20)]),  # 120 GB
    "many long texts": lambda n: pa.array([f"{i}" + "x" * 100_000 for i in range(500)]),
    "negative": lambda n: pa.array(-np.arange(n) - 2),
}
LIMIT = 1 << 30  # bytes beyond what the process has after its imports
READ = """
import os, resource, sys
import pyarrow, pyarrow.parquet, torch
from diffscale.core.errors import UserError
from diffscale.data import open_dataset, resolve
from diffscale.data.build.build import BuildOptions, build
used = int(open("/proc/self/statm").read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), -1))
for path in sys.argv[3:]:
    for read in (
        lambda: open_dataset(resolve(path, 16, "/unused")),
        lambda: build(BuildOptions(path, sys.argv[1], (16,), workers=0), show=False),
    ):
        try:
            read()
            print("read", path)
        except UserError as error:
            print("refused", error.setting)
"""


def test_the_memory_of_a_hostile_column_of_labels_is_bounded(tmp_path):
    """The ten digits took 8 GB: a name for every number up to the largest. Each case is refused in less than 1 GiB."""
    for name, make in HOSTILE.items():
        column = make(120_000)
        file = tmp_path / f"{name.replace(' ', '-')}.parquet"
        null = pa.nulls(len(column) - 6, images(SIX).type)
        table = pa.table({"image": pa.concat_arrays([images(SIX), null]), "label": column})
        pq.write_table(table, file, row_group_size=100_000)
        with pa.OSFile(str(file.with_suffix(".arrow")), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100_000)
    files = sorted(str(f) for f in tmp_path.iterdir())
    command = [sys.executable, "-c", READ, str(tmp_path / "out"), str(LIMIT), *files]
    plain = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # the others reserve much more than they use
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["refused data.label_column", "refused --label-column"] * len(files)
