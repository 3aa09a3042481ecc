"""Checkpoints of a run on disk: their files, which of them are complete and undamaged, and which rotation deletes.

    checkpoints/images-000131072/
      model.safetensors  ema/halflife.safetensors  ema/std0.050.safetensors  optimizer/state.safetensors
      state.json  experiment.yaml  COMPLETE

COMPLETE is written last and holds the size and SHA-256 of every other file: a folder without it is not a checkpoint,
and a folder with it can be verified. torch.distributed.checkpoint is not used because its metadata is a pickle.
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
from diffscale.core.hashing import Digest, digest_of
from diffscale.core.text import one_line
from diffscale.training.checkpoint.state import local_rows, sharded_like
from diffscale.training.checkpoint.tensors import (
    CheckpointDamaged,
    Rows,
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
_FILE = re.compile(r"([A-Za-z0-9_-][A-Za-z0-9._-]*/)?[A-Za-z0-9_-][A-Za-z0-9._-]*")  # inside the folder
_PART = re.compile(r"\.(\d{5})-of-\d{5}\.safetensors$")
FORMAT = 1


def folder_of(run_folder: str, images_seen: int) -> str:
    """Return the checkpoint folder of a run at a number of images."""
    return storage.join(run_folder, "checkpoints", f"images-{images_seen:09d}")


def run_of(checkpoint: str) -> str:
    """Return the run's folder of a checkpoint."""
    return checkpoint.rpartition("/checkpoints/")[0]


def images_of(checkpoint: str) -> int:
    """Return the images seen at a checkpoint. Raises ValueError for a folder with another kind of name."""
    found = _NAME.search(checkpoint)
    if found is None:
        raise ValueError(f"{checkpoint} is not named as a checkpoint")
    return int(found[1])


def list_checkpoints(run_folder: str) -> list[str]:
    """Return a run's complete checkpoints, oldest first, without reading their files (`verify` does)."""
    marks = storage.list_files(storage.join(run_folder, "checkpoints"), COMPLETE, recursive=True)
    found = (mark.removesuffix("/" + COMPLETE) for mark in marks)
    return sorted((folder for folder in found if _NAME.search(folder)), key=images_of)


def complete(checkpoint: str, files: dict[str, Digest]) -> None:
    """Publish the checkpoint by writing COMPLETE, or update its file list."""
    text = json.dumps({"format": FORMAT, "files": {name: list(info) for name, info in sorted(files.items())}}, indent=1)
    storage.write_bytes(storage.join(checkpoint, COMPLETE), text.encode())


