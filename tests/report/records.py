"""Records as the other parts would write them: power laws with noise, written through diffscale.records.store."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from diffscale.core.hashing import identify
from diffscale.records.schema import Record, record_id
from diffscale.records.store import write_record

LAWS = {"unet": (11.0, 22.0, 0.42), "uvit": (6.5, 25.5, 0.46), "rin": (5.0, 62.0, 0.55), "dit": (13.0, 48.0, 0.4)}
"""floor, scale, exponent of the distance against train FLOPs / 1e14."""
FLOPS_PER_IMAGE = {"unet": 2.4e8, "uvit": 2.1e8, "rin": 1.7e8, "dit": 1.9e8}


def make_record(
    *,
    model: str = "unet",
    seed: int = 0,
    images_seen: int = 65536,
    schedule: str = "simple_cosine",
    resolution: int = 32,
    endpoint: str = "constant",
    metric: str = "fid",
    nfe: int = 20,
    solver: str = "dpmpp_2m",
    n_generated: int = 2048,
    dataset: str = "cifar10",
    noise: float = 0.03,
    value: float | None = None,
    settings: dict | None = None,
    eval_resolution: int = 32,
    sample_seed: int = 0,
    **changes: object,
) -> Record:
    """One row. The value follows LAWS unless given, with relative normal noise keyed by everything that names it."""
    flops_per_image = FLOPS_PER_IMAGE.get(model, 2e8) * (resolution / 32) ** 2
    tree = {
        "data.resolution": resolution,
        "data.path": f"/data/{dataset}",
        "model.name": model,
        "diffusion.schedule.name": schedule,
        "diffusion.prediction": "v",
        "optim.lr": 2e-4,
        "train.seed": seed,
        "train.images": images_seen,
        "train.global_batch": 64,
        "train.workers": 1,
        "eval.n_generated": n_generated,
        "storage": "/storage",
        "name": f"{model}-{schedule}-{resolution}",
        **(settings or {}),
    }
    run = identify(
        model=model,
        seed=seed,
        schedule=schedule,
        resolution=resolution,
        dataset=dataset,
        endpoint=endpoint if endpoint == "constant" else [endpoint, images_seen],
        settings=settings or {},
    )
    sampler = json.dumps({"solver": {"name": solver, "steps": nfe}, "precision": "fp32"})
    drawn_by = json.dumps({"name": solver, "nfe": nfe})
    reference = identify(dataset=dataset, resolution=eval_resolution)
    flops = flops_per_image * images_seen
    if value is None:
        floor, scale, exponent = LAWS.get(model, (10.0, 90.0, 0.5))
        shift = 1 + 0.2 * (schedule != "simple_cosine") * (1 if resolution >= 32 else -0.4) + 4 / nfe**1.5
        rng = np.random.default_rng(zlib.crc32(f"{run}{images_seen}{drawn_by}{metric}{sample_seed}".encode()))
        value = shift * (floor + scale * (flops / 1e14) ** -exponent) * math.exp(noise * rng.standard_normal())
    row: dict = dict(  # noqa: C408
        record_id=record_id(
            run_id=run,
            images_seen=images_seen,
            ema="halflife",
            sampler=sampler,
            n_generated=n_generated,
            sample_seed=sample_seed,
            reference=reference,
            metric=metric,
            eval_resolution=eval_resolution,
        ),
        run_id=run,
        run_name=str(tree["name"]),
        created="2026-01-01T00:00:00Z",
        model=model,
        parameters=2_000_000,
        schedule=schedule,
        interpolant="vp",
        prediction="v",
        weighting="min_snr",
        input_scale=1.0,
        dataset=dataset,
        dataset_hash=identify(dataset=dataset, side=resolution),
        dataset_lossy=False,
        train_resolution=resolution,
        seed=seed,
        global_batch=64,
        precision="fp32",
        images_seen=images_seen,
        epochs=images_seen / 50_000,
        endpoint=endpoint,
        ema="halflife",
        forward_macs=flops_per_image / 6,
        flops_per_image=flops_per_image,
        train_flops=flops,
        device_seconds=flops / 6e10,
        device="2 CPU cores",
        devices=1,
        cost=flops / 6e10 / 3600 * 0.05,
        train_loss=0.1,
        metric=metric,
        value=value,
        value_low=value * 0.98,
        value_high=value * 1.02,
        network="inception-2015",
        resize="default",
        eval_resolution=eval_resolution,
        reference=reference,
        n_generated=n_generated,
        n_reference=50_000,
        solver=solver,
        nfe=nfe,
        sampler=sampler,
        sample_seed=sample_seed,
        sampling_flops=flops_per_image / 3 * nfe,
        evaluated_on="training workers",
        commit="0123456",
        dirty=False,
        versions={"torch": "2.15"},
        settings=tree,
    )
    return Record(**(row | changes))


def benchmark_records() -> Iterator[Record]:
    """Four backbones at six compute points, three seeds each; an NFE sweep of the UNet; a schedule sweep."""
    for model in LAWS:
        for seed in range(3):
            for step in range(6):
                yield make_record(model=model, seed=seed, images_seen=16384 * 2**step)
    for nfe in (5, 10, 40, 80):
        for solver in ("dpmpp_2m", "heun"):
            yield make_record(images_seen=16384 * 32, nfe=nfe, solver=solver)
    for schedule in ("simple_cosine", "shifted_cosine", "sigmoid"):
        for side in (16, 32, 64):
            for seed in range(2):
                for step in range(4):
                    yield make_record(
                        schedule=schedule,
                        resolution=side,
                        seed=seed,
                        dataset="emoji",
                        eval_resolution=64,
                        images_seen=int(65536 * 2**step * (32 / side) ** 2),
                        metric="fd_efficientnet_lite0",
                        network="efficientnet_lite0",
                    )


def write_runs(storage: Path, records: Iterator[Record] | list[Record], grids: bool = True) -> str:
    """Run folders as training leaves them, with a sample grid for each (run, images_seen)."""
    rng = np.random.default_rng(0)
    for record in records:
        folder = storage / "runs" / f"{record.run_name}-{record.run_id}"
        write_record(str(folder), record)
        grid = folder / "samples" / f"images-{record.images_seen:09d}.png"
        if grids and not grid.exists():
            grid.parent.mkdir(parents=True, exist_ok=True)
            colour = rng.integers(0, 255, (8, 8, 3)).repeat(16, 0).repeat(16, 1)
            Image.fromarray(colour.astype(np.uint8)).save(grid)
    return str(storage)
