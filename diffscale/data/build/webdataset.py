"""WebDataset: tars in which the files of one sample share a key, `00001.png` and `00001.cls`.

The library `webdataset` is not used. It groups only files that follow each other, takes a shard that ends in a header
for a whole one, joins all files whose names differ after their first dot, may unpickle members, and gives no offsets,
by which the tasks of a build read their images.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from diffscale.core.errors import UserError
from diffscale.data.build.decode import ImageError
from diffscale.data.build.items import BuildSource, Item, Reading
from diffscale.data.build.labels import LabelList
from diffscale.data.build.layout import Misplaced
from diffscale.data.build.names import is_image, printable, some
from diffscale.data.build.tree import Entry, Tree
from diffscale.data.format.hf_choices import ALL, NONE, Choices
from diffscale.data.format.hf_files import TableFile, roles, split_name
from diffscale.data.format.hf_labels import MOST_CHARACTERS
from diffscale.data.format.manifest import SplitName

TEXTS = ("cls", "cls.txt")  # extensions of files that are a label
IN_JSON = ("label", "cls")  # keys of a label in a .json
MOST_LABEL = 1 << 20  # bytes of a file with a label
WORD = re.compile(r"[a-z_]\w*", re.ASCII | re.IGNORECASE)  # part of an extension; a part of a key may be a number
WHOLE = re.compile(r"([+-]?[0-9]{1,18})(\.0+)?")


@dataclass
class Sample:
    """The files of one key: images and labels by their extensions, and how many files there are in all."""

    images: dict[str, Entry] = field(default_factory=dict)
    labels: dict[str, Entry] = field(default_factory=dict)
    files: int = 0


def key_of(name: str) -> tuple[str, str]:
    """Return (key, extension in lower case) of a file in a tar.

    The extension begins at the first dot of the last part of the path, as for the library, except that numbers in the
    middle belong to the key: `a.0001.mask.png` has the key `a.0001`.
    """
    folder, slash, file = name.rpartition("/")
    stem, *parts = file.split(".")
    while len(parts) > 1 and not all(WORD.fullmatch(part) for part in parts):
        stem = f"{stem}.{parts.pop(0)}"
    return folder + slash + stem, ".".join(parts).lower()


def is_webdataset(trees: Iterable[Tree], reading: Reading) -> bool:
    """Return whether tars are labelled samples: an image has a label of the same key, or a person names the label."""
    if reading.label_column not in (None, NONE) and not reading.labels:
        return True
    for tree in trees:
        images: set[str] = set()
        labels: dict[str, list[Entry]] = defaultdict(list)
        for entry in tree.files():
            key, extension = key_of(entry.name)
            if is_image(entry.name):
                images |= {key, _library_key(entry.name)[0]}
            elif _is_label(extension, reading):
                labels[key].append(entry)
        if any(_has_label(tree, entry) for key in labels if key in images for entry in labels[key]):
            return True
    return False


def _has_label(tree: Tree, entry: Entry) -> bool:
    """Return whether a file is a label, or a .json with one in it: others describe images in some other way."""
    if not entry.name.lower().endswith(".json"):
        return True
    try:
        content = json.loads(tree.read(entry)) if entry.size <= MOST_LABEL and not entry.problem else None
    except (ValueError, RecursionError, ImageError):
        return False
    return isinstance(content, dict) and any(name in content for name in IN_JSON)


def splits_of(uri: str, archives: list[str], source: BuildSource, reading: Reading) -> dict[str, SplitName | None]:
    """Return the split of each tar of a folder, None for all if none is held out; others are left out."""
    root = uri.rstrip("/") + "/"
    files = [TableFile(path, "", split_name(path.removeprefix(root))) for path in archives]
    used = roles(files, uri, Choices(split_names=reading.split_names, command=True))
    for file in files:
        if file.split not in used:
            source.left_out.append((file.uri.removeprefix(root), f"its split {file.split or '(no name)'} is not used"))
    held = "heldout" in used.values()
    return {file.uri: used[file.split] if held else None for file in files if file.split in used}


def one_image_each(tree: Tree, reading: Reading) -> Tree:
    """Return a tar without labels, in which images of other extensions than the chosen one have a problem.

    Raises UserError if most keys have several images and none is chosen: a mask must not become a training image.
    """
    column = reading.image_column
    if column == ALL:
        return tree
    if column is None:
        keys: dict[str, set[str]] = defaultdict(set)
        for entry in tree.files():
            if is_image(entry.name) and not entry.problem:
                key, extension = key_of(entry.name)
                keys[key].add(extension)
        several = Counter(tuple(sorted(found)) for found in keys.values() if len(found) > 1)
        if 2 * several.total() > len(keys):
            raise _several_images(reading, several.most_common(1)[0][0], f"most files of {tree.uri} have one name")
        return tree

    def files() -> Iterator[Entry]:
        for entry in tree.files():
            other = is_image(entry.name) and not entry.problem and _image_key(entry.name, column) is None
            yield entry._replace(problem=f"its extension is not {column}") if other else entry

    return replace(tree, files=files)


def sample_items(
    trees: Iterable[tuple[Tree, SplitName | None]], source: BuildSource, reading: Reading, given: LabelList | None
) -> Iterator[tuple[str, str | None, Item]]:
    """Yield (uri, split, item) of the images of tars, in the order of the first files of their keys.

    Labels are in `key.cls`, in `key.json` as `label` or `cls`, or where `reading` says; they need not be next to the
    image. Raises UserError for several images or different labels under a key unless one is chosen, and for a choice
    that no sample has.
    """
    columns: set[str] | None = None  # those of which every labelled sample has one
    extensions: set[str] = set()
    found = 0
    for tree, split in trees:
        samples = _samples(tree, source, reading, extensions)
        _check_orphans(samples, source, reading)
        for key, sample in samples.items():
            if len(sample.images) > 1 and reading.image_column != ALL:
                raise _several_images(reading, sorted(sample.images), f"{printable(key)} has several")
            for entry in sample.images.values():
                found += 1
                place: str | None = split
                label: str | None = None
                try:
                    if given is not None:
                        place, label = given.find(PurePosixPath(entry.name).parts, split)
                    elif reading.label_column != NONE:
                        labels = _labels(tree, sample, reading)
                        label = _only_label(labels, key, reading)
                        columns = _shared(columns, labels, key, reading) if labels else columns
                except (Misplaced, ImageError) as error:
                    source.refused.append((printable(entry.name), str(error)))
                    continue
                alone = sample.files > 1 and len(sample.images) == 1
                yield tree.uri, place, Item(printable(key if alone else entry.name), entry.where, label)
    asked = {"image_column": not found, "label_column": found > 0 and columns is None and given is None}
    for choice, is_missing in asked.items():
        if is_missing and getattr(reading, choice) not in (None, NONE, ALL):
            raise _choices(reading).ask(choice, sorted(extensions), f"file of that extension ({choice[:5]})")


def _samples(tree: Tree, source: BuildSource, reading: Reading, extensions: set[str]) -> dict[str, Sample]:
    """Return the samples of a tar by key. Adds the extensions that it has, and what is not used to `source`."""
    samples: dict[str, Sample] = defaultdict(Sample)
    unused: Counter[str] = Counter()
    for entry in tree.files():
        key, extension = key_of(entry.name)
        extensions.add(extension)
        chosen = reading.image_column if reading.image_column != ALL else None
        image_key = _image_key(entry.name, chosen) if is_image(entry.name) else None
        if entry.problem:
            source.refused.append((printable(entry.name), entry.problem))
        elif image_key is not None:
            images = samples[image_key].images
            extension = chosen or extension
            if extension in images:
                source.refused.append((printable(entry.name), f"{printable(images[extension].name)} has the same key"))
                continue
            images[extension] = entry
            samples[image_key].files += 1
        else:
            if _is_label(extension, reading):
                samples[key].labels[extension] = entry
            else:
                unused[extension] += 1
            samples[key].files += 1
    name = tree.uri.rsplit("/", 1)[-1]
    for extension, count in unused.items():
        source.left_out.append((f"{name}/*.{extension}", f"{count:,} files, neither images nor labels of samples"))
    return dict(item for key, sample in samples.items() for item in _divided(key, sample))


def _divided(key: str, sample: Sample) -> Iterator[tuple[str, Sample]]:
    """Yield a sample, or several if each image has a label of its own: `cat.a.jpg, cat.a.cls, cat.b.jpg, cat.b.cls`."""
    images = {extension.rpartition(".")[0]: entry for extension, entry in sample.images.items()}
    labels = {extension.rpartition(".")[0]: entry for extension, entry in sample.labels.items()}
    if len(sample.images) < 2 or "" in images or len(images) < len(sample.images) or images.keys() != labels.keys():
        yield key, sample
        return
    for middle, entry in images.items():
        label = labels[middle]
        endings = (entry.name.rpartition(".")[2].lower(), label.name.rpartition(".")[2].lower())
        yield f"{key}.{middle}", Sample({endings[0]: entry}, {endings[1]: label}, 2)


def _check_orphans(samples: dict[str, Sample], source: BuildSource, reading: Reading) -> None:
    """List labels without an image. Raises UserError if images may belong to one, `1.cls` to `1.0.png`."""
    orphans = {key: sample for key, sample in samples.items() if not sample.images}
    belong: dict[str, set[str]] = defaultdict(set)
    if any(sample.labels for sample in orphans.values()):
        for sample in samples.values():
            for entry in sample.images.values():
                key, extension = _library_key(entry.name)
                belong[key].add(extension)
    for key, sample in orphans.items():
        for entry in sample.labels.values():
            if key in belong:
                what = f"{printable(entry.name)} is the label of several"
                raise _several_images(reading, sorted(belong[key]), what)
            source.left_out.append((printable(entry.name), "no image has its key"))


def _library_key(name: str) -> tuple[str, str]:
    """Return the key up to the first dot, and the rest."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def _image_key(name: str, column: str | None) -> str | None:
    """Return the key of an image, or None if its extension is not the chosen one."""
    key, extension = key_of(name)
    if column is None or extension == column.lower():
        return key
    key, extension = _library_key(name)
    return key if extension == column.lower() else None


