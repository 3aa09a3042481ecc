"""CPU time, memory and page of the report of many runs: `python -m benchmarks.throughput.report`.

The runs are made from those of `results/cifar10-gpu`: their settings, with other sizes, learning rates, schedules and
resolutions, and values along a law. Each has five evaluations and a sample grid at each, as the defaults are.
"""

from __future__ import annotations

import io
import itertools
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from benchmarks.common.measure import write
from diffscale.core.hashing import identify
from diffscale.records.schema import Record
from diffscale.records.store import RECORDS_FILE, read_records_file, write_records_file

MADE_FROM = Path(__file__).parents[1] / "results" / "cifar10-gpu" / RECORDS_FILE
MODELS = ("unet", "uvit", "dit", "rin")
SIZES, RESOLUTIONS, SEEDS = (0.5, 1.0, 2.0), (16, 32), range(2)
LEARNING_RATES = [1e-4 * 2**i for i in range(7)]
SCHEDULES = ("simple_cosine", "sigmoid", "shifted_cosine")
BUDGETS = [2e13 * 2**i for i in range(5)]


def many_records(runs: int) -> Iterator[Record]:
    """Yield the rows of up to 1,008 runs."""
    real = {r.run_name.removeprefix("cifar10-"): r for r in read_records_file(str(MADE_FROM)) if r.metric == "fid"}
    rng = np.random.default_rng(0)
    every = itertools.product(MODELS, SIZES, LEARNING_RATES, SCHEDULES, RESOLUTIONS, SEEDS)
    for model, size, rate, schedule, side, seed in itertools.islice(every, runs):
        row = real[model]
        run = identify(model=model, size=size, rate=rate, schedule=schedule, side=side, seed=seed)
        per_image = row.flops_per_image * size * (side / 32) ** 2
        settings = {
            "optim.lr": rate,
            "diffusion.schedule.name": schedule,
            "data.resolution": side,
            "model.size": size,
            "train.seed": seed,
        }
        of_run = {
            "run_id": run,
            "run_name": f"many-{model}",
            "seed": seed,
            "schedule": schedule,
            "train_resolution": side,
            "eval_resolution": 32,
            "flops_per_image": per_image,
            "parameters": round(row.parameters * size),
            "endpoint": "constant",
            "settings": row.settings | settings,
        }
        for budget in BUDGETS:
            images = round(budget / per_image)
            off = math.log(size / (budget / 8e13) ** 0.5) ** 2 + 0.5 * math.log(rate / 8e-4) ** 2
            value = (20 + 60 * (budget / 2e13) ** -0.4) * (1 + 0.1 * off) * math.exp(0.02 * rng.normal())
            of_point = {
                "record_id": identify(run=run, images=images),
                "images_seen": images,
                "epochs": images / 50_000,
                "train_flops": per_image * images,
                "device_seconds": per_image * images / 1e13,
                "val_loss": value / 300,
                "value": value,
                "value_low": 0.98 * value,
                "value_high": 1.02 * value,
                "value_heldout": 1.1 * value,
            }
            yield row.model_copy(update=of_run | of_point)


def write_many(folder: Path, runs: int, side: int = 256) -> None:
    """Write the rows of many runs, and for each evaluation a sample grid of `side` pixels; 0: none."""
    rows = list(many_records(runs))
    write_records_file(str(folder / RECORDS_FILE), rows)
    if not side:
        return
    coarse = np.random.default_rng(0).integers(0, 255, (side // 4, side // 4, 3)).astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(picture, "PNG")
    for row in rows:
        grid = folder / f"{row.run_name}-{row.run_id}" / "samples" / f"images-{row.images_seen:09d}.png"
        grid.parent.mkdir(parents=True, exist_ok=True)
        grid.write_bytes(picture.getvalue())


def main(runs: Annotated[int, typer.Option(min=1, max=1008, help="how many runs")] = 1000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, out = Path(folder) / "runs", Path(folder) / "report"
        place.mkdir()
        write_many(place, runs)
        command = [sys.executable, "-m", "diffscale", "report", str(place), "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {
            "runs": runs,
            "cpu_s": round(used.ru_utime + used.ru_stime, 1),
            "peak_memory_mb": used.ru_maxrss // 1024,
            "page_mb": round((out / "index.html").stat().st_size / 1e6, 1),
            "pictures": len(list((out / "pictures").glob("*.png"))),
            "figures": len(list((out / "plots").glob("*.png"))),
        }
    print(row, write("report", [row]))


if __name__ == "__main__":
    typer.run(main)
