"""WebDataset: tars in which the files of one sample share a key, `00001.png` and `00001.cls`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import PurePosixPath

from diffscale.data.build.items import BuildSource, Item
from diffscale.data.build.labels import LabelList
from diffscale.data.build.layout import Misplaced
from diffscale.data.build.names import is_image, printable
from diffscale.data.build.tree import Entry, Tree

LABEL_FILES = ("cls", "json", "cls.txt")
MOST_LABEL = 1 << 20  # bytes of a file with a label


def key_of(name: str) -> tuple[str, str]:
    """Return (key, extension) of a file: the key ends at the first dot of the last part of the path."""
    suffix = name.rsplit("/", 1)[-1].partition(".")[2]
    return (name[: len(name) - len(suffix) - 1], suffix) if suffix else (name, "")


def is_webdataset(entries: Iterable[Entry]) -> bool:
    """Return whether some image of a tar shares its key with a file of its label."""
    images, labels = set(), set()
    for entry in entries:
        key, suffix = key_of(entry.name)
        if suffix in LABEL_FILES:
            labels.add(key)
        elif is_image(entry.name):
            images.add(key)
    return not images.isdisjoint(labels)


def sample_items(tree: Tree, source: BuildSource, given: LabelList | None) -> Iterator[tuple[str, str | None, Item]]:
    """Yield (uri, split, item) of the images of a tar. Their labels are in `key.cls` or `key.json`."""
    for key, group in groupby(tree.files(), key=lambda entry: key_of(entry.name)[0]):
        yield from _sample(tree, key, list(group), source, given)


def _sample(
    tree: Tree, key: str, group: list[Entry], source: BuildSource, given: LabelList | None
) -> Iterator[tuple[str, str | None, Item]]:
    label: str | None = None
    for entry in group:
        suffix = key_of(entry.name)[1]
        if entry.problem or suffix not in LABEL_FILES or entry.size >= MOST_LABEL:
            continue
        data = tree.read(entry)
        if suffix == "json":
            try:
                found = json.loads(data)
            except (ValueError, RecursionError):
                continue
            value = found.get("label", found.get("cls")) if isinstance(found, dict) else None
            label = str(value) if label is None and isinstance(value, int | str) else label
        else:
            text = data.decode("utf-8", "replace").strip()
            label = str(int(text)) if text.lstrip("-").isdigit() else text
    for entry in group:
        if entry.problem:
            source.refused.append((printable(entry.name), entry.problem))
        elif is_image(entry.name):
            parts = PurePosixPath(entry.name).parts
            try:
                found_label = label if given is None else given.find(parts, None)[1]
            except Misplaced as error:
                source.refused.append((printable(entry.name), str(error)))
                continue
            name = key if len(group) > 1 else entry.name
            yield tree.uri, None, Item(printable(name), entry.where, found_label)