def _is_label(extension: str, reading: Reading) -> bool:
    column = reading.label_column
    if column is None or column == NONE:
        return extension in TEXTS or extension.rpartition(".")[2] in ("cls", "json")
    return extension == column or column.startswith(f"{extension}.")


def _labels(tree: Tree, sample: Sample, reading: Reading) -> dict[str, str | None]:
    """Return the labels of a sample by where they are: an extension, or `json.KEY`. Raises ImageError."""
    found: dict[str, str | None] = {}
    for extension, entry in sample.labels.items():
        if entry.size > MOST_LABEL:
            raise ImageError(f"the file {printable(entry.name)} has more than {MOST_LABEL:,} bytes")
        data = tree.read(entry)
        if extension.rpartition(".")[2] != "json":
            found[extension] = _of_text(data, entry)
            continue
        try:
            content = json.loads(data)
        except (ValueError, RecursionError):
            if reading.label_column is None and len(sample.labels) > 1:
                continue  # of another purpose, next to a label
            raise ImageError(f"the file {printable(entry.name)} is not JSON") from None
        wanted = IN_JSON if reading.label_column is None else (reading.label_column.removeprefix(f"{extension}."),)
        for name in wanted:
            if isinstance(content, dict) and name in content:
                found[f"{extension}.{name}"] = _of_json(content[name], entry)
    return found