def files_of(checkpoint: str) -> dict[str, Digest]:
    """Return the files that COMPLETE lists. Raises CheckpointDamaged."""
    try:
        data = json.loads(storage.read_bytes(storage.join(checkpoint, COMPLETE)))
        if data["format"] != FORMAT:
            raise CheckpointDamaged(f"{checkpoint}: format {data['format']}, this diffscale reads {FORMAT}")
        files = {name: Digest(str(sha), int(count)) for name, (sha, count) in data["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointDamaged(f"{checkpoint}/{COMPLETE}: {error}") from None
    if strange := [name for name in files if not _FILE.fullmatch(name)]:  # `rotate` deletes what is listed
        raise CheckpointDamaged(f"{checkpoint}/{COMPLETE}: it lists {strange[0]!r}, not a checkpoint's file")
    return files


def verify(checkpoint: str) -> None:
    """Read every file. Raises CheckpointDamaged naming the first one that is missing or whose checksum differs."""
    for name, info in files_of(checkpoint).items():
        verify_file(checkpoint, name, info)


def verify_file(checkpoint: str, name: str, written: Digest) -> None:
    """Read a file. Raises CheckpointDamaged if it is missing, unless rotation has removed it, or differs."""
    try:
        found = digest_of(storage.join(checkpoint, name))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and name not in files_of(checkpoint):
            return  # rotation deleted it after the list was read
        raise CheckpointDamaged(f"{checkpoint}/{name}: {error}") from None
    check_digest(checkpoint, name, found, written)


def check_digest(checkpoint: str, name: str, found: Digest, written: Digest) -> None:
    """Raise CheckpointDamaged if what was read of a file is not what was written."""
    if found != written:
        raise CheckpointDamaged(
            f"{checkpoint}/{name}: {found.bytes} bytes with another checksum, {written.bytes} were written"
        )


def writer_of(name: str) -> int | None:
    """Return the rank that wrote a file with slices of tensors, None for a file without."""
    found = _PART.search(name)
    return int(found[1]) if found else None


def newest_good(run_folder: str, for_resuming: bool = True, until: int | None = None) -> str | None:
    """Return the newest undamaged checkpoint, or None. The log names each damaged checkpoint that is skipped.

    for_resuming: require optimizer state
    until: images seen at most
    """
    for checkpoint in reversed(list_checkpoints(run_folder)):
        if until is not None and images_of(checkpoint) > until:
            continue
        try:
            names = files_of(checkpoint)
            if for_resuming and not any(name.startswith("optimizer/") for name in names):
                continue
            verify(checkpoint)
        except CheckpointDamaged as error:
            log.warning("skipped a damaged checkpoint, using the one before it: %s", error)
            continue
        return checkpoint
    return None


def invalidate_checkpoints_from(run_folder: str, position: int) -> None:
    """Unpublish every checkpoint trained on data at or after `position` (their files are kept for inspection)."""
    for checkpoint in list_checkpoints(run_folder):
        if images_of(checkpoint) > position:
            mark = storage.join(checkpoint, COMPLETE)
            storage.write_bytes(storage.join(checkpoint, "DISTRUSTED"), storage.read_bytes(mark))
            _delete([mark])


def read_state(checkpoint: str) -> dict[str, Any]:
    """Return the content of state.json. Raises CheckpointDamaged."""
    try:
        state = json.loads(storage.read_bytes(storage.join(checkpoint, "state.json")))
        if not isinstance(state, dict):
            raise ValueError("not a mapping")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{checkpoint}/state.json: {error}") from None


def read_weights(checkpoint: str, ema: str) -> dict[str, Tensor]:
    """Return the model's state with the weights of an average.

    Raises UserError if the run did not track the average.

    ema: none, halflife, or a relative width such as 0.05 or std0.050
    """
    return read_group(checkpoint, "model") | (_read_average(checkpoint, ema) or {})


def load_weights(model: nn.Module, checkpoint: str, ema: str) -> None:
    """Load the weights of an average into a model: every parameter is the average's, buffers are the model's.

    Of a sharded model each rank reads its rows. Raises UserError if the run did not track the average,
    CheckpointDamaged if the average lacks a parameter.
    """
    state = model.state_dict()

    def rows(name: str, _: tuple[int, ...]) -> tuple[int, int] | None:
        return local_rows(state[name]) if name in state else None

    average = _read_average(checkpoint, ema, rows)
    if average is not None:
        missing = [name for name, _ in model.named_parameters() if name not in average]
        if missing:
            raise CheckpointDamaged(f"{checkpoint}: the average {ema} lacks {missing[0]}")
    found = read_group(checkpoint, "model", rows) | (average or {})
    model.load_state_dict({name: sharded_like(state[name], t) if name in state else t for name, t in found.items()})


def _read_average(checkpoint: str, ema: str, rows: Rows | None = None) -> dict[str, Tensor] | None:
    """Return the tensors of an average, None for none. Raises UserError if the run did not track it."""
    name = ema_name(ema)
    if name == "none":
        return None
    if not group_files(checkpoint, f"ema/{name}"):
        known = ["none", *groups_in(storage.join(checkpoint, "ema"))]
        raise UserError(setting="ema", value=ema, expected="one of the stored: " + ", ".join(known))
    return read_group(checkpoint, f"ema/{name}", rows)


def read_experiment(checkpoint: str) -> Experiment:
    """Return the settings saved in a checkpoint. Raises UserError if they are invalid."""
    from diffscale.config.load import parse_yaml, validate  # import cost

    uri = storage.join(checkpoint, "experiment.yaml")
    return validate(parse_yaml(storage.read_bytes(uri).decode(errors="replace"), uri))


def load_for_sampling(checkpoint: str, ema: str) -> tuple[Experiment, nn.Module, int, dict[str, Any]]:
    """Return the settings, the model, the images seen, and the record columns that training determines.

    The model is on the CPU in eval mode and carries the weights of the average `ema`. Raises UserError for a damaged
    checkpoint or an average that the run did not track.
    """
    from diffscale.config.factory import model_for  # import cost

    try:
        verify(checkpoint)
        state, experiment = read_state(checkpoint), read_experiment(checkpoint)
        try:
            shape = {name: int(state["data"][name]) for name in ("resolution", "channels", "num_classes")}
            model = model_for(experiment, **shape)
            load_weights(model, checkpoint, ema)
            return experiment, model.eval(), int(state["images_seen"]), dict(state["record"])
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise CheckpointDamaged(f"{checkpoint}: {one_line(error, 300)}") from None
    except (CheckpointDamaged, FileNotFoundError) as error:
        raise UserError(
            setting="CHECKPOINT",
            value=checkpoint,
            expected="an undamaged checkpoint",
            reason=str(error),
            fix="use an earlier checkpoint of the run",
        ) from None


def save_settings(experiment: Experiment) -> bytes:
    """Return experiment.yaml."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False).encode()


# ---- rotation


@dataclass(frozen=True)
class RetentionPolicy:
    """What rotation keeps of each checkpoint: all of it, its weights, its averages, or nothing."""

    whole: set[int]  # images seen of the checkpoints to keep unchanged
    weights: set[int]  # images seen of the checkpoints to keep without their optimizer state
    averages: bool  # whether to keep the averages of all other checkpoints, for post-hoc EMA


def rotate(run_folder: str, policy: RetentionPolicy) -> None:
    """Delete checkpoints, or the parts of them that the policy does not keep.

    COMPLETE is shortened or deleted first, so a folder never holds less than it lists.
    """
    for checkpoint in list_checkpoints(run_folder):
        images = images_of(checkpoint)
        if images in policy.whole:
            continue
        try:
            files = files_of(checkpoint)
        except CheckpointDamaged:
            continue
        left = {n: i for n, i in files.items() if not n.startswith("optimizer/")}
        if images not in policy.weights:
            left = {n: i for n, i in left.items() if policy.averages and not n.startswith("model.")}
        if left == files:
            continue
        if left:
            complete(checkpoint, left)
            _delete(storage.join(checkpoint, name) for name in files if name not in left)
        else:
            _delete([storage.join(checkpoint, COMPLETE), *(storage.join(checkpoint, name) for name in files)])
            storage.delete_folder(checkpoint)


def delete_partial(checkpoint: str) -> None:
    """Delete the folder of a checkpoint that was never completed."""
    if not storage.exists(storage.join(checkpoint, COMPLETE)):
        storage.delete_folder(checkpoint)


def _delete(uris: Iterable[str]) -> None:
    for uri in uris:
        fs, path = storage.filesystem(uri)
        try:
            fs.delete_file(path)
        except FileNotFoundError:
            continue
