"""From a `data.path` to a dataset: the embedded images, one of several resolutions, or the folder itself."""

from __future__ import annotations

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build.builtin import BUILTIN, builtin_dataset
from diffscale.data.format import hf_tables
from diffscale.data.format.cache import ShardCache
from diffscale.data.format.dataset import Dataset, available_resolutions
from diffscale.data.format.hf_choices import Choices
from diffscale.data.format.hf_dataset import NO_CHOICES, TableDataset, address, split_address
from diffscale.data.format.manifest import FILE, SplitName, read_manifest


def resolve(path: str, resolution: int | None, storage_uri: str, choices: Choices = NO_CHOICES) -> str:
    """Return the place that `open_dataset` takes. Raises UserError that names the valid values.

    path: the setting `data.path`: `builtin:emoji` or `builtin:few-emoji` (built under STORAGE/datasets on first use, at
        4 to 64 pixels), a folder built at one or several resolutions, or a Hugging Face dataset (a folder of Arrow or
        Parquet files, read unchanged)
    resolution: the setting `data.resolution`, in pixels; None takes the dataset's own, or its largest
    storage_uri: the setting `storage`
    choices: the settings `data.config`, `data.image_column`, `data.label_column` and `data.channels`, which only a
        Hugging Face dataset has
    """
    if path.startswith("builtin:"):
        _refuse(choices, path)
        if path not in BUILTIN:
            raise UserError(setting="data.path", value=path, expected=f"{', '.join(BUILTIN)}, a folder or a URI")
        return builtin_dataset(path, resolution, storage.check_absolute(storage_uri))
    path = storage.check_absolute(path, "data.path")
    if storage.exists(storage.join(path, FILE)):
        _refuse(choices, path)
        found = read_manifest(path).resolution
        if resolution not in (None, found):
            raise UserError(
                setting="data.resolution",
                value=resolution,
                expected=f"{found}, the resolution of {path}",
                fix=f"data.resolution={found}; for both: diffscale data build SOURCE DATASET --resolution {found} "
                f"--resolution {resolution}",
            )
        return path
    several = [] if path.endswith((".arrow", ".parquet")) else available_resolutions(path)
    if several:
        _refuse(choices, path)
        wanted = resolution if resolution is not None else several[-1]
        if wanted not in several:
            raise UserError(setting="data.resolution", value=resolution, expected=f"one of {several} in {path}")
        return storage.join(path, str(wanted))
    if hf_tables.is_dataset(path):
        return address(path, resolution, choices)
    if not storage.exists(path):
        raise UserError(setting="data.path", value=path, expected="a dataset folder", reason="the path does not exist")
    raise UserError(
        setting="data.path",
        value=path,
        expected="a dataset folder with a manifest.json, or Arrow or Parquet files",
        fix=f"python -m diffscale.data build {path} DATASET --resolution {resolution or 64}",
    )


def _refuse(choices: Choices, path: str) -> None:
    """Raise UserError for choices about a dataset in our format."""
    made = choices.made
    if made:
        name, value = made[0]
        raise UserError(
            setting=choices.option(name),
            value=value,
            expected="null",
            reason=f"{path} is in diffscale's format: columns and colours were chosen when it was built",
            fix=f"leave out {choices.option(name)}",
        )


def open_dataset(path: str, split: SplitName = "train", cache: ShardCache | None = None) -> Dataset:
    """Open a dataset.

    path: absolute path or URI, as `resolve` returns it
    split: `train` or `heldout`
    cache: where this node keeps shards of a remote dataset; None is the user's default cache

    Raises UserError for a folder that is no dataset, ShardError naming a missing or short shard.
    """
    path = storage.check_absolute(path, "data.path")
    if not storage.exists(storage.join(path, FILE)) and hf_tables.is_dataset(split_address(path)[0]):
        return TableDataset.open_tables(path, split)
    return Dataset.open(path, split, cache)
