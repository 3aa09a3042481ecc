"""Trees of images: folders, zips and tars are lists of paths, and one reader finds their splits and classes.

Two passes over the files of a tree: the first counts the images in each folder, from which `find_layout` decides; the
second yields them. So that neither holds the files in memory, a tree is a function that lists them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from diffscale.data.build.decode import ImageError
from diffscale.data.build.items import BuildSource, Item, Reading, unreadable
from diffscale.data.build.labels import LABELS_FILE, LabelList, edm_labels
from diffscale.data.build.layout import Layout, Misplaced, find_layout
from diffscale.data.build.names import is_unread_image, parts_of, printable, why_no_image


class Entry(NamedTuple):
    """A file of a tree.

    name: path below the source, with /; bytes that are not UTF-8 are surrogates
    where: see `Item`
    size: bytes
    time: of its last change in ns, or its CRC in a zip
    problem: why it cannot be used, whatever it is; empty if it can
    """

    name: str
    where: Any
    size: int = 0
    time: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Tree:
    """A source as a list of files.

    uri: the file or folder
    files: lists them, always in the same order
    read: returns the bytes of one
    """

    uri: str
    files: Callable[[], Iterable[Entry]]
    read: Callable[[Entry], bytes]


def tree_items(
    tree: Tree, source: BuildSource, reading: Reading, given: LabelList | None
) -> Iterator[tuple[str, str | None, Item]]:
    """Yield (uri, split, item) of each image. Fills `refused`, `left_out` and `notes` of the source.

    given: labels from a list of a person's

    Raises UserError if two readings are possible, or if no image has a label in the list.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    lists: dict[tuple[str, ...], Entry] = {}
    for entry in tree.files():
        if entry.problem:
            continue
        folder, _, file = entry.name.rpartition("/")
        if not why_no_image(entry.name):
            counts[parts_of(folder)] += 1
        elif file == LABELS_FILE and not why_no_image(f"{folder}/image.png"):
            lists[parts_of(folder)] = entry
    given = given or _enclosed_labels(tree, lists, counts)
    layout = find_layout(counts, tree.uri, reading, given is not None)
    source.notes += _notes(layout, counts)
    place = lru_cache(maxsize=1024)(layout.place)
    found = 0
    for entry in tree.files():
        name = printable(entry.name)
        no_image = why_no_image(entry.name)
        if given is not None and (given.entry == entry.name or given.place == entry.where):
            continue
        if why := entry.problem or no_image:
            usable = not no_image or is_unread_image(entry.name)
            (source.refused if usable else source.left_out).append((name, why))
            continue
        folder, _, file = entry.name.rpartition("/")
        try:
            split, label = place(parts_of(folder))
            if given is not None:
                split, label = given.find((*parts_of(folder), file), split)
        except Misplaced as error:
            (source.left_out if error.chosen else source.refused).append((name, printable(str(error))))
            continue
        found += 1
        yield tree.uri, split, Item(name, entry.where, label)
    if given is not None:
        source.notes += given.notes(found, tree.uri, next(iter(source.refused), None))


def _enclosed_labels(
    tree: Tree, lists: dict[tuple[str, ...], Entry], counts: Counter[tuple[str, ...]]
) -> LabelList | None:
    """Return the labels of the dataset.json around all images, if there is one."""
    around = [folder for folder in lists if all(images[: len(folder)] == folder for images in counts)]
    if not around:
        return None
    entry = lists[max(around, key=len)]
    place = f"{tree.uri}/{printable(entry.name)}"
    try:
        return edm_labels(tree.read(entry), place, entry.name)
    except (OSError, ImageError) as error:
        raise unreadable(place, "a list of labels", error) from None


def _notes(layout: Layout, counts: Counter[tuple[str, ...]]) -> list[str]:
    """Return sentences about folders whose meaning a person might not expect."""
    notes = []
    levels = [level for level in (layout.split, layout.label) if level is not None]
    first, last = min(levels, default=0), max(levels, default=-1)
    if first and not layout.fixed and len({f[:first] for f in counts if len(f) > first}) == 1:
        around = next(f[:first] for f in counts if len(f) > first)
        notes.append(f"{printable('/'.join(around))}/ is around everything and has no meaning")
    if layout.label is not None:
        deeper = sum(images for folder, images in counts.items() if len(folder) > last + 1)
        if deeper:
            example = printable("/".join(next(f for f in counts if len(f) > last + 1)))
            notes.append(f"{deeper:,} images are in folders below those of the classes ({example}), which are ignored")
    return notes


def class_names(labels: Iterable[str | None]) -> list[str]:
    """Return the class names in the order of their numbers: the labels that occur, by value if all are numbers."""
    known = {label for label in labels if label is not None}
    if all(label.removeprefix("-").isdecimal() and label.isascii() and len(label) < 20 for label in known):
        return sorted(known, key=lambda label: (int(label), label))
    return sorted(known)
