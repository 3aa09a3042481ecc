"""The result row: one metric of one evaluation of one checkpoint, with what made it and what it cost.

A run's folder holds one immutable JSON file per row (`records/<record_id>.json`), so writing a row twice changes
nothing, concurrent writers are safe and a report can be recomputed at any time from these files alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffscale.core import storage
from diffscale.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1
RECORDS_FILE = "records.jsonl"
"""Name of a file that holds the rows of many runs, one line of JSON each."""

Endpoint = Literal["constant", "inverse_sqrt", "decayed", "mid_decay"]


class Record(BaseModel):
    """One row. The order here is the order of the CSV's columns; the descriptions are the README's table."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=True, frozen=True)

    schema_version: int = Field(SCHEMA_VERSION, description="version of this table")
    record_id: str = Field(description="hash of run_id, images_seen, EMA, sampler, n, sample seed, reference, metric")
    run_id: str = Field(description="hash of everything that changes the weights")
    run_name: str = Field(description="the run's name")
    created: str = Field(description="UTC time of the evaluation, ISO 8601")

    model: str = Field(description="backbone: unet, edm2, uvit, rin, dit, jit, hdit")
    parameters: int = Field(description="trainable parameters")
    schedule: str = Field(description="noise schedule")
    interpolant: str = Field(description="vp, linear or ve")
    prediction: str = Field(description="eps, x0, v, u or F")
    weighting: str = Field(description="loss weighting")
    input_scale: float = Field(description="Chen's b")
    dataset: str = Field(description="name of the training set")
    dataset_hash: str = Field(description="content hash of the training images")
    dataset_lossy: bool = Field(description="a source was lossy (JPEG), which limits FID")
    train_resolution: int = Field(description="side in pixels of the training images")
    seed: int = Field(description="training seed")
    global_batch: int = Field(description="images per optimisation step")
    precision: str = Field(description="bf16, fp16, tf32 or fp32")

    images_seen: int = Field(description="training images so far, the run's clock")
    epochs: float = Field(description="images_seen / images in the training set")
    endpoint: Endpoint = Field(
        description="state of the learning rate here: constant, inverse_sqrt, decayed, mid_decay"
    )
    ema: str = Field(description="which weights: none, halflife, std0.050, ...")
    forward_macs: float = Field(description="multiply-adds of one forward pass of one image")
    flops_per_image: float = Field(description="counted FLOPs to train on one image (forward + backward)")
    train_flops: float = Field(description="flops_per_image x images_seen: the compute axis")
    device_seconds: float = Field(description="seconds of training x devices, evaluation left out")
    device: str = Field(description="what it trained on")
    devices: int = Field(description="how many of them")
    launches: int | None = Field(None, description="times that the training was started or resumed up to here")
    energy_joules: float | None = Field(None, description="measured by NVML, empty where it is not")
    cost: float | None = Field(None, description="device-hours x the price in the settings")
    train_loss: float | None = Field(None, description="mean training loss since the last evaluation")
    val_loss: float | None = Field(None, description="loss on held-out images with fixed noise")
    val_loss_by_logsnr: list[float] | None = Field(None, description="the same in quartiles of logsnr, low to high")

    metric: str = Field(description="fid, kid, fd_efficientnet_lite0, precision, ...; `fid` is only ever the real one")
    value: float = Field(description="distance of the samples to the training images at eval_resolution")
    value_low: float | None = Field(None, description="lower end of the 95 % interval")
    value_high: float | None = Field(None, description="upper end of the 95 % interval")
    value_heldout: float | None = Field(None, description="the same distance to held-out images")
    value_native: float | None = Field(None, description="the same distance at the training resolution")
    memorisation: float | None = Field(None, description="share of samples nearer to a training image than usual")
    network: str = Field(description="feature network")
    resize: str = Field(description="how images reach the network's size")
    eval_resolution: int = Field(description="common side in pixels at which samples and reference are compared")
    reference: str = Field(description="hash of the reference images, their resolution and resize")
    n_generated: int = Field(description="generated images")
    n_reference: int = Field(description="reference images")
    solver: str = Field(description="sampler")
    nfe: int = Field(description="network evaluations per image")
    guidance_scale: float = Field(1.0, description="1 is no guidance")
    sampler: str = Field(description="all sampler settings, canonical JSON")
    sample_seed: int = Field(description="seed of the samples")
    sampling_flops: float = Field(description="FLOPs to generate one image")
    evaluated_on: Literal["training workers", "own workers"] = Field(description="where the evaluation ran")
    warning: str = Field("", description="what to keep in mind about this value")

    commit: str = Field(description="source commit, or hash of the package source")
    dirty: bool = Field(description="uncommitted changes were present")
    versions: dict[str, str] = Field(description="versions of diffscale, torch, ray, timm, ...")
    settings: dict[str, Any] = Field(description="every setting of the run, dotted")


