"""Finds the files of a Hugging Face dataset: which configuration and which split each one belongs to.

Known layouts: `save_to_disk` (state.json next to .arrow streams, or dataset_dict.json over several splits), the hub's
`data/train-00000-of-00002.parquet`, `CONFIG/train/0000.parquet`, `configs` in the front matter of README.md, and
single files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.format.hf_choices import ALL, Choices
from diffscale.data.format.manifest import FILE, SplitName
from diffscale.data.format.split_names import WORDS, read_split_names

SUFFIXES = (".arrow", ".parquet")
WORD = re.compile(rf"(?:(?<=[^a-z])|^)({'|'.join(sorted(WORDS, key=len, reverse=True))})(?=$|[^a-z])")
NUMBERED = re.compile(r"^(.+?)[-_.]\d{5}-of-\d{5}(-[0-9a-f]+)?$")  # the name of a split in the hub's file names
SIDE_FILES = ("cache-", "tmp")  # written by `Dataset.map`
README_BYTES = 1 << 20


@dataclass(frozen=True)
class TableFile:
    """One file of a dataset.

    config: name of its configuration, empty if it has none
    split: its name in lower case, as the source spells it, or empty
    """

    uri: str
    config: str
    split: str


def is_dataset(uri: str) -> bool:
    """Return whether a folder or file holds Arrow or Parquet and is not a dataset of our format.

    A `metadata.parquet` describes the images of a folder (the hub's ImageFolder), which is therefore no table.
    """
    if uri.endswith(SUFFIXES):
        return storage.exists(uri)
    return not storage.exists(storage.join(uri, FILE)) and bool(_paths(uri))


def find_files(uri: str, choices: Choices) -> tuple[list[TableFile], list[tuple[str, str]]]:
    """Return the files of the chosen configuration, and (file, reason) of those left out.

    Raises UserError where several configurations or formats are found and none is chosen.
    """
    paths = _paths(uri)
    if not paths:
        raise UserError(setting=choices.place, value=uri, expected="Arrow or Parquet files of images")
    root = "" if uri.endswith(SUFFIXES) else uri.rstrip("/") + "/"
    inside = {path: path.removeprefix(root) if root else path.rsplit("/", 1)[-1] for path in paths}
    files = list(_declared(uri, inside)) if root else []
    if not files:
        saved = _saved(uri, inside)
        files = [_place(path, name, saved) for path, name in inside.items()]
    used = {file.uri for file in files}
    left_out = [(path, "no configuration in README.md names it") for path in paths if path not in used]
    chosen = _of_config(files, choices)
    if len({file.uri.rsplit(".", 1)[-1] for file in chosen}) > 1:
        raise UserError(
            setting=choices.place,
            value=uri,
            expected="files of one format",
            reason="there are both Arrow and Parquet files, perhaps of the same images",
            fix="give the folder or the file of one of them",
        )
    others = {file.uri: file.config for file in files} | {file.uri: "" for file in chosen}
    left_out += [(path, f"of the configuration {config}") for path, config in others.items() if config]
    return chosen, left_out


def roles(files: list[TableFile], place: str, choices: Choices) -> dict[str, SplitName]:
    """Return the splits that are used, {name: `train` or `heldout`}; the others are left out.

    Train is the split of that name, held out are validation and test. Without a split named train, the only other
    split is. Raises UserError if several could be.
    """
    names = sorted({file.split for file in files})
    given = read_split_names(choices.split_names)
    if given is not None:
        wanted = {name.lower(): split for name, split in given.items()} or dict.fromkeys(names, "train")
        used = {name: wanted[name] for name in names if name in wanted}
    else:
        used = {name: WORDS[name] for name in names if name in WORDS}
        others = [name for name in names if name not in WORDS]
        if "train" not in used.values() and len(others) == 1:
            used[others[0]] = "train"
        elif "train" not in used.values() and len(names) == 1:
            used = {names[0]: "train"}
    if "train" not in used.values():
        raise UserError(
            setting=choices.place,
            value=place,
            expected="a split named train, or one split alone",
            reason=f"its splits are {', '.join(name or '(no name)' for name in names)}",
            fix=f"--split-names train={names[0] or 'NAME'}" if choices.command else "give the file or folder of one",
        )
    return used


def _paths(uri: str) -> list[str]:
    if uri.endswith(SUFFIXES):
        return [uri]
    root = uri.rstrip("/") + "/"
    try:
        found = [f for f in storage.list_files(uri, recursive=True) if f.endswith(SUFFIXES)]
    except NotADirectoryError:  # a file of another kind
        return []
    return [f for f in found if not _is_aside(f.removeprefix(root))]


def _is_aside(name: str) -> bool:
    *folders, file = name.split("/")
    return file.startswith(SIDE_FILES) or file == "metadata.parquet" or any(f.startswith(".") for f in folders)


def split_name(name: str) -> str:
    """Return the name of the split in a path below a dataset, in lower case: the last word for one, or empty."""
    words = WORD.findall(name.lower())
    if words:
        return words[-1]
    numbered = NUMBERED.match(name.lower().rsplit("/", 1)[-1].rsplit(".", 1)[0])
    return numbered[1] if numbered else ""


def _saved(uri: str, inside: dict[str, str]) -> set[str]:
    """Return the folders that `DatasetDict.save_to_disk` wrote, in which each folder is a split."""
    folders = {name.rpartition("/")[0].rpartition("/")[0] for name in inside.values() if name.count("/")}
    return {f for f in folders if storage.exists(storage.join(uri, *filter(None, (f, "dataset_dict.json"))))}


def _place(path: str, name: str, saved: set[str]) -> TableFile:
    above, _, folder = name.rpartition("/")[0].rpartition("/")
    if folder and above in saved:
        return TableFile(path, _config_of(f"{above}/"), folder.lower())
    return TableFile(path, _config_of(name), split_name(name))


def _config_of(name: str) -> str:
    """Return the folders of a file that are neither a split nor a number: `cropped` of `cropped/train/0000.parquet`."""
    kept = []
    for folder in name.split("/")[:-1]:
        named = WORD.search(folder.lower()) is not None
        rest = WORD.sub("", folder.lower()).strip("-_. ") if named else folder
        if rest and rest not in ("data", "partial") and not rest.isdigit():  # partial-train: the hub's own conversion
            kept.append(rest)
    return "/".join(kept)


def _of_config(files: list[TableFile], choices: Choices) -> list[TableFile]:
    configs = sorted({file.config for file in files})
    if choices.config is None:
        if len(configs) > 1:
            names = [config or "(no folder)" for config in configs]
            join = f"choose one, or join all: {choices.option('config')}{' ' if choices.command else '='}'{ALL}'"
            raise choices.ask("config", names, "configuration", join)
        return files
    chosen = {file.uri: file for file in files if fnmatchcase(file.config, choices.config)}
    if not chosen:
        raise choices.ask("config", [config for config in configs if config], "configuration")
    return list(chosen.values())


def _declared(uri: str, inside: dict[str, str]) -> Iterator[TableFile]:
    """Yield the files that `configs` in the front matter of README.md names, by its patterns."""
    for config in _configs(uri):
        name, data = config.get("config_name", ""), config.get("data_files")
        entries = data if isinstance(data, list) else [data]
        if isinstance(data, dict):
            entries = [{"split": split, "path": path} for split, path in data.items()]
        for entry in entries:
            entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
            patterns = entry.get("path")
            for pattern in patterns if isinstance(patterns, list) else [patterns]:
                if isinstance(pattern, str):
                    match = _glob(pattern)
                    split = str(entry.get("split")).lower()
                    yield from (TableFile(path, str(name), split) for path, n in inside.items() if match.fullmatch(n))


def _parse(text: str) -> Any:
    """Return what YAML says. Aliases are refused: a few of them stand for more entries than fit into memory."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise yaml.YAMLError("an alias")
    return yaml.safe_load(text)


def _configs(uri: str) -> list[dict[str, Any]]:
    try:
        fs, path = storage.filesystem(storage.join(uri, "README.md"))
        with fs.open_input_stream(path) as file:
            text = file.read(README_BYTES).decode(errors="replace")
        found = _parse(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, IndexError, ValueError, RecursionError, yaml.YAMLError):
        return []
    configs = found.get("configs") if isinstance(found, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _glob(pattern: str) -> re.Pattern[str]:
    """Return a pattern of paths as a regular expression: `**` crosses folders, `*` and `?` do not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))
