"""Keys, images and labels of WebDataset's tars, and tars that are cut off."""

from __future__ import annotations

import csv
import json
import random
import tarfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from diffscale.core.errors import UserError
from diffscale.data import Dataset, open_dataset
from diffscale.data.build.build import BuildOptions, build
from diffscale.data.build.webdataset import key_of
from tests.support.datasets import png
from tests.support.sources import CLASSES, IMAGES
from tests.support.tables import write_samples, write_tar

SIX = range(6)
PICTURES = [png(image) for image in IMAGES]
MASK = png(np.zeros((16, 16, 3), np.uint8))


def flat(samples: Iterable[list[tuple[str, bytes]]]) -> list[tuple[str, bytes]]:
    return list(chain.from_iterable(samples))


def built(source: Path, out: Path, **choices) -> Dataset:
    build(BuildOptions(str(source), str(out), (16,), workers=0, **choices), show=False)
    return open_dataset(str(out))


def content(dataset: Dataset) -> dict[bytes, str]:
    pixels, labels = dataset.gather(np.arange(dataset.n))
    names = dataset.class_names or [""]
    return {x.tobytes(): names[int(y)] for x, y in zip(pixels.numpy(), labels, strict=True)}


def truth(rows, names=("0", "1", "2")) -> dict[bytes, str]:
    return {IMAGES[i].tobytes(): names[i % len(names)] for i in rows}


def labelled(i: int, key: str = "") -> list[tuple[str, bytes]]:
    key = key or f"{i:05d}"
    return [(f"{key}.png", PICTURES[i]), (f"{key}.cls", b"%d" % (i % 3))]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.png", ("a", "png")),
        ("x/a.mask.PNG", ("x/a", "mask.png")),
        ("a.0001.png", ("a.0001", "png")),
        ("a.v1.2020-01-05.cls.txt", ("a.v1.2020-01-05", "cls.txt")),
        ("x.y/a.png", ("x.y/a", "png")),
        ("a", ("a", "")),
        ("a.7z", ("a", "7z")),
    ],
)
def test_a_key_ends_before_the_extension_and_may_have_numbers_with_dots(name, key):
    assert key_of(name) == key


def test_the_files_of_a_sample_need_not_follow_each_other(tmp_path):
    members = flat(labelled(i) for i in SIX)
    random.Random(0).shuffle(members)
    assert content(built(write_tar(tmp_path / "mixed.tar", members), tmp_path / "mixed")) == truth(SIX)
    apart = sorted(members, key=lambda member: member[0].endswith("cls"))
    assert content(built(write_tar(tmp_path / "apart.tar", apart), tmp_path / "apart")) == truth(SIX)


def test_keys_with_dots_are_told_apart(tmp_path):
    names = ["a.0001", "a.0002", "2020.01.05", "b.one", "b.two", "c"]
    members = flat(labelled(i, names[i]) for i in SIX)
    assert content(built(write_tar(tmp_path / "a.tar", members), tmp_path / "out")) == truth(SIX)


def test_a_mask_is_no_training_image(tmp_path):
    members = flat([*labelled(i), (f"{i:05d}.mask.png", MASK)] for i in SIX)
    source = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"--image-column(.|\n)*mask.png, png"):
        built(source, tmp_path / "out")
    assert content(built(source, tmp_path / "out", image_column="png")) == truth(SIX)
    without = write_tar(tmp_path / "b.tar", [m for m in members if not m[0].endswith("cls")])
    with pytest.raises(UserError, match=r"--image-column(.|\n)*mask.png, png"):
        built(without, tmp_path / "none")
    assert content(built(without, tmp_path / "none", image_column="png")) == truth(SIX, [""])
    with pytest.raises(UserError, match=r"--image-column(.|\n)*cls, mask.png, png"):
        built(source, tmp_path / "other", image_column="jpg")


def test_one_label_of_several_images_is_not_lost(tmp_path):
    members = flat([(f"{i}.0.png", PICTURES[i]), (f"{i}.1.png", MASK), (f"{i}.cls", b"%d" % i)] for i in SIX)
    source = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"--image-column(.|\n)*0.png, 1.png"):
        built(source, tmp_path / "out")
    assert content(built(source, tmp_path / "out", image_column="0.png")) == truth(SIX, [*"012345"])


def test_equal_names_in_a_plain_tar_of_folders_are_images_of_their_own(tmp_path):
    members = [(f"ant/{i}.png", PICTURES[i]) for i in range(4)] + [
        ("ant/0.webp", png(IMAGES[4], "WEBP", lossless=True))
    ]
    assert content(built(write_tar(tmp_path / "a.tar", members), tmp_path / "out")) == truth(range(5), ["ant"])


