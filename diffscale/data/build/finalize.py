"""The end of a build: assigns parts to shards, writes the manifests and rejected.csv."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build.tasks import BuildPlan, load_json, sum_of_contents
from diffscale.data.format.manifest import (
    Manifest,
    Shard,
    Split,
    SplitName,
    channel_statistics,
    made_with,
    rows_hash,
    write_manifest,
)

SPLITS: tuple[SplitName, ...] = ("train", "heldout")


def merge_jobs(
    work: Path, plan: BuildPlan, folders: dict[str, str], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the argument of `tasks.merge` for each shard. All shards of a split have as many rows, except the last."""
    jobs = []
    for side, folder in folders.items():
        for split in SPLITS:
            parts = [r["parts"][f"{side}-{split}"] for r in results if f"{side}-{split}" in r["parts"]]
            if not parts:
                continue
            listed = work / "shards" / f"{side}-{split}.parts"
            listed.write_text(json.dumps([file for part in parts for file in part["files"]]))
            n, size = sum(part["rows"] for part in parts), sum(part["bytes"] for part in parts)
            count = min(n, -(-size // plan.shard_bytes))
            each = -(-n // count)
            for number, first in enumerate(range(0, n, each)):
                entry = work / "shards" / f"{side}-{split}-{number:05d}.json"
                jobs.append(
                    {
                        "target": folder,
                        "shard": f"{split}-{number:05d}.arrow",
                        "done": str(entry),
                        "parts": str(listed),
                        "first": first,
                        "last": min(first + each, n),
                        "shuffle": plan.shuffle,
                    }
                )
    return jobs


def write_manifests(
    work: Path, plan: BuildPlan, identity: str, folders: dict[str, str], results: list[dict[str, Any]]
) -> None:
    """Write rejected.csv and, last, the manifest of every folder. Raises UserError if no image could be used."""
    rejected = [tuple(r) for r in json.loads((work / "refused.json").read_text())]
    rejected += [tuple(r) for result in results for r in result["rejected"]]
    left_out = [tuple(r) for r in load_json(work / "left_out.json") or []]
    for side, folder in folders.items():
        splits = {s: _split(work, plan, side, s, results) for s in SPLITS}
        if not splits["train"].rows:
            raise UserError(
                setting="SOURCE",
                value=plan.source,
                expected=f"images usable at resolution {side}",
                reason=f"{rejected[0][0]}: {rejected[0][1]}" if rejected else "",
            )
        storage.write_bytes(storage.join(folder, "rejected.csv"), _csv(rejected + left_out))
        write_manifest(folder, _manifest(work, plan, identity, side, splits, results, len(rejected), len(left_out)))


def _split(work: Path, plan: BuildPlan, side: str, split: str, results: list[dict[str, Any]]) -> Split:
    entries = sorted((work / "shards").glob(f"{side}-{split}-*.json"))
    shards = [Shard.model_validate_json(entry.read_text()) for entry in entries]
    parts = [r["parts"][f"{side}-{split}"] for r in results if f"{side}-{split}" in r["parts"]]
    values = sum(part["rows"] for part in parts) * int(side) ** 2
    channels = plan.preparation.channels
    sums, squares = (np.sum([p[key] for p in parts], axis=0) for key in ("sums", "squares"))
    mean, std = channel_statistics(sums, squares, values) if parts else ([0.0] * channels, [0.0] * channels)
    names = json.loads((work / "classes.json").read_text())
    return Split(
        class_counts=_class_counts(parts, len(names)),
        rows=sum(s.rows for s in shards),
        shards=shards,
        content_hash=rows_hash(plan.dtype, int(side), channels, shards),
        mean=mean,
        std=std,
    )


def _class_counts(parts: list[dict[str, Any]], classes: int) -> list[int] | None:
    """Return the rows of each class; None without classes, or if an earlier version has read a part."""
    if not classes or not all("classes" in part for part in parts):
        return None
    return [sum(part["classes"].get(str(label), 0) for part in parts) for label in range(classes)]


def _manifest(
    work: Path,
    plan: BuildPlan,
    identity: str,
    side: str,
    splits: dict[SplitName, Split],
    results: list[dict[str, Any]],
    rejected: int,
    left_out: int,
) -> Manifest:
    lossy = sum(r["lossy"] for r in results)
    resize = plan.preparation.recorded() if plan.dtype == "uint8" else {"crop": "none", "filter": "none"}
    return Manifest(
        layout=plan.layouts[side],
        dtype=plan.dtype,
        resolution=int(side),
        channels=plan.preparation.channels,
        class_names=json.loads((work / "classes.json").read_text()),
        content_hash=splits["train"].content_hash,
        lossy=lossy > 0,
        lossy_images=lossy,
        rejected=rejected,
        resize=resize,
        made_with=made_with(),
        source={
            "path": plan.source,
            "kind": plan.kind,
            "split": plan.split,
            "split_seed": plan.split_seed,
            "shuffled": plan.shuffle,
            "labels": plan.labels,
            "encoding": plan.encoding,
            "images": sum(r["seen"] for r in results),
            "plan": identity,
            "left_out": left_out,
            "fingerprint": _fingerprint(work, results),
        },
        splits={name: split for name, split in splits.items() if split.rows or name == "train"},
    )


def _fingerprint(work: Path, results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the state of the source when it was listed; None if an earlier version listed it."""
    state = load_json(work / "fingerprint.json")
    if state is None or not all("content" in result for result in results):
        return state
    return {**state, "content": sum_of_contents(int(result["content"], 16) for result in results)}


def _csv(rows: list[tuple[str, ...]]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("image", "reason"))
    writer.writerows(rows)
    return out.getvalue().encode("utf-8", "backslashreplace")
