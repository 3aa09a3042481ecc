"""The names that people give to the splits of a dataset, in folders, files and columns."""

from __future__ import annotations

import re

from diffscale.core.errors import UserError
from diffscale.data.format.manifest import SplitName

WORDS: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"), "heldout"),
    **dict.fromkeys(("heldout", "holdout"), "heldout"),
}
AROUND = ("images", "image", "imgs", "img", "data", "dataset", "set", "split")  # words that say nothing about the split


def split_of(name: str) -> SplitName | None:
    """Return the split that a name stands for, or None: `Train`, `val2017`, `held-out`, `test_set`, `images_train`.

    A name with any other word in it (`train_station`) stands for none.
    """
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word]
    if (joined := "".join(words)) in WORDS:  # held-out
        return WORDS[joined]
    left = [word.removesuffix("set") or word for word in words if word not in AROUND]
    return WORDS.get(left[0]) if len(left) == 1 else None


def mentioned(name: str) -> SplitName | None:
    """Return the split of which a name holds a word, whatever other words it has: `ILSVRC2012_img_train`."""
    found = {WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in WORDS}
    return found.pop() if len(found) == 1 else None


def read_split_names(text: str | None) -> dict[str, SplitName] | None:
    """Return {name: split} of `--split-names`: `train=A,heldout=B,heldout=C`. `none` gives {}: no name is a split.

    None stays None: the usual names decide. Raises UserError for anything else, or for no training split.
    """
    if text is None:
        return None
    if text.strip().lower() == "none":
        return {}
    pairs = [part.partition("=") for part in text.split(",")]
    names: dict[str, SplitName] = {}
    for split, _, name in pairs:
        if split.strip() not in ("train", "heldout") or not name.strip():
            raise _wrong(text, f"{split.strip()!r} is neither train=NAME nor heldout=NAME")
        if names.setdefault(name.strip(), split.strip()) != split.strip():  # type: ignore[arg-type]
            raise _wrong(text, f"{name.strip()!r} is both")
    if "train" not in names.values():
        raise _wrong(text, "no name is for train")
    return names


def _wrong(text: str, reason: str) -> UserError:
    return UserError(
        setting="--split-names",
        value=text,
        expected="train=NAME,heldout=NAME (each as often as needed), or none",
        reason=reason,
    )
