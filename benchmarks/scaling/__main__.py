"""`python -m benchmarks.scaling [PART ...]`: what a run costs with many ranks, and how it scales.

requests    requests and bytes of simulated ranks at an S3 API server, of this tree and of an earlier commit, and what
            64 ranks extrapolate to at 1,024
lanes       the share of the data that a node of 1,024 ranks reads, from the order itself
manifest    processor seconds and memory to open a manifest of 50,000 shards
records     10,000 records of an S3 API server: for the first time, from the index, and after one more
trials      1,000 trials of a stand-in through Ray Tune: the driver's memory, writes for each trial, a restart
workers     Ray Train with many workers on this machine: the first step, the controller, a killed worker
link        two workers here: the link, the step, predicted and measured efficiency
projected   published networks on 8, 64 and 1,024 GPUs, on an assumed MFU

Results: benchmarks/results/scaling/PART.csv
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common.machine import made_by
from benchmarks.common.measure import write_csv
from benchmarks.scaling.link import measured
from benchmarks.scaling.projection import projected
from benchmarks.scaling.records import measure_records
from benchmarks.scaling.trials import measure_trials
from benchmarks.scaling.workers import measure_workers
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.manifest import Manifest, Shard, Split, read_manifest, rows_hash, write_manifest
from diffscale.data.loading.lanes import lane_share, lane_starts, parts_of_lanes

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scaling"
BEFORE = "40d1a55"  # the last commit in which every rank opened, restored and evaluated for itself
SIMULATED = (1, 8, 64)
MANY = 1024
LINEAR = ("open", "restore", "restore sharded weights", "evaluate a round")  # `lanes` is exact for what a node reads
NODE = 8


def requests() -> list[dict[str, Any]]:
    """Count with this tree and with that of BEFORE; extrapolate along a line through the two largest numbers."""
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", before, BEFORE], check=True)
        try:
            rows = [row for tree in (before, ROOT) for row in _counted(tree, "before" if tree == before else "after")]
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    return rows + _extrapolated(rows)


def _counted(tree: Path, name: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("count_requests.py")), *map(str, SIMULATED)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, check=True)
    return [{"tree": name, "kind": "counted"} | json.loads(line) for line in done.stdout.splitlines()]


def _extrapolated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows at MANY ranks: totals of requests and bytes are linear in the number of ranks."""
    out = []
    middle, most = SIMULATED[-2:]
    for last in (row for row in rows if row["ranks"] == most and row["operation"] in LINEAR):
        one = next(r for r in rows if r["ranks"] == middle and all(r[k] == last[k] for k in ("tree", "operation")))
        row = {"tree": last["tree"], "kind": "extrapolated", "operation": last["operation"], "ranks": MANY}
        for key in last.keys() - row.keys() - {"requests_per_rank", "bytes_per_rank", "of_its_share"}:
            row[key] = round(last[key] + (last[key] - one[key]) / (most - middle) * (MANY - most), 2)
        out.append(row | {f"{key}_per_rank": row[key] / MANY for key in ("requests", "bytes")})
    return out


def lanes() -> list[dict[str, Any]]:
    """Shards that a node of MANY ranks touches in an epoch, to its share: a shard across its border counts whole."""
    out = []
    for n, shard_rows in ((100_000_000, 21_700), (1_000_000_000, 21_700), (1_000_000_000, 2_700)):
        starts, parts = lane_starts(n, 1024, 1), parts_of_lanes(1024)
        touched = []
        for node in range(MANY // NODE):
            classes = [lane_share(2048, rank, MANY, 1024).start for rank in range(node * NODE, (node + 1) * NODE)]
            own = [parts[lane] for lane in classes]
            held = {s for p in own for s in range(starts[p] // shard_rows, (starts[p + 1] - 1) // shard_rows + 1)}
            touched.append(len(held))
        share = n / shard_rows / (MANY // NODE)
        row = {"images": n, "shards": -(-n // shard_rows), "ranks": MANY, "nodes": MANY // NODE, "shards_share": share}
        out.append(row | {"shards_most": max(touched), "of_its_share": round(max(touched) / share, 4)})
    return out


def manifest() -> list[dict[str, Any]]:
    """Open a manifest of 50,000 shards from a local disk."""
    shards = [
        Shard(file=f"train-{s:05d}.arrow", rows=21_700, bytes=1 << 28, sha256=f"{s:064x}", content=f"{s:064x}")
        for s in range(50_000)
    ]
    content = rows_hash("uint8", 64, 3, shards)
    split = Split(rows=21_700 * len(shards), content_hash=content, mean=[0.0] * 3, std=[1.0] * 3, shards=shards)
    fields: dict[str, Any] = {"layout": "pixels", "dtype": "uint8", "resolution": 64, "channels": 3, "lossy": False}
    fields |= {"class_names": [], "content_hash": content, "resize": {}, "source": {}, "made_with": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(folder, Manifest(**fields, splits={"train": split}))
        size = Path(folder, "manifest.json").stat().st_size
        seconds, received = [], []  # of the processor: other programs run on the machine
        for _ in range(3):
            started = time.process_time()
            first = Dataset.of_manifest(folder, read_manifest(folder))
            seconds.append(time.process_time() - started)
            sent = first.manifest.model_dump_json()
            started = time.process_time()
            Dataset.of_manifest(folder, Manifest.model_validate_json(sent))
            received.append(time.process_time() - started)
        tracemalloc.start()
        kept = Dataset.of_manifest(folder, read_manifest(folder))
        memory = tracemalloc.get_traced_memory()[0]
    return [
        {
            "shards": len(kept.split.shards),
            "manifest_mb": round(size / 1e6, 1),
            "cpu_median_s": round(float(np.median(seconds)), 3),
            "cpu_worst_s": round(max(seconds), 3),
            "received_cpu_median_s": round(float(np.median(received)), 3),
            "memory_mb": round(memory / 1e6, 1),
        }
    ]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "requests": requests,
    "lanes": lanes,
    "manifest": manifest,
    "records": measure_records,
    "trials": measure_trials,
    "workers": measure_workers,
    "link": lambda: measured([]),
    "projected": projected,
}


def main(parts: Annotated[list[str] | None, typer.Argument(help=", ".join(PARTS))] = None) -> None:
    """Measure the parts and write their tables."""
    for part in parts or PARTS:
        rows = PARTS[part]()
        write_csv(RESULTS / f"{part}.csv", [row | made_by() for row in rows])
        print(RESULTS / f"{part}.csv")
        for row in rows:
            print("  ", *(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
