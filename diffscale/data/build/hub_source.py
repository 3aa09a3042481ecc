"""A dataset on Hugging Face's hub as a source: hf://OWNER/NAME[@REVISION][?config=&split=&image=&label=].

A build lists it in place. Each task fetches the files that it prepares into the hub's cache (core/hub_files.py), where
another build of that commit finds them, and the readers of tables, tars and folders read them from there.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from diffscale.core import hub
from diffscale.core.errors import UserError

_NAME = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^?@]+))?(?:\?(?P<query>.*))?"
)
_CHOICES = {"config": "config", "split": "split_names", "image": "image_column", "label": "label_column"}


def pin(source: str) -> tuple[str, dict[str, str]]:
    """Return (source, choices): the dataset at the commit that its revision is now, and the options that it sets.

    Choices have the names of BuildOptions. Raises UserError for what is no such address, an unknown choice, and a
    dataset that cannot be read.
    """
    found = _NAME.fullmatch(source)
    if found is None:
        raise UserError(
            setting="SOURCE", value=source, expected="hf://OWNER/NAME[@REVISION][?config=&split=&image=&label=]"
        )
    given = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    for name, value in given.items():
        if name not in _CHOICES or not value:
            raise UserError(setting="SOURCE", value=f"?{name}={value}", expected=f"{', '.join(_CHOICES)} with a name")
    pinned = hub.pinned("SOURCE", found["repo"], found["revision"], "dataset")
    choices = {_CHOICES[name]: f"train={value}" if name == "split" else value for name, value in given.items()}
    return f"hf://datasets/{found['repo']}@{pinned.commit}", choices
