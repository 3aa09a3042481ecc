"""Lists of labels: a CSV of a person's, or the dataset.json of StyleGAN and EDM inside a source."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.text import one_line
from diffscale.data.build.items import unreadable
from diffscale.data.build.layout import Misplaced
from diffscale.data.build.names import class_of, is_image, printable, some
from diffscale.data.format.split_names import split_of

LABELS_FILE = "dataset.json"
FILES = {
    *("file", "filename", "file_name", "filepath", "file_path", "path", "name", "id"),
    *("image", "image_name", "image_path", "image_file", "image_id", "img", "img_name", "img_path"),
}
LABELS = {
    *("label", "labels", "label_name", "label_id", "class", "classes", "class_name", "classname", "class_id"),
    *("category", "category_name", "category_id", "target", "y"),
}
SPLITS = {"split", "subset", "partition", "set"}
SETTING = "--labels"


@dataclass
class LabelList:
    """Labels of files by their paths, or by their names alone.

    place: the list, for messages
    labels: {path or name: class}; None if the list says that there are no labels
    splits: {path or name: split}, if the list has them
    entry: path in the source, if the list is a file of it; its paths then begin at its folder
    matched: {path or name in the list: the file of the source that it stands for}
    """

    place: str
    labels: dict[str, str] | None
    splits: dict[str, str] = field(default_factory=dict)
    entry: str = ""
    matched: dict[str, str] = field(default_factory=dict)

    def find(self, parts: tuple[str, ...], split: str | None) -> tuple[str | None, str | None]:
        """Return (split, class) of a file. Raises Misplaced if it is not in the list.

        parts: of the path in the source
        split: the split of its folder

        Raises UserError if the list means two files by one name, or if its split is not that of the folder.
        """
        if self.labels is None:
            return split, None
        base = len(PurePosixPath(self.entry).parts) - 1 if self.entry else 0
        name = class_of("/".join(parts[base:]))
        key = next((key for key in self._keys(name) if key in self.labels), None)
        if key is None:
            raise Misplaced("it is not in the list of labels")
        if self.matched.setdefault(key, name) != name:
            raise UserError(
                setting=SETTING,
                value=self.place,
                expected="paths in the source where several files have one name",
                reason=f"{key} is {self.matched[key]} and {name}",
            )
        listed = self.splits.get(key)
        if listed and split and listed != split:
            raise UserError(
                setting=SETTING,
                value=self.place,
                expected="one split for each image",
                reason=f"{name} is in a folder of {split} images and {listed} in the list",
                fix="--split-names none ignores the folders",
            )
        if not self.labels[key]:
            raise Misplaced("it has no label in the list of labels")
        return listed or split, self.labels[key]

    def _keys(self, name: str) -> Iterator[str]:
        """Yield what a list may call a file: its path, its name, and these without the extension."""
        last = name.rsplit("/", 1)[-1]
        yield from (name, last)
        yield from (str(PurePosixPath(name).with_suffix("")), PurePosixPath(last).stem)

    def notes(self, found: int, uri: str, refused: tuple[str, str] | None) -> list[str]:
        """Return sentences about entries that stand for no file. Raises UserError if none stands for one."""
        if self.labels is None:
            return [f"{self.place} says that the images have no labels"]
        missing = len(self.labels) - len(self.matched)
        if not found and missing and refused:
            raise UserError(
                setting=SETTING if not self.entry else "SOURCE",
                value=self.place,
                expected="paths below SOURCE, or names of files in it",
                reason=f"it has {next(iter(self.labels))}, and {uri} has {refused[0]} ({refused[1]})",
            )
        notes = [f"labels are from {self.place}"]
        if missing:
            absent = [key for key in self.labels if key not in self.matched]
            notes.append(f"{missing:,} files of that list are not in the source ({some(absent, 3)})")
        return notes


def edm_labels(data: bytes, place: str, entry: str) -> LabelList:
    """Return the labels in a dataset.json of StyleGAN or EDM: {"labels": [[file, class], ...]} or {"labels": null}."""
    expected = '"labels": [[file, class number from 0], ...], or null'
    try:
        pairs = json.loads(data)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise unreadable(place, expected, error) from None
    if pairs is None:
        return LabelList(place, None, entry=entry)
    labels: dict[str, str] = {}
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        valid = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int
        if not valid or pair[1] < 0:
            raise unreadable(place, expected, ValueError(f"it has {one_line(repr(pair), 80)}"))
        if labels.setdefault(_path(pair[0]), str(pair[1])) != str(pair[1]):
            raise unreadable(place, expected, ValueError(f"it has two classes for {pair[0]}"))
    return LabelList(place, labels, entry=entry)


def read_labels(uri: str, column: str | None = None) -> LabelList:
    """Return the labels of a CSV. Raises UserError if it cannot be read, or if its columns can be read in two ways.

    uri: of a CSV with a header, or with two columns, file and label; divided by commas, semicolons or tabs
    column: name of the column of labels; None takes the one that is named so
    """
    rows = _rows(uri)
    header, columns = _header(uri, rows, column)
    labels: dict[str, str] = {}
    splits: dict[str, str] = {}
    lines: dict[str, int] = {}
    width = len(rows[0][1])
    for line, row in rows[1:] if header else rows:
        if len(row) != width:
            raise _wrong(uri, f"{width} columns in every line, as in the first", f"line {line} has {len(row)}: {row}")
        file, label = _path(row[columns["file"]]), class_of(row[columns["label"]].strip())
        if not file:
            raise _wrong(uri, "a file in every line", f"line {line} is {row}")
        split = row[columns["split"]].strip() if "split" in columns else ""
        if file in labels and (labels[file], splits.get(file, "")) != (label, split):
            raise _wrong(uri, "one label for each file", f"{file} has two, in line {lines[file]} and line {line}")
        labels[file], lines[file] = label, line
        if split:
            splits[file] = split
    return LabelList(uri, labels, _splits(uri, splits))


def _path(name: str) -> str:
    return class_of(name.strip().replace("\\", "/").removeprefix("./"))


def _splits(uri: str, splits: dict[str, str]) -> dict[str, str]:
    """Return the split that each word of a column stands for; {} if it is no column of splits."""
    words = {word: split_of(word) for word in set(splits.values())}
    unknown = sorted(word for word, split in words.items() if split is None)
    if unknown and len(unknown) < len(words):
        raise _wrong(uri, "names of splits, such as train and val, in the column of splits", f"it has {some(unknown)}")
    return {} if unknown else {file: words[word] or "" for file, word in splits.items()}


def _rows(uri: str) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of each line that is not empty."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _wrong(uri, "a CSV in UTF-8", one_line(error), "save it as UTF-8") from None
    except OSError as error:
        raise _wrong(uri, "a CSV of files and labels", one_line(error)) from None
    first = text.split("\n", 1)[0]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=next((d for d in ",;\t" if d in first), ","), strict=True
    )
    rows: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((begin, row))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise _wrong(
            uri, "a CSV in which every quote is closed", f"the row that begins in line {begin}: {one_line(error)}"
        ) from None
    if not rows:
        raise _wrong(uri, "two columns, file and label, in every line", "the file is empty")
    return rows


def _header(uri: str, rows: list[tuple[int, list[str]]], column: str | None) -> tuple[bool, dict[str, int]]:
    """Return whether the first line is a header, and the number of the columns `file`, `label` and perhaps `split`."""
    first = [cell.strip() for cell in rows[0][1]]
    plain = [re.sub(r"[\s-]+", "_", cell.lower()) for cell in first]
    width = len(first)
    if width < 2:
        raise _wrong(uri, "two columns, file and label, in every line", f"a line is {first}")
    known = FILES | LABELS | SPLITS
    has_header = not any(is_image(cell) for cell in first) and (width > 2 or bool(set(plain) & known) or bool(column))
    if not has_header:
        if width > 2 or column:
            reason = f"its first line is {first}"
            raise _wrong(uri, "a first line with the names of the columns, if there are more than two", reason)
        return False, {"file": 0, "label": 1}
    if column is None:
        named = [i for i, name in enumerate(plain) if name in LABELS]
    else:
        named = [i for i, name in enumerate(first) if name == column]
        named = named or [i for i, name in enumerate(first) if name.lower() == column.lower()]
    files = [i for i, name in enumerate(plain) if name in FILES and (column is None or i not in named)]
    if len(files) != 1 and len(rows) > 1:
        shown = [i for i, cell in enumerate(rows[1][1][:width]) if is_image(_path(cell)) and i not in named]
        files = [i for i in files if i in shown] or shown if len(shown) else files
    if width == 2 and column is None and len(files) == 1:
        named = [1 - files[0]]
    if width == 2 and not files and len(named) == 1:
        files = [1 - named[0]]
    if len(named) != 1:
        raise UserError(
            setting="--label-column",
            value=column,
            expected=f"one of the columns of {uri}: {some(first, 20)}",
            reason=f"{'no column is' if not named else 'several columns are'} "
            + (f"named {column}" if column else f"named label, class or the like{_which(first, named)}"),
            fix="--label-column NAME says which holds the labels",
        )
    if len(files) != 1:
        raise _wrong(
            uri,
            "one column of files, named file, filename, path or image",
            f"its columns are {some(first, 20)}{_which(first, files)}",
        )
    split = [i for i, name in enumerate(plain) if name in SPLITS and i not in (named[0], files[0])]
    columns = {"file": files[0], "label": named[0]}
    return True, columns | ({"split": split[0]} if len(split) == 1 else {})


def _which(first: list[str], found: list[int]) -> str:
    return f" ({some([first[i] for i in found])})" if found else ""


def _wrong(uri: str, expected: str, reason: str, fix: str = "") -> UserError:
    return UserError(setting=SETTING, value=uri, expected=expected, reason=printable(reason), fix=fix)
