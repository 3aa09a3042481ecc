"""CIFAR-10 with minutes of one GPU: `python -m benchmarks.throughput.gpu_cifar10 --seconds 540`.

Trains a mid-size UNet and DiT, class-conditional, each for its share of the time, and measures the FID of 50,000
samples against the 50,000 training images. The aim is an FID below 10 within ten minutes of one H200: `--networks
unet-cifar10` gives one network all of the time. Each network runs in a process of its own, without Ray. Rows go to
gpu.jsonl of the folder $OUT (the working directory without it), runs with their records to $OUT/runs. The images come
from benchmarks/suites/cifar10.py. `--dry-run` makes it all tiny, on the CPU, with random images.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common.gpu_timing import DEVICE, H200_PEAK, ON_GPU, OUT, emit
from benchmarks.suites import cifar10
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model, open_training_data
from diffscale.config.load import validate
from diffscale.core import storage
from diffscale.evaluation.sample_writer import SampleWriter
from diffscale.models import PRESETS
from diffscale.models.cost import count_cost
from diffscale.training.checkpoint.layout import save_settings
from diffscale.training.parallel import World
from diffscale.training.trainer import Trainer

MODULE = "benchmarks.throughput.gpu_cifar10"
TOY = {"unet-cifar10": "unet-tiny", "dit-cifar10": "dit-mini"}
RATES = {"unet-cifar10": 1e-3, "dit-cifar10": 5e-4}
RESERVED = 75  # seconds of each network for loading, compiling, sampling and features


def dataset(folder: Path, tiny: bool) -> str:
    """Write the training images as an Arrow dataset unless they are there; return its folder."""
    if not (folder / "manifest.json").exists():
        if tiny:
            random = np.random.default_rng(0)
            images, labels = random.integers(0, 256, (128, 32, 32, 3), np.uint8), np.arange(128) % 10
        else:
            images, labels = cifar10.load()
        writer = SampleWriter(folder, "arrow", (3, *images.shape[1:3]), list(cifar10.CLASSES), {})
        writer(0, {"images": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": labels.astype(np.int64)})
        writer.close()
    return str(folder)


def settings(network: str, data: str, out: Path, seconds: float, tiny: bool) -> Experiment:
    """Return the experiment of a network: EDM's process and weighting, and as fast as the GPU allows."""
    preset = TOY[network] if tiny else network
    convolves = PRESETS[preset]["name"] == "unet"
    return validate(
        {
            "name": f"cifar10-{network}",
            "storage": str(out),
            "data": {"path": data, "resolution": 32, "flip": True},
            "model": {"preset": preset},
            "diffusion": {"schedule": "edm_lognormal", "prediction": "F", "weighting": "edm"},
            "optim": {"lr": RATES[network], "betas": [0.9, 0.99], "warmup_images": 0 if tiny else 100_000},
            "train": {
                "global_batch": 8 if tiny else 512,
                "device_seconds": seconds,
                "precision": "fp32" if tiny else "bf16",
                "compile": not tiny,
                "channels_last": convolves,
                "winograd": False,
                "exact": False,
                "trackers": [],
                "cpus_per_worker": 1 if tiny else 4,
            },
            "eval": {
                "metrics": ["fd_efficientnet_lite0"] if tiny else ["fid"],
                "n_generated": 64 if tiny else 50_000,
                "points": [1.0],
                "solver": {"name": "dpmpp_2m", "steps": 2 if tiny else 18, "grid": "karras"},
            },
        }
    )


def train(network: str, out: Path, seconds: float, tiny: bool) -> None:
    """Train one network for its seconds, evaluate it at the end, and emit its row."""
    experiment = settings(network, dataset(out / "cifar10", tiny), out, seconds, tiny)
    data = open_training_data(experiment)
    classes = experiment.num_classes(data)
    cost = count_cost(lambda: build_model(experiment, data), data.resolution, data.channels, classes)
    folder = experiment.run_folder(data.content_hash)
    storage.write_bytes(storage.join(folder, "experiment.yaml"), save_settings(experiment))
    started = time.monotonic()
    outcome = Trainer(experiment, folder, World(device=DEVICE), cost).run()
    taken = time.monotonic() - started
    records = [json.loads(p.read_text()) for p in sorted(Path(folder, "records").glob("*.json"))]
    row: dict[str, Any] = {record["metric"]: round(record["value"], 3) for record in records}
    rate = outcome.images_seen / max(outcome.device_seconds, 1e-9)
    emit(
        cell="cifar10",
        network=network,
        reason=outcome.reason,
        images_seen=outcome.images_seen,
        epochs=round(outcome.images_seen / data.n, 2),
        training_s=round(outcome.device_seconds, 1),
        rest_s=round(taken - outcome.device_seconds, 1),
        images_per_s=round(rate, 1),
        mfu_of_989=round(rate * cost.flops_per_image / H200_PEAK, 4),
        n=experiment.eval.n_generated,
        **row,
    )


def main(
    seconds: Annotated[float, typer.Option(help="of everything")] = 540,
    networks: Annotated[str, typer.Option(help="comma-separated, of unet-cifar10 and dit-cifar10")] = ",".join(TOY),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="everything tiny, on the CPU, random images")] = False,
    training: Annotated[float, typer.Option(help="train the one network here for so long", hidden=True)] = 0,
) -> None:
    """Train and evaluate each network in its share of the time."""
    out, names = Path(os.environ.get(OUT, ".")).resolve(), networks.split(",")
    if training:
        train(names[0], out, training, tiny=dry_run or not ON_GPU)
        return
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if dry_run else {})
    end = time.monotonic() + seconds
    dataset(out / "cifar10", tiny=dry_run or not ON_GPU)
    failed = []
    for place, name in enumerate(names):
        share = (end - time.monotonic()) / (len(names) - place)
        length = 2.0 if dry_run else max(share - RESERVED, 10)
        command = [sys.executable, "-m", MODULE, "--networks", name, "--training", str(length)]
        command += ["--dry-run"] if dry_run else []
        failed += [name] if subprocess.run(command, env=environment).returncode else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
