"""Paired timings, intervals, and the tables of results."""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.machine import made_by
from diffscale.core import storage
from diffscale.core.cache import cache_dir

RESULTS = Path(__file__).parents[1] / "results" / "throughput"


def race(
    ours: Callable[[], Any], theirs: Callable[[], Any], work: int, pairs: int, unfinished: str = ""
) -> dict[str, Any]:
    """Time two calls in alternating pairs after one warm-up of each; the side that starts alternates too.

    ours, theirs: the calls
    work: items in one call
    pairs: how many
    unfinished: name under which pairs are kept until all are measured, so that a long race can be resumed

    The returned ratio is the median over the pairs of their seconds to ours, with a bootstrap 95 % interval.
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
        "ratio": round(float(np.median(ratios)), 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
        "pairs": pairs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median of values (n,)."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(low), float(high)


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write results/throughput/NAME.csv, each row with its machine, date, commit and command. Return the path."""
    path = RESULTS / f"{name}.csv"
    made = made_by()
    write_csv(path, [made | row for row in rows])
    return path


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a table; none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table whole; its columns are those of all rows, in the order of their first appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def wait_for(condition: Callable[[], Any], seconds: float, what: str, every: float = 0.5) -> Any:
    """Return the first true value of the condition. Raise TimeoutError that names `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(every)
    return found
