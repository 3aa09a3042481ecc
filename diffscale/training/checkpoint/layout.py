"""Checkpoints of a run: what is in one, which ones are complete, which one is good, and which may go.

    checkpoints/images-000131072/
      model.safetensors  ema/halflife.safetensors  ema/std0.050.safetensors  optimizer/state.safetensors
      state.json  experiment.yaml  COMPLETE

COMPLETE is written last and holds the size and SHA-256 of every other file, so a folder without it does not exist and
a folder with it can be proven.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.training.checkpoint.tensors import (
    Damaged,
    FileInfo,
    checksum,
    group_files,
    groups_in,
    read_group,
)
from diffscale.training.ema import ema_name

if TYPE_CHECKING:
    from torch import Tensor

    from diffscale.config.experiment import Experiment

log = logging.getLogger(__name__)
COMPLETE = "COMPLETE"
_NAME = re.compile(r"/checkpoints/images-(\d{1,18})/?$")
_FILE = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")  # inside the checkpoint's folder
FORMAT = 1
FOR_RESUMING = ("model", "optimizer/state")


def folder_of(run_folder: str, images_seen: int) -> str:
    return storage.join(run_folder, "checkpoints", f"images-{images_seen:09d}")


def images_of(checkpoint: str) -> int:
    """Raises ValueError for a folder of another name."""
    found = _NAME.search(checkpoint)
    if found is None:
        raise ValueError(f"{checkpoint} is not named as a checkpoint")
    return int(found[1])


def list_checkpoints(run_folder: str) -> list[str]:
    """Complete ones, oldest first. Their files are not read: `verify` does that."""
    marks = storage.list_files(storage.join(run_folder, "checkpoints"), COMPLETE, recursive=True)
    found = (mark.removesuffix("/" + COMPLETE) for mark in marks)
    return sorted((folder for folder in found if _NAME.search(folder)), key=images_of)


def complete(checkpoint: str, files: dict[str, FileInfo]) -> None:
    """Makes it visible, or replaces its list of files; the last thing that is written."""
    text = json.dumps({"format": FORMAT, "files": {name: list(info) for name, info in sorted(files.items())}}, indent=1)
    storage.write_bytes(storage.join(checkpoint, COMPLETE), text.encode())


def files_of(checkpoint: str) -> dict[str, FileInfo]:
    """What COMPLETE lists. Raises Damaged."""
    try:
        data = json.loads(storage.read_bytes(storage.join(checkpoint, COMPLETE)))
        if data["format"] != FORMAT:
            raise Damaged(f"{checkpoint}: format {data['format']}, this diffscale reads {FORMAT}")
        files = {name: FileInfo(str(sha), int(count)) for name, (sha, count) in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{checkpoint}/{COMPLETE}: {error}") from None
    if strange := [name for name in files if not _FILE.fullmatch(name)]:  # `rotate` deletes what is listed
        raise Damaged(f"{checkpoint}/{COMPLETE}: it lists {strange[0]!r}, which is no file of a checkpoint")
    return files


def verify(checkpoint: str) -> None:
    """Reads every file. Raises Damaged naming the first one that is missing or whose checksum differs."""
    for name, info in files_of(checkpoint).items():
        try:
            found = checksum(storage.join(checkpoint, name))
        except OSError as error:
            if isinstance(error, FileNotFoundError) and name not in files_of(checkpoint):
                continue  # rotated away since the list was read
            raise Damaged(f"{checkpoint}/{name}: {error}") from None
        if found != info:
            raise Damaged(f"{checkpoint}/{name}: {found.bytes} bytes with another checksum, {info.bytes} were written")


def newest_good(run_folder: str, for_resuming: bool = True, until: int | None = None) -> str | None:
    """The newest one that is whole (with optimizer state, if it is to be resumed from, and not after `until` images).
    A damaged one is passed over, and the log says so."""
    for checkpoint in reversed(list_checkpoints(run_folder)):
        if until is not None and images_of(checkpoint) > until:
            continue
        try:
            names = files_of(checkpoint)
            if for_resuming and not any(name.startswith("optimizer/") for name in names):
                continue
            verify(checkpoint)
        except Damaged as error:
            log.warning("damaged checkpoint passed over, going on from the one before: %s", error)
            continue
        return checkpoint
    return None


def distrust(run_folder: str, position: int) -> None:
    """Takes back every checkpoint that has seen `position`: its image, or the checkpoint, was damaged. Files stay."""
    for checkpoint in list_checkpoints(run_folder):
        if images_of(checkpoint) > position:
            mark = storage.join(checkpoint, COMPLETE)
            storage.write_bytes(storage.join(checkpoint, "DISTRUSTED"), storage.read_bytes(mark))
            _delete([mark])


def read_state(checkpoint: str) -> dict[str, Any]:
    """state.json. Raises Damaged."""
    try:
        state = json.loads(storage.read_bytes(storage.join(checkpoint, "state.json")))
        if not isinstance(state, dict):
            raise ValueError("not a mapping")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{checkpoint}/state.json: {error}") from None


def read_weights(checkpoint: str, ema: str) -> dict[str, Tensor]:
    """The model's state with the weights of an average (`none`, `halflife`, `0.05`, `std0.050`, ...).

    Raises UserError when the run did not track that average.
    """
    name = ema_name(ema)
    tensors = read_group(checkpoint, "model")
    if name != "none":
        if not group_files(checkpoint, f"ema/{name}"):
            known = ["none", *groups_in(storage.join(checkpoint, "ema"))]
            raise UserError(setting="ema", value=ema, expected="one of the stored: " + ", ".join(known))
        tensors |= read_group(checkpoint, f"ema/{name}")
    return tensors


def read_experiment(checkpoint: str) -> Experiment:
    """The settings saved beside it. Raises UserError where the file is not one."""
    from diffscale.config.load import parse_yaml, validate

    uri = storage.join(checkpoint, "experiment.yaml")
    return validate(parse_yaml(storage.read_bytes(uri).decode(errors="replace"), uri))


def load_for_sampling(checkpoint: str, ema: str) -> tuple[Experiment, nn.Module, int, dict[str, Any]]:
    """(settings, model on the CPU in eval mode with those weights, images seen, the record's columns that training
    determines). Raises UserError for a damaged checkpoint or an average that was not tracked."""
    from diffscale.models import create_model

    try:
        verify(checkpoint)
        state, experiment = read_state(checkpoint), read_experiment(checkpoint)
        tensors = read_weights(checkpoint, ema)
        try:
            shape = {name: int(state["data"][name]) for name in ("resolution", "channels", "num_classes")}
            model = create_model(experiment.model.name, **shape, **experiment.model.arguments())
            model.load_state_dict(tensors)
            return experiment, model.eval(), int(state["images_seen"]), dict(state["record"])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise Damaged(f"{checkpoint}: {' '.join(str(error).split())[:300]}") from None
    except (Damaged, FileNotFoundError) as error:
        raise UserError(
            setting="CHECKPOINT",
            value=checkpoint,
            expected=f"an undamaged checkpoint ({error})",
            fix="use an earlier one of the run",
        ) from None


def save_settings(experiment: Experiment) -> bytes:
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False).encode()


# ---- rotation


@dataclass(frozen=True)
class Keep:
    """What to leave of each checkpoint: all of it, its weights, its averages, or nothing."""

    whole: set[int]
    weights: set[int]
    averages: bool  # of all others, for post-hoc EMA


def rotate(run_folder: str, keep: Keep) -> None:
    """Thins and deletes checkpoints. COMPLETE is shortened or deleted first, so no moment shows a folder with less
    than it lists."""
    for checkpoint in list_checkpoints(run_folder):
        images = images_of(checkpoint)
        if images in keep.whole:
            continue
        try:
            files = files_of(checkpoint)
        except Damaged:
            continue
        left = {n: i for n, i in files.items() if not n.startswith("optimizer/")}
        if images not in keep.weights:
            left = {n: i for n, i in left.items() if keep.averages and not n.startswith("model.")}
        if left == files:
            continue
        if left:
            complete(checkpoint, left)
            _delete(storage.join(checkpoint, name) for name in files if name not in left)
        else:
            _delete([storage.join(checkpoint, COMPLETE), *(storage.join(checkpoint, name) for name in files)])
            _delete_folder(checkpoint)


def delete_partial(checkpoint: str) -> None:
    """Removes a folder that was never completed."""
    if not storage.exists(storage.join(checkpoint, COMPLETE)):
        _delete_folder(checkpoint)


def _delete(uris: Iterable[str]) -> None:
    for uri in uris:
        fs, path = storage.filesystem(uri)
        try:
            fs.delete_file(path)
        except FileNotFoundError:
            continue


def _delete_folder(uri: str) -> None:
    fs, path = storage.filesystem(uri)
    try:
        fs.delete_dir(path)
    except (FileNotFoundError, OSError) as error:
        log.info("%s could not be removed: %s", uri, error)
