"""The same 24 images of three classes as every kind of source of a build.

`SOURCES` maps a kind to a function that writes it under a folder and returns its path. `SPLIT_SOURCES` does so for the
kinds that have splits; the truth about each image is then `SPLIT_TRUTH`. `TREES` maps a container to a function that
writes any files in it.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from tests.support.datasets import pictures, png

IMAGES = pictures(24, side=16)
CLASSES = ["ant", "bee", "cat"]


def image_name(i: int) -> str:
    return f"{CLASSES[i % 3]}/{i:02d}.png"


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (root / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tree" / name).write_bytes(data)
    return root / "tree"


def write_zip(root: Path, files: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(root / "tree.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return root / "tree.zip"


def write_tar(root: Path, files: Mapping[str, bytes], mode: Literal["w", "w:gz"] = "w") -> Path:
    target = root / ("tree.tar.gz" if mode == "w:gz" else "tree.tar")
    with tarfile.open(target, mode) as archive:
        for name, data in files.items():
            add_file(archive, name, data)
    return target


TREES: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {
    "folder": write_folder,
    "zip": write_zip,
    "tar": write_tar,
}
SPLIT_TRUTH = {image.tobytes(): ("train" if i < 18 else "heldout", CLASSES[i % 3]) for i, image in enumerate(IMAGES)}


def split_tree(train: str = "train", heldout: str = "val") -> dict[str, bytes]:
    """Return {path: PNG} of the 24 images, split/class/number.png."""
    return {
        f"{heldout if SPLIT_TRUTH[image.tobytes()][0] == 'heldout' else train}/{image_name(i)}": png(image)
        for i, image in enumerate(IMAGES)
    }


def make_split_csv(root: Path) -> Path:
    """Write a flat folder, and next to it a list of files, splits and labels."""
    write_folder(root, {f"{i:02d}.png": png(image) for i, image in enumerate(IMAGES)})
    rows = [f"{i:02d}.png,{','.join(SPLIT_TRUTH[image.tobytes()])}" for i, image in enumerate(IMAGES)]
    (root / "labels.csv").write_text("\n".join(["filename,split,label", *rows]))
    return root / "tree"


SPLIT_SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda root: write_folder(root, split_tree()),
    "zip": lambda root: write_zip(root, split_tree()),
    "tar": lambda root: write_tar(root, split_tree()),
    "tar.gz": lambda root: write_tar(root, split_tree(), "w:gz"),
    "csv": make_split_csv,
}


def make_folder(root: Path) -> Path:
    for i, image in enumerate(IMAGES):
        (root / image_name(i)).parent.mkdir(parents=True, exist_ok=True)
        (root / image_name(i)).write_bytes(png(image))
    (root / "notes.txt").write_text("not an image")
    return root


def make_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for i, image in enumerate(IMAGES):
            archive.writestr(image_name(i), png(image))
    return root / "images.zip"


def make_edm_zip(root: Path) -> Path:
    """Write a zip in the layout of EDM's dataset_tool: dataset.json has the labels."""
    with zipfile.ZipFile(root / "edm.zip", "w") as archive:
        files = [f"00000/img{i:08d}.png" for i in range(24)]
        for file, image in zip(files, IMAGES, strict=True):
            archive.writestr(file, png(image))
        archive.writestr("dataset.json", json.dumps({"labels": [[file, i % 3] for i, file in enumerate(files)]}))
    return root / "edm.zip"


def add_file(archive: tarfile.TarFile, file: str, data: bytes) -> None:
    info = tarfile.TarInfo(file)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def make_tar(root: Path, mode="w") -> Path:
    target = root / ("images.tar.gz" if mode == "w:gz" else "images.tar")
    with tarfile.open(target, mode) as archive:
        for i, image in enumerate(IMAGES):
            add_file(archive, image_name(i), png(image))
    return target


def make_webdataset(root: Path) -> Path:
    for shard in range(2):
        with tarfile.open(root / f"shard-{shard:03d}.tar", "w") as archive:
            for i in range(shard * 12, shard * 12 + 12):
                add_file(archive, f"{i:05d}.png", png(IMAGES[i]))
                add_file(archive, f"{i:05d}.cls", str(i % 3).encode())
    return root


def make_csv(root: Path) -> Path:
    for i, image in enumerate(IMAGES):
        (root / f"{i:02d}.png").write_bytes(png(image))
    (root / "labels.csv").write_text("file,label\n" + "".join(f"{i:02d}.png,{CLASSES[i % 3]}\n" for i in range(24)))
    return root


def make_hugging_face(kind: str) -> Callable[[Path], Path]:
    """Return a function that writes the images with `datasets`, as `arrow` or `parquet`."""

    def make(root: Path) -> Path:
        from datasets import ClassLabel, Dataset, Features
        from datasets import Image as ImageFeature

        features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
        rows = {"image": [{"bytes": png(x), "path": None} for x in IMAGES], "label": [i % 3 for i in range(24)]}
        data = Dataset.from_dict(rows, features=features)
        if kind == "arrow":
            data.save_to_disk(root / "saved", num_shards=2)
            return root / "saved"
        (root / "data").mkdir()
        data.to_parquet(root / "data" / "train-00000-of-00001.parquet", batch_size=7)
        return root

    return make


def make_npz(root: Path) -> Path:
    np.savez_compressed(root / "images.npz", images=IMAGES, labels=np.arange(24) % 3)
    return root / "images.npz"


def make_npy(root: Path) -> Path:
    np.save(root / "images.npy", IMAGES)
    return root / "images.npy"


SOURCES = {
    "folder": make_folder,
    "zip": make_zip,
    "edm zip": make_edm_zip,
    "tar": make_tar,
    "tar.gz": lambda root: make_tar(root, "w:gz"),
    "webdataset": make_webdataset,
    "csv": make_csv,
    "hugging face arrow": make_hugging_face("arrow"),
    "hugging face parquet": make_hugging_face("parquet"),
    "npz": make_npz,
    "npy": make_npy,
}
