"""Two ways of doing one thing, timed in turns in one process: what the metric and sampling benchmarks share."""

from __future__ import annotations

import csv
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.provenance import source

RESULTS = Path(__file__).parents[1] / "results" / "throughput"


def race(
    ours: Callable[[], Any], theirs: Callable[[], Any], work: int, pairs: int, unfinished: str = ""
) -> dict[str, Any]:
    """Alternating pairs (who begins alternates too) after one warm-up of each. work: items in one call.

    unfinished: a name under which pairs are kept until all are there, so that a long race can be run in parts.
    ratio: median over the pairs of their seconds to ours, with a bootstrap 95 % interval (DECISIONS 20).
    """
    kept = cache_dir() / "benchmarks" / f"{unfinished}.json" if unfinished else None
    seconds: list[tuple[float, float]] = json.loads(kept.read_text()) if kept and kept.exists() else []
    if len(seconds) < pairs:
        ours(), theirs()
    for i in range(len(seconds), pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        took = [0.0, 0.0]
        for side in order:
            started = time.perf_counter()
            (ours if side == 0 else theirs)()
            took[side] = time.perf_counter() - started
        seconds.append((took[0], took[1]))
        if kept:
            storage.write_bytes(str(kept), json.dumps(seconds).encode())
    if kept:
        kept.unlink(missing_ok=True)
    ratios = np.array([b / a for a, b in seconds])
    low, high = interval(ratios)
    return {
        "ours_per_s": round(work / statistics.median(a for a, _ in seconds), 4),
        "theirs_per_s": round(work / statistics.median(b for _, b in seconds), 4),
        "ratio": round(float(np.median(ratios)), 4), "ratio_low": round(low, 4),
        "ratio_high": round(high, 4), "pairs": pairs, "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median of values (n,)."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """results/throughput/NAME.csv, whole, each row with what made it (where it does not say so already)."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = made_by()
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0] | made))
        writer.writeheader()
        writer.writerows(made | row for row in rows)
    return path


def made_by() -> dict[str, Any]:
    """Machine, date, commit and command of a measurement."""
    commit, dirty = source()
    module = getattr(sys.modules["__main__"].__spec__, "name", sys.argv[0]).removesuffix(".__main__")
    return {
        "machine": f"{os.cpu_count()} cores of {cpu_name()}", "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": f"{commit[:12]}{'+' if dirty else ''}", "command": " ".join(["python -m", module, *sys.argv[1:]]),
    }  # fmt: skip


def cpu_name() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
