"""What the levels of folders of a tree of images mean: which is that of the splits, which that of the classes.

The same code decides it for folders, zips and tars, from the number of images in each folder. Where two readings are
possible it raises a UserError that says what it saw and which option decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from diffscale.core.errors import UserError
from diffscale.data.build.items import Reading
from diffscale.data.build.names import class_of, some
from diffscale.data.format.split_names import mentioned, read_split_names, split_of

Counts = Mapping[tuple[str, ...], int]  # images directly in each folder, by the parts of its path
Role = Callable[[str], str | None]

IMAGES = {"image", "images", "img", "imgs", "jpegimages", "photos", "pictures", "rgb"}
PAIRED = {
    *("mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "segmentations"),
    *("groundtruth", "ground_truth", "gt", "depth", "depths"),
}


@dataclass(frozen=True)
class Layout:
    """The meaning of the levels of folders; level 0 is the first below the source.

    split: level of the folders of splits; None without splits
    label: level of the folders of classes; None without classes
    fixed: {level: the one folder that is used there}
    names: {folder: split}; None is the usual names
    """

    split: int | None = None
    label: int | None = None
    fixed: dict[int, str] = field(default_factory=dict)
    names: Mapping[str, str] | None = None

    def role(self, folder: str) -> str | None:
        return split_of(folder) if self.names is None else self.names.get(folder)

    def place(self, folders: tuple[str, ...]) -> tuple[str | None, str | None]:
        """Return (split, class) of an image in these folders. Raises Misplaced if it has no place."""
        for level, name in self.fixed.items():
            if len(folders) <= level or folders[level] != name:
                raise Misplaced(f"not in the folder {name} of --folders", chosen=True)
        split = label = None
        if self.split is not None:
            if len(folders) <= self.split:
                raise Misplaced("it lies next to the folders of the splits, in none of them")
            split = self.role(folders[self.split])
            if split is None:
                raise Misplaced(f"its folder {folders[self.split]} is no split of --split-names", chosen=True)
        if self.label is not None:
            if len(folders) <= self.label:
                raise Misplaced("it has no label: it lies next to the folders of the classes, in none of them")
            label = class_of(folders[self.label])
        return split, label


class Misplaced(Exception):
    """An image whose folders have no meaning in the layout. chosen: because a person chose that."""

    def __init__(self, reason: str, chosen: bool = False) -> None:
        super().__init__(reason)
        self.chosen = chosen


@dataclass
class _Folder:
    """One folder at a level: images in all, directly in it, and in each folder directly below it."""

    images: int = 0
    direct: int = 0
    inner: dict[str, int] = field(default_factory=dict)


def _look(counts: Counts, level: int) -> tuple[int, dict[str, _Folder]]:
    """Return the images above a level, and the folders at it (those of one name are one)."""
    loose, folders = 0, dict[str, _Folder]()
    for parts, images in counts.items():
        if len(parts) <= level:
            loose += images
            continue
        folder = folders.setdefault(parts[level], _Folder())
        folder.images += images
        if len(parts) == level + 1:
            folder.direct += images
        else:
            folder.inner[parts[level + 1]] = folder.inner.get(parts[level + 1], 0) + images
    return loose, folders


def find_layout(counts: Counts, uri: str, reading: Reading, labelled: bool = False) -> Layout:
    """Return the layout of a tree.

    counts: images directly in each folder
    uri: the source, for messages
    labelled: a list gives the labels, so that folders are no classes

    Raises UserError if two readings are possible, or if a choice in `reading` does not fit.
    """
    names = read_split_names(reading.split_names)
    if reading.folders is not None:
        found = _by_pattern(counts, uri, reading.folders, names)
    elif names:
        found = _by_names(counts, uri, names)
    else:
        found = _Guess(counts, uri, names is None, labelled).layout()
    return Layout(found.split, None, found.fixed, found.names) if labelled else found


def _by_pattern(counts: Counts, uri: str, pattern: str, names: Mapping[str, str] | None) -> Layout:
    words = pattern.strip("/").split("/")
    places = {word: [i for i, w in enumerate(words) if w == word] for word in ("split", "class")}
    if not all(words) or any(len(levels) > 1 for levels in places.values()):
        raise UserError(
            setting="--folders",
            value=pattern,
            expected="levels divided by /, each split, class, * or the name of a folder; split and class once at most",
        )
    layout = Layout(
        split=next(iter(places["split"]), None),
        label=next(iter(places["class"]), None),
        fixed={i: word for i, word in enumerate(words) if word not in ("split", "class", "*")},
        names=names,
    )
    fitting = [f for f in counts if all(len(f) > i and f[i] == name for i, name in layout.fixed.items())]
    least = max((level for level in (layout.split, layout.label) if level is not None), default=-1)
    if not any(len(f) > least for f in fitting):
        raise _no_fit("--folders", pattern, f"{least + 1} levels of folders with images", counts)
    if layout.split is not None and names is None:
        unknown = sorted({f[layout.split] for f in fitting if len(f) > layout.split and not split_of(f[layout.split])})
        if unknown:
            raise UserError(
                setting="--folders",
                value=pattern,
                expected="names of splits at the level split, such as train and val",
                reason=f"it has {some(unknown)}",
                fix="say which they are: --split-names train=NAME,heldout=NAME",
            )
    return layout


def _by_names(counts: Counts, uri: str, names: Mapping[str, str]) -> Layout:
    """Return the layout in which these folders are splits, wherever they are."""
    deepest = max(map(len, counts), default=0)
    for level in range(deepest):
        seen = {f[level] for f in counts if len(f) > level}
        if not seen & names.keys():
            continue
        if missing := names.keys() - seen:
            raise _no_fit("--split-names", some(sorted(missing)), "folders with images", counts, level)
        chosen = {f: n for f, n in counts.items() if len(f) > level and f[level] in names}
        above = {f[:level] for f in chosen}
        if len(above) == 1:
            return Layout(level, _label_below(chosen, level), names=names)
        if len({f[: level - 1] for f in above}) == 1:
            return Layout(level, level - 1, names=names)
        raise UserError(
            setting="SOURCE",
            value=uri,
            expected="one reading of its folders",
            reason=f"the folders of --split-names are in {some(sorted('/'.join(f) for f in above))}",
            fix="--folders says what each level is, for example --folders '*/class/split'",
        )
    raise _no_fit("--split-names", some(sorted(names)), "folders with images", counts)


def _no_fit(setting: str, value: str, expected: str, counts: Counts, level: int = 0) -> UserError:
    seen = sorted({f[level] for f in counts if len(f) > level})
    return UserError(
        setting=setting,
        value=value,
        expected=expected,
        reason=f"the source has {some(seen)}" if seen else "the source has no folders with images",
    )


def _label_below(counts: Counts, split: int) -> int | None:
    """Return the level of the classes below that of the splits, or None if images are directly in these."""
    level = split + 1
    while True:
        groups: dict[str, dict[str, _Folder]] = {}
        for name in {f[split] for f in counts}:
            inside = {f: n for f, n in counts.items() if f[split] == name}
            loose, groups[name] = _look(inside, level)
            if loose and len(groups[name]) == 1:
                return level
        if not any(groups.values()):
            return None
        lone = [next(iter(folders.items())) for folders in groups.values() if len(folders) == 1]
        wrapped = len(lone) == len(groups) and all(not f.direct or split_of(name) for name, f in lone)
        if not wrapped:
            return level
        level += 1  # one folder in each split, and no image directly in it: train/images/cat


class _Guess:
    """The layout that the names of the folders suggest; with labels from a list, only their splits matter."""

    def __init__(self, counts: Counts, uri: str, with_splits: bool, labelled: bool) -> None:
        self.counts, self.uri, self.labelled = counts, uri, labelled
        self.role: Role = split_of if with_splits else _none
        self.hint: Role = mentioned if with_splits else _none

    def layout(self) -> Layout:
        level = 0
        while True:
            loose, folders = _look(self.counts, level)
            splits = {name: role for name in folders if (role := self.role(name))}
            if splits:
                return self.with_splits(level, loose, folders, splits)
            if not folders:
                return Layout()
            inner = {role for folder in folders.values() for name in folder.inner if (role := self.role(name))}
            if len(folders) > 1:
                return self.checked(self.with_classes(level, folders, inner), loose)
            name, only = next(iter(folders.items()))
            if only.direct and not inner:
                if len(only.inner) > 1 and not self.labelled:
                    self.refuse(
                        f"{name} holds {only.direct:,} images and the folders {some(sorted(only.inner))}",
                        f"--folders class makes {name} one class; --folders '*/class' makes those folders classes",
                    )
                return self.checked(Layout(label=level), loose)
            level += 1  # a folder around everything

    def with_splits(self, level: int, loose: int, folders: dict[str, _Folder], splits: dict[str, str]) -> Layout:
        """Return the layout with splits at this level."""
        others = sorted(folders.keys() - splits.keys())
        names = ",".join(f"{role}={name}" for name, role in sorted(splits.items()))
        if others:
            self.refuse(
                f"it has folders named after splits ({some(sorted(splits))}) next to others with images "
                f"({some(others)})",
                f"--split-names {names} uses those and leaves the others out; --split-names none makes all of them "
                "classes",
            )
        if "train" not in splits.values():
            self.refuse(
                f"it has {some(sorted(splits))} for images held out, and no folder for training"
                + (f"; {loose:,} images are in none of them" if loose else ""),
                f"give the folder itself as SOURCE, or --split-names train={sorted(splits)[0]}"
                + ("; --folders '*' uses all images without splits and classes" if loose else ""),
            )
        inner = {name for folder in folders.values() for name in folder.inner if self.role(name)}
        repeated = all(
            len(folder.inner) == 1 and self.role(next(iter(folder.inner))) == splits[name]
            for name, folder in folders.items()
        )
        if inner and not repeated:
            self.refuse(
                f"folders named after splits are at two levels: {some(sorted(splits))} and, below, "
                f"{some(sorted(inner))}",
                "--folders says which level it is, for example --folders '*/split/class' or split/class",
            )
        below = {f: n for f, n in self.counts.items() if len(f) > level}
        return self.checked(Layout(level, _label_below(below, level)), loose)

    def with_classes(self, level: int, folders: dict[str, _Folder], inner: set[str]) -> Layout:
        """Return the layout with classes at this level, and perhaps splits in each of them."""
        seen = {name.lower() for name in folders}
        if (pictures := seen & IMAGES) and (paired := seen & PAIRED) and not self.labelled:
            self.refuse(
                f"it has {some(sorted(pictures))} and {some(sorted(paired))}, which look like pairs of images",
                f"--folders {sorted(pictures)[0]}/class (or {sorted(pictures)[0]}/split/class) uses that folder alone; "
                "--folders class makes all of them classes",
            )
        hints = {role for name in folders if (role := self.hint(name))}
        if hints == {"train", "heldout"}:
            likely = ",".join(f"{role}={name}" for name in sorted(folders) if (role := self.hint(name)))
            self.refuse(
                f"the names of its folders speak of splits: {some(sorted(folders))}",
                f"--split-names {likely} if they are; --split-names none if they are classes",
            )
        everywhere = all(
            folder.inner and not folder.direct and all(self.role(name) for name in folder.inner)
            for folder in folders.values()
        )
        if everywhere and "train" in inner:
            deeper = sorted({f[level + 2] for f in self.counts if len(f) > level + 2})
            if len(deeper) > 1 and not self.labelled:
                self.refuse(
                    f"below the splits in {some(sorted(folders))} are the folders {some(deeper)}",
                    "--folders class/split, or --folders '*/split/class', says which of them are the classes",
                )
            return Layout(level + 1, level)
        if "heldout" in inner:
            where = sorted(
                f"{name}/{below}" for name, folder in folders.items() for below in folder.inner if self.role(below)
            )
            self.refuse(
                f"folders named after splits are in some of its folders: {some(where)}",
                "--folders class/split reads them as the splits of each class; --split-names none as parts of it",
            )
        for deep in range(level + 2, max(map(len, self.counts))):
            found = {f[deep] for f in self.counts if len(f) > deep and self.role(f[deep])}
            if {self.role(name) for name in found} == {"train", "heldout"}:
                self.refuse(
                    f"folders named after splits ({some(sorted(found))}) are {deep + 1} levels deep",
                    "--folders says what each level is, for example --folders 'class/*/split'",
                )
        return Layout(label=level)

    def checked(self, layout: Layout, loose: int) -> Layout:
        """Return the layout unless at least half of the images would have no place in it."""
        total = sum(self.counts.values())
        has_folders = layout.split is not None or (layout.label is not None and not self.labelled)
        if has_folders and loose and 2 * loose >= total:
            outside = "splits" if layout.split is not None else "classes"
            self.refuse(
                f"{loose:,} of its {total:,} images lie next to the folders of the {outside}, in none of them",
                "--folders '*' uses all of them without classes; else move them into a folder",
            )
        return layout

    def refuse(self, reason: str, fix: str) -> None:
        raise UserError(setting="SOURCE", value=self.uri, expected="one reading of its folders", reason=reason, fix=fix)


def _none(name: str) -> str | None:
    return None
