"""Tables, tars and arrays of the 24 images of `sources.py` with splits: the first 18 are trained on, 6 are held out.

`SPLIT_SOURCES` maps a layout to a function that writes it under a folder and returns its path.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.datasets import png
from tests.support.sources import CLASSES, IMAGES, add_file

TRAIN, HELD = range(18), range(18, 24)
IMAGE = {"_type": "Image"}


def class_label(*names: str) -> dict[str, Any]:
    """Return the feature of a column of class numbers, as `datasets` stores it."""
    return {"_type": "ClassLabel", "names": list(names)}


def images(rows: Sequence[int]) -> pa.Array:
    """Return a column of these images."""
    return pa.array(
        [{"bytes": png(IMAGES[i]), "path": None} for i in rows],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )


def numbers(rows: Sequence[int]) -> list[int]:
    """Return the class numbers of these images."""
    return [i % 3 for i in rows]


def write_table(file: Path, columns: dict[str, Any], group: int = 7, **features: dict[str, Any]) -> Path:
    """Write a Parquet file. features: what `datasets` knows about the columns, if it wrote the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=group)
    return file


def with_features(file: Path, rows: Sequence[int]) -> None:
    columns = {"image": images(rows), "label": numbers(rows)}
    write_table(file, columns, image=IMAGE, label=class_label(*CLASSES))


def hub(root: Path) -> Path:
    """The hub's files: data/train-00000-of-00002.parquet."""
    with_features(root / "data" / "train-00000-of-00002.parquet", TRAIN[:10])
    with_features(root / "data" / "train-00001-of-00002.parquet", TRAIN[10:])
    with_features(root / "data" / "test-00000-of-00001.parquet", HELD)
    return root


def converted(root: Path) -> Path:
    """The hub's branch refs/convert/parquet: default/train/0000.parquet."""
    with_features(root / "default" / "partial-train" / "0000.parquet", TRAIN)
    with_features(root / "default" / "validation" / "0000.parquet", HELD)
    return root


def saved(root: Path) -> Path:
    """A DatasetDict that `save_to_disk` wrote."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    splits = {}
    for split, rows in (("train", TRAIN), ("test", HELD)):
        data = {"image": images(rows).to_pylist(), "label": numbers(rows)}
        splits[split] = Dataset.from_dict(data, features=features)
    DatasetDict(splits).save_to_disk(root / "saved")
    return root / "saved"


def declared(root: Path) -> Path:
    """Files whose names say nothing, which the front matter of README.md assigns to splits."""
    with_features(root / "a" / "1.parquet", TRAIN)
    with_features(root / "a" / "2.parquet", HELD)
    files = "  - split: train\n    path: a/1.parquet\n  - split: test\n    path: ['a/2*.parquet']\n"
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: all\n  data_files:\n{files}---\n# Ants\n")
    return root


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of (name, content)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            add_file(archive, name, data)
    return file


def write_samples(file: Path, rows: Sequence[int]) -> None:
    """Write WebDataset's samples `00001.png`, `00001.cls`."""
    samples = ([(f"{i:05d}.png", png(IMAGES[i])), (f"{i:05d}.cls", CLASSES[i % 3].encode())] for i in rows)
    write_tar(file, chain.from_iterable(samples))


def named_shards(root: Path) -> Path:
    for number, rows in enumerate((TRAIN[:9], TRAIN[9:])):
        write_samples(root / f"ants-train-{number:06d}.tar", rows)
    write_samples(root / "ants-val-000000.tar", HELD)
    return root


def shards_in_folders(root: Path) -> Path:
    write_samples(root / "train" / "000000.tar", TRAIN)
    write_samples(root / "test" / "000000.tar", HELD)
    return root


def keras_npz(root: Path) -> Path:
    """The names of Keras' mnist.npz."""
    names = np.array(CLASSES)[np.arange(24) % 3]
    np.savez(root / "a.npz", x_train=IMAGES[:18], y_train=names[:18], x_test=IMAGES[18:], y_test=names[18:])
    return root / "a.npz"


def medmnist_npz(root: Path) -> Path:
    """The names and shapes of MedMNIST: labels (n, 1), training, validation and test images."""
    names = np.array(CLASSES)[np.arange(24) % 3][:, None]
    parts = {"train": slice(0, 18), "val": slice(18, 20), "test": slice(20, 24)}
    arrays = {f"{split}_images": IMAGES[rows] for split, rows in parts.items()}
    np.savez(root / "a.npz", **arrays, **{f"{split}_labels": names[rows] for split, rows in parts.items()})
    return root / "a.npz"


def npz_files(root: Path) -> Path:
    names = np.array(CLASSES)[np.arange(24) % 3]
    np.savez(root / "train.npz", images=IMAGES[:18], labels=names[:18])
    np.savez(root / "heldout.npz", images=IMAGES[18:], labels=names[18:])
    return root


SPLIT_SOURCES: dict[str, Callable[[Path], Path]] = {
    "hub": hub,
    "converted": converted,
    "saved": saved,
    "declared": declared,
    "shards by name": named_shards,
    "shards in folders": shards_in_folders,
    "npz of keras": keras_npz,
    "npz of medmnist": medmnist_npz,
    "npz files": npz_files,
}