GROUP = [
    "network",
    "reference",
    "eval_resolution",
    "resize",
    "n_generated",
    "n_reference",
    "sampler",
    "metric",
]
"""Values are comparable only where all of these agree (DECISIONS 1)."""


def identify(**parts: object) -> str:
    """A 16-digit hash of named JSON values, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record_id(
    *,
    run_id: str,
    images_seen: int,
    ema: str,
    sampler: str,
    n_generated: int,
    sample_seed: int,
    reference: str,
    metric: str,
    eval_resolution: int,
) -> str:
    return identify(
        run_id=run_id,
        images_seen=images_seen,
        ema=ema,
        sampler=sampler,
        n=n_generated,
        seed=sample_seed,
        reference=reference,
        metric=metric,
        eval_resolution=eval_resolution,
    )


def write_record(run_folder: str, record: Record) -> str:
    """Appends the row durably; returns its URI. Writing it twice is a no-op."""
    uri = storage.join(run_folder, "records", f"{record.record_id}.json")
    if not storage.exists(uri):
        storage.write_bytes(uri, json.dumps(_as_json(record), indent=1, allow_nan=False).encode())
    return uri


def read_records(places: Iterable[str]) -> list[Record]:
    """Every row found under run folders, folders of runs, or record files. Duplicates are given once.

    Raises UserError that names the file when one is damaged, or the place when nothing is there.
    """
    rows: dict[str, Record] = {}
    for place in places:
        place = storage.check_absolute(place, "RUNS")
        is_file = place.endswith((".json", ".jsonl"))
        files = [place] if is_file else [f for f in storage.list_files(place, recursive=True) if _holds_records(f)]
        if not storage.exists(place):
            raise UserError(setting="RUNS", value=place, expected="a run's folder, a folder of runs or a record file")
        for file in files:
            for row in read_records_file(file) if file.endswith(".jsonl") else [read_record(file)]:
                rows[row.record_id] = row
    return _in_order(rows.values())


def write_records_file(uri: str, records: Iterable[Record]) -> None:
    """Write rows into one file, a line of JSON for each, in the order in which `read_records` returns them."""
    lines = [json.dumps(_as_json(row), separators=(",", ":"), allow_nan=False) for row in _in_order(records)]
    storage.write_bytes(uri, "".join(line + "\n" for line in lines).encode())


def read_records_file(uri: str) -> list[Record]:
    """Return the rows of a file that `write_records_file` wrote. Raise UserError that names the damaged line."""
    lines = storage.read_bytes(uri).splitlines()
    return [_record(line, f"{uri}, line {number}") for number, line in enumerate(lines, 1)]


def _in_order(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=lambda r: (r.run_name, r.run_id, r.images_seen, r.metric, r.record_id))


def _holds_records(uri: str) -> bool:
    return (uri.endswith(".json") and "/records/" in uri) or uri.rpartition("/")[2] == RECORDS_FILE


def read_record(uri: str) -> Record:
    """Return the row of a file that `write_record` wrote. Raise UserError that names a damaged file."""
    return _record(storage.read_bytes(uri), uri)


def _record(text: bytes, where: str) -> Record:
    try:
        data = json.loads(text)
        if isinstance(data, dict) and data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version {data.get('schema_version')!r}, this diffscale reads {SCHEMA_VERSION}")
        return Record.model_validate(data)
    except (ValueError, ValidationError, RecursionError) as error:
        raise UserError(
            setting="record",
            value=where,
            expected=f"a record of diffscale ({_first_line(error)})",
            fix="move the damaged file away; the evaluation can be repeated",
        ) from None


def to_frame(records: Iterable[Record]) -> pd.DataFrame:
    """The rows as a table whose columns are the fields above, in order; `settings` and `versions` stay objects."""
    import pandas as pd

    return pd.DataFrame([r.model_dump() for r in records], columns=list(Record.model_fields))


def columns_table() -> str:
    """The README's table of columns, Markdown."""
    rows = [f"| `{name}` | {field.description} |" for name, field in Record.model_fields.items()]
    return "\n".join(["| column | meaning |", "|---|---|", *rows])


def _as_json(record: Record) -> dict[str, object]:
    return {k: _plain(v) for k, v in record.model_dump().items()}


def _plain(value: object) -> object:
    """JSON has no nan and inf: they are written as words, which are read back as the numbers."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
