"""The runs of a storage: how far they are, and their best values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from pyarrow import fs as pafs

from diffscale.core import storage
from diffscale.records.schema import GROUP, Record, rank
from diffscale.records.store import read_records
from diffscale.training.checkpoint import layout
from diffscale.training.own_records import first_metric, is_own


@dataclass(frozen=True)
class RunSummary:
    """One run: its folder, how far it is, its best value, and when it changed last."""

    folder: str
    images_seen: int
    budget: int | None
    metric: str
    best: float | None
    changed: datetime


def list_runs(root: str) -> list[RunSummary]:
    """Return the runs under a storage that have a complete checkpoint or a record, the newest first."""
    fs, path = storage.filesystem(storage.join(root, "runs"))
    folders = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    scheme = root.split("://")[0] + "://" if storage.is_remote(root) else ""
    found = [_summary(scheme + info.path) for info in folders if info.type == pafs.FileType.Directory]
    return sorted((run for run in found if run is not None), key=lambda run: run.changed, reverse=True)


def _summary(folder: str) -> RunSummary | None:
    records = read_records([folder])
    times = [datetime.fromisoformat(r.created) for r in records]
    seen = [r.images_seen for r in records]
    experiment = None
    if checkpoints := layout.list_checkpoints(folder):
        newest = max(checkpoints, key=layout.images_of)
        experiment = layout.read_experiment(newest)
        seen.append(layout.images_of(newest))
        fs, path = storage.filesystem(storage.join(newest, layout.COMPLETE))
        times.append(fs.get_file_info(path).mtime or datetime.fromtimestamp(0, UTC))
    if not seen:
        return None
    train = experiment.train if experiment else None
    budget = train.images if train else None
    if train and budget is None and train.flops and records:
        budget = int(train.flops / records[0].flops_per_image)
    own = [r for r in records if is_own(r, experiment)] if experiment else _first_group(records)
    metric = (first_metric(experiment) if experiment else "") or (own[0].metric if own else "")
    return RunSummary(folder, max(seen), budget, metric, best_value(own, metric), max(times))


def _first_group(records: list[Record]) -> list[Record]:
    """Return the rows that are comparable with the oldest one, for a run whose settings are gone."""
    if not records:
        return []
    oldest = min(records, key=lambda r: (r.created, r.record_id))
    return [r for r in records if all(getattr(r, name) == getattr(oldest, name) for name in GROUP)]


def best_value(records: list[Record], metric: str) -> float | None:
    """Return the best value of a metric in its own direction, or None without a record of it.

    records: of one comparability group, that of the run's own evaluations.
    """
    values = [r.value for r in records if r.metric == metric]
    return min(values, key=lambda value: rank(metric, value), default=None)
