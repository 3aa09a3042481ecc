"""The rules for the names of files in a source: which are images of it, which are hidden, unsafe or unprintable."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from pathlib import PurePosixPath

from diffscale.data.build.decode import IMAGE_SUFFIXES

SIDE_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "#recycle", "system volume information"}
SIDE_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "icon\r"}
NOT_READ = {  # formats of images that we do not read
    *(".jfif", ".jpe", ".heic", ".heif", ".jxl", ".tga", ".svg", ".psd", ".exr", ".hdr", ".dds", ".ico"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raw"),
}


def why_no_image(name: str) -> str:
    """Return why a file of a source is not one of its images, by its path in the source; empty for an image."""
    folder, _, file = name.rpartition("/")
    if folder and (reason := _why_no_folder(folder)):
        return reason
    if file.startswith("."):
        return "a hidden file"
    lower = file.lower()
    if lower in SIDE_FILES:
        return "a file of an operating system"
    stem, dot, end = lower.rpartition(".")
    suffix = dot + end if stem and end else ""
    if suffix in IMAGE_SUFFIXES:
        return ""
    if suffix in NOT_READ:
        return f"images with the extension {suffix} are not read"
    return f"{printable(suffix)} is not an extension of images" if suffix else "it has no extension"


@lru_cache(maxsize=1024)
def _why_no_folder(path: str) -> str:
    """Return why nothing in a folder is an image of the source; empty if files in it can be."""
    for folder in parts_of(path):
        if folder.startswith(".") and folder != "..":
            return f"in the hidden folder {printable(folder)}"
        if folder.lower() in SIDE_FOLDERS:
            return f"in {folder}, a folder of an operating system"
    return ""


@lru_cache(maxsize=1024)
def parts_of(path: str) -> tuple[str, ...]:
    """Return the names in a path."""
    return PurePosixPath(path).parts


def is_image(name: str) -> bool:
    """Return whether a path in a source names one of its images."""
    return not why_no_image(name)


def is_unread_image(name: str) -> bool:
    """Return whether a path names an image, visible and in a format that we do not read."""
    return why_no_image(name).startswith("images with")


def is_unsafe(name: str, original: str = "") -> bool:
    """Return whether a member of an archive points outside of it; such a name must not be used, not even as a class.

    original: the stored name, if the reader of the archive changes it
    """
    stored = original or name
    outside = name.startswith("/") or "\\" in stored or "\0" in stored or ".." in PurePosixPath(name).parts
    return outside or (len(name) > 1 and name[1] == ":")


def printable(name: str) -> str:
    """Return a file name as valid Unicode: bytes that are not UTF-8 become `\\xe9`."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a pair of UTF-16, from JSON
        return name.encode("utf-8", "backslashreplace").decode()


def class_of(folder: str) -> str:
    """Return the class that a folder stands for: its name, composed (NFC), so that two systems' names are equal."""
    return unicodedata.normalize("NFC", printable(folder))


def shown(name: str) -> str:
    """Return a name for a terminal: printable, with control characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in printable(name))


def some(names: list[str], most: int = 6) -> str:
    """Return the first of some names as text."""
    text = ", ".join(shown(name) for name in names[:most])
    return f"{text} and {len(names) - most:,} more" if len(names) > most else text
