"""Peak memory of an evaluation of 5,000 and of 50,000 samples: `python -m benchmarks.throughput.evaluation_memory`.

All but the cost of a feature is real: the samples pass through the Evaluator, its feature store and its metrics. The
network is one random layer with Inception's 2048 features, so that 50,000 samples take minutes. Each row is measured in
a separate process, whose anonymous memory (RssAnon: without mapped files) is read every 10 ms. Rows that the CSV
already has are kept, so each can be measured alone.
"""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import timm
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.common.measure import RESULTS, write
from benchmarks.reliability.soak import anonymous_megabytes
from benchmarks.throughput.features import arrow
from diffscale.config.experiment import EvalSettings
from diffscale.evaluation import Evaluator
from diffscale.evaluation.networks.weights import WEIGHTS

NETWORK, DIM, SIDE = "random_layer", 2048, 32
METRICS = ("fd", "kid", "precision", "fd_inf")
REFERENCE_IMAGES = 4096


class RandomLayer(nn.Module):
    """Images (B,3,32,32) → (B,2048), as sparse as pooled features are."""

    num_features = DIM

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "mean": (0.5,) * 3, "std": (0.25,) * 3}
        self.layer = nn.Linear(3 * SIDE * SIDE, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).relu()


@timm.models.register_model
def random_layer(pretrained: bool = False, **kwargs: Any) -> RandomLayer:
    torch.manual_seed(0)
    return RandomLayer()


@dataclass
class Noise:
    """n random images, each a function of its number's batch."""

    n: int
    batch: int = 256

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(first)
        pixels = random.integers(0, 256, (last - first, 3, SIDE, SIDE), dtype=np.uint8)
        return torch.from_numpy(pixels), torch.zeros(last - first, dtype=torch.long)

    def at(self, rows: np.ndarray) -> Tensor:
        return torch.cat([self.images(row - row % self.batch, row + 1)[0][-1:] for row in rows.tolist()])


def _measure(metric: str, n: int, answer: Any) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        save_file(RandomLayer().state_dict(), f"{temporary}/{NETWORK}.safetensors")
        os.environ[WEIGHTS] = temporary
        reference = Noise(REFERENCE_IMAGES).images(10**9, 10**9 + REFERENCE_IMAGES)[0]
        dataset = arrow(reference.permute(0, 2, 3, 1).numpy(), Path(temporary) / "data")
        settings = EvalSettings(metrics=(f"{metric}_{NETWORK}",), n_generated=n)
        evaluator = Evaluator(settings, dataset, temporary)
        evaluator.prepare()
        peak, done = [anonymous_megabytes(os.getpid())], threading.Event()

        def watch() -> None:
            while not done.wait(0.01):
                peak.append(max(peak.pop(), anonymous_megabytes(os.getpid())))

        watcher = threading.Thread(target=watch)
        watcher.start()
        started = time.perf_counter()
        (value, *_) = evaluator.evaluate_source(Noise(n)).measurements
        done.set()
        watcher.join()
        answer.put((peak[0], value.value, time.perf_counter() - started))


def main(
    samples: Annotated[str, typer.Option("--n", help="comma-separated numbers of samples")] = "5000,50000",
    metrics: Annotated[str, typer.Option(help="comma-separated, of the random layer's features")] = ",".join(METRICS),
) -> None:
    file = RESULTS / "evaluation_memory.csv"
    rows: list[dict[str, Any]] = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    context = multiprocessing.get_context("spawn")
    for metric, n in itertools.product(metrics.split(","), samples.split(",")):
        if any((r["metric"], r["n"]) == (metric, n) for r in rows):
            continue
        answer = context.Queue()
        process = context.Process(target=_measure, args=(metric, int(n), answer))
        process.start()
        peak, value, seconds = answer.get(timeout=1200)
        process.join()
        row = {"metric": metric, "n": n, "peak_rss_anon_mb": f"{peak:.1f}", "value": value, "seconds": f"{seconds:.1f}"}
        rows.append(row)
        print(row, write("evaluation_memory", rows))


if __name__ == "__main__":
    typer.run(main)
