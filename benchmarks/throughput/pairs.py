"""Two ways of doing one thing, timed in turns in one process: what the metric and sampling benchmarks share."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parents[1] / "results" / "throughput"


def race(ours: Callable[[], Any], theirs: Callable[[], Any], work: int, pairs: int) -> dict[str, Any]:
    """Alternating pairs (who begins alternates too) after one warm-up of each. work: items in one call.

    ratio: median over the pairs of their seconds to ours, with a bootstrap 95 % interval (DECISIONS 20).
    """
    ours(), theirs()
    seconds: list[tuple[float, float]] = []
    for i in range(pairs):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        took = [0.0, 0.0]
        for side in order:
            started = time.perf_counter()
            (ours if side == 0 else theirs)()
            took[side] = time.perf_counter() - started
        seconds.append((took[0], took[1]))
    ratios = np.array([b / a for a, b in seconds])
    draws = np.random.default_rng(0).choice(ratios, (10_000, pairs))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {
        "ours_per_s": round(work / statistics.median(a for a, _ in seconds), 4),
        "theirs_per_s": round(work / statistics.median(b for _, b in seconds), 4),
        "ratio": round(float(np.median(ratios)), 4), "ratio_low": round(float(low), 4),
        "ratio_high": round(float(high), 4), "pairs": pairs, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
    }  # fmt: skip


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """results/throughput/NAME.csv, whole."""
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