def _of_text(data: bytes, entry: Entry) -> str | None:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ImageError(f"its label {printable(entry.name)} is not text in UTF-8") from None
    return _class(text, entry)


def _of_json(value: Any, entry: Entry) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise ImageError(f"its label in {printable(entry.name)} is a {type(value).__name__}, not one class")
    return _class(str(value).strip(), entry)


def _class(text: str, entry: Entry) -> str | None:
    """Return the class of a label, None for an empty one and for -1, the usual sign for none."""
    if len(text) > MOST_CHARACTERS:
        raise ImageError(f"its label in {printable(entry.name)} has more than {MOST_CHARACTERS:,} characters")
    whole = WHOLE.fullmatch(text)
    text = str(int(whole[1])) if whole else text
    return None if text in ("", "-1", "nan") else text


def _only_label(labels: dict[str, str | None], key: str, reading: Reading) -> str | None:
    values = {value for value in labels.values() if value is not None}
    if len(values) > 1:
        which = f"label under a key ({printable(key)} has {some([f'{k}: {v}' for k, v in labels.items()])})"
        raise _choices(reading).ask("label_column", [*labels, NONE], which)
    return next(iter(values), None)


def _shared(columns: set[str] | None, labels: dict[str, str | None], key: str, reading: Reading) -> set[str]:
    """Return the places of labels that all samples so far have. Raises UserError if there is none."""
    shared = set(labels) if columns is None else columns & set(labels)
    if not shared:
        which = f"place of labels (those of {printable(key)} are in another one)"
        raise _choices(reading).ask("label_column", [*sorted(columns or ()), *labels, NONE], which)
    return shared


def _several_images(reading: Reading, extensions: Iterable[str], what: str) -> UserError:
    return _choices(reading).ask("image_column", [*extensions, ALL], f"image under a key ({what})")


def _choices(reading: Reading) -> Choices:
    return Choices(image_column=reading.image_column, label_column=reading.label_column, command=True)
