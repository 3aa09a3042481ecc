"""Files of a dataset on Hugging Face's hub: hf://datasets/OWNER/NAME@COMMIT/FILE.

A file is read in place, in ranges, until `keep` has fetched it into the hub's own cache, where `datasets` finds it too.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfFileSystem, constants, try_to_load_from_cache

log = logging.getLogger(__name__)

LEFT_FREE = 5e9  # bytes of the cache's disk: the dataset that is being built may need them
_FILE = re.compile(r"(?:hf://)?datasets/(?P<repo>[^/@]+/[^/@]+)@(?P<commit>[0-9a-f]{40})/(?P<name>.+)")


class HubFiles(HfFileSystem):
    """The hub as a filesystem that opens what is in the cache from there."""

    def _open(self, path: str, mode: str = "rb", *args: Any, **options: Any) -> Any:
        found = _FILE.fullmatch(path)
        local = _cached(found) if found is not None and mode == "rb" else None
        return super()._open(path, mode, *args, **options) if local is None else open(local, "rb")


def keep(uri: str, files: HfFileSystem, api: Any) -> None:
    """Fetch a file into the cache unless it is there, or leave it on the hub if the cache's disk has no room for it.

    An interrupted transfer continues at its byte, and several processes of a machine fetch a file once. Raises the
    hub's errors.
    """
    found = _FILE.fullmatch(uri)
    if found is None or _cached(found) is not None:
        return
    if files.info(uri)["size"] + LEFT_FREE > _free():
        log.warning("%s is read in place and not kept: the disk of %s has no room", uri, constants.HF_HUB_CACHE)
        return
    api.hf_hub_download(found["repo"], found["name"], revision=found["commit"], repo_type="dataset")


def _cached(found: re.Match[str]) -> str | None:
    local = try_to_load_from_cache(found["repo"], found["name"], revision=found["commit"], repo_type="dataset")
    return local if isinstance(local, str) else None


def _free() -> int:
    """Return the free bytes where the cache is or will be."""
    cache = Path(constants.HF_HUB_CACHE).absolute()
    return shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