def test_a_json_without_a_label_leaves_the_classes_to_the_folders(tmp_path):
    members = flat(
        [(f"{CLASSES[i % 3]}/{i}.png", PICTURES[i]), (f"{CLASSES[i % 3]}/{i}.json", b'{"w": 1}')] for i in SIX
    )
    assert content(built(write_tar(tmp_path / "a.tar", members), tmp_path / "out")) == truth(SIX, CLASSES)


@pytest.mark.parametrize(
    ("name", "data", "choice"),
    [
        ("cls", [b"0", b" 1\n", b"+2"], None),
        ("cls.txt", [b"0", b"1", b"2.0"], None),
        ("json", [b'{"label": 0}', b'{"cls": 1, "label": 1}', b'{"label": "2", "x": [1]}'], None),
        ("json", [b'{"kind": 0}', b'{"kind": 1}', b'{"kind": 2.0, "label": 9}'], "json.kind"),
        ("txt", [b"0", b"1", b"2"], "txt"),
        ("coarse.cls", [b"0", b"1", b"2"], "coarse.cls"),
    ],
)
def test_labels_in_several_forms(tmp_path, name, data, choice):
    members = flat([(f"{i}.png", PICTURES[i]), (f"{i}.{name}", data[i % 3])] for i in SIX)
    assert content(built(write_tar(tmp_path / "a.tar", members), tmp_path / "out", label_column=choice)) == truth(SIX)


def test_different_labels_under_a_key_are_refused_unless_one_is_chosen(tmp_path):
    members = flat([*labelled(i), (f"{i:05d}.json", json.dumps({"label": "x"}).encode())] for i in SIX)
    source = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError, match=r"--label-column(.|\n)*cls, json.label, none"):
        built(source, tmp_path / "out")
    assert content(built(source, tmp_path / "out", label_column="cls")) == truth(SIX)
    assert built(source, tmp_path / "x", label_column="json.label").class_names == ["x"]
    assert built(source, tmp_path / "none", label_column="none").num_classes == 0
    with pytest.raises(UserError, match="--label-column"):
        built(source, tmp_path / "wrong", label_column="txt")
    halves = [m for i, m in enumerate(members) if not m[0].endswith("cls" if int(m[0][:5]) < 3 else "json")]
    with pytest.raises(UserError, match=r"json.label, cls, none"):
        built(write_tar(tmp_path / "b.tar", halves), tmp_path / "b")


def test_samples_without_a_usable_label_are_listed(tmp_path):
    labels = [b"ant", b"-1", b"", b"\xff\xfe\xfa", b"x" * 2000, None, b"--1", "²".encode()]
    members = flat(([(f"{i}.png", PICTURES[i]), (f"{i}.cls", b or b"")] for i, b in enumerate(labels) if b is not None))
    source = write_tar(tmp_path / "a.tar", [*members, ("5.png", PICTURES[5]), ("9.cls", b"0")])
    dataset = built(source, tmp_path / "out")
    assert content(dataset) == {IMAGES[0].tobytes(): "ant", IMAGES[6].tobytes(): "--1", IMAGES[7].tobytes(): "²"}
    with open(tmp_path / "out" / "rejected.csv") as file:
        reasons = {row["image"]: row["reason"] for row in csv.DictReader(file)}
    assert {name for name in reasons if name.endswith("png") or "." not in name} >= {
        "1",
        "2",
        "3.png",
        "4.png",
        "5.png",
    }
    assert reasons["9.cls"] == "no image has its key"


def test_shards_of_folders_and_of_gzip_are_read(tmp_path):
    import gzip

    write_samples(tmp_path / "source" / "train" / "0.tar", range(12))
    write_samples(tmp_path / "source" / "val" / "0.tar", range(12, 24))
    for file in (tmp_path / "source").rglob("*.tar"):
        file.with_suffix(".tar.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    dataset = built(tmp_path / "source", tmp_path / "out")
    assert content(dataset) == truth(range(12), CLASSES)
    assert content(dataset.heldout) == truth(range(12, 24), CLASSES)


def test_shards_that_are_cut_off_are_refused(tmp_path):
    """A quarter of random cuts were accepted: tarfile takes a damaged header for the end of an archive."""
    whole = write_tar(tmp_path / "whole.tar", flat(labelled(i) for i in SIX)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + 512 * -(-last.size // 512)  # of the last file; zeros follow
    places = random.Random(0)
    cuts = [places.randrange(1, end) for _ in range(60)] + [512 * places.randrange(1, end // 512) for _ in range(20)]
    for cut in [*cuts, end]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="tar"):
            built(tmp_path / "cut.tar", tmp_path / "out")
    joined = tmp_path / "joined.tar"
    joined.write_bytes(whole + whole)
    with pytest.raises(UserError, match="joined"):
        built(joined, tmp_path / "out")
