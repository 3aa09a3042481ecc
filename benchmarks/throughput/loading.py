"""Data loading against a bare gather and against peers: `python -m benchmarks.throughput.loading [PART ...]`.

gather      batches of 32x32 uint8 delivered, to a numpy gather from RAM with the same order ready-made (target >= 0.5)
peers       the same rows through Ray Data iter_torch_batches (>= 10 x), Hugging Face datasets, WebDataset
decode      256x256 encoded images delivered, to the decoder alone on the same number of cores (>= 0.9)
step        seconds that a training step waits for the loader, of the step's seconds (<= 1 %, measured directly)
memory      anonymous memory (RssAnon) after reading a dataset and one of ten times its size
first       seconds from opening a local dataset to its first batch (<= 1 s, imports excluded)
build       anonymous memory of a whole build of large images, all its processes together, and its limit
shuffle     how well the blocked order shuffles: classes of a batch, for shards stored sorted by class or shuffled

Images are random pixels of CIFAR-10's size and number: no reader's speed depends on what they show; for `decode` they
are the embedded emoji, enlarged, as a decoder's speed does. Results: benchmarks/results/throughput/loading_*.csv
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from PIL import Image

from benchmarks.common.measure import race, write
from benchmarks.reliability.soak import anonymous_megabytes
from diffscale.data import Dataset, Loader, open_dataset, positions_to_indices, resolve
from diffscale.data.build.decode import encode
from diffscale.data.format.manifest import Manifest, Shard, Split, rows_hash, write_manifest
from diffscale.data.format.shard import make_batch, write_shard
from diffscale.data.loading.order import permutation
from diffscale.kernels.runtime import configure_process

BATCH = 256
PAIRS = 15
DECODE_PAIRS = 60
PARTS = ("gather", "peers", "decode", "step", "memory", "first", "build", "shuffle")


def write_dataset(folder: str, parts: Iterator[np.ndarray | list[bytes]], side: int) -> Dataset:
    """A dataset of these parts, one shard each; labels are row % 10."""
    shards: list[Shard] = []
    start = 0
    layout = "pixels"
    for s, images in enumerate(parts):
        layout = "encoded" if isinstance(images, list) else "pixels"
        labels = np.arange(start, start + len(images)) % 10
        shards.append(write_shard(folder, f"train-{s:05d}.arrow", make_batch(images, labels, [""] * len(images))))
        start += len(images)
    content = rows_hash("uint8", side, 3, shards)
    split = Split(rows=start, content_hash=content, mean=[0.0] * 3, std=[1.0] * 3, shards=shards)
    manifest = Manifest(
        layout=layout,
        dtype="uint8",
        resolution=side,
        channels=3,
        class_names=[*"0123456789"],
        content_hash=content,
        lossy=False,
        resize={},
        source={},
        made_with={},
        splits={"train": split},
    )
    write_manifest(folder, manifest)
    return open_dataset(folder)


def pixels(n: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def drain(loader: Loader) -> int:
    with loader:
        return sum(len(batch) for batch in loader)


def bare_gather(ram: np.ndarray, order: np.ndarray) -> Callable[[], int]:
    def gather() -> int:
        return sum(len(ram[order[i : i + BATCH]]) for i in range(0, len(order), BATCH))

    return gather


def measure_gather(work: str) -> list[dict[str, Any]]:
    images, epochs = pixels(50_000), 4
    ram = images.copy()
    rows = []
    for shards in (1, 8):
        dataset = write_dataset(f"{work}/gather-{shards}", iter(np.array_split(images, shards)), 32)
        order = positions_to_indices(np.arange(epochs * dataset.n), dataset.n, 0)
        for raw in (True, False):
            loader = Loader(dataset, seed=0, global_batch=BATCH, stop=len(order), raw=raw, verify=False)
            found = race(partial(drain, loader), bare_gather(ram, order), len(order), PAIRS)
            what = "uint8" if raw else "float32 in [-1, 1]"
            rows.append({"what": f"{what}, {shards} shards", "against": "numpy gather from RAM", **found})
    return rows


def measure_peers(work: str) -> list[dict[str, Any]]:
    import datasets
    import pyarrow as pa  # import cost
    import pyarrow.parquet as pq  # import cost
    import webdataset

    from diffscale.distributed import connect as ray_session  # import cost

    count = 20_000
    images = pixels(count)
    dataset = write_dataset(f"{work}/peers", iter([images]), 32)
    flat = images.reshape(count, -1)
    columns: dict[str, list[Any]] = {
        "image": [row.tobytes() for row in flat],
        "label": (np.arange(count) % 10).tolist(),
    }

    pq.write_table(pa.table(columns), f"{work}/peers.parquet", compression="none", row_group_size=1000)
    peer = datasets.Dataset.from_dict(columns)
    peer.save_to_disk(f"{work}/peers-hf")
    stored = datasets.load_from_disk(f"{work}/peers-hf")
    with tarfile.open(f"{work}/peers.tar", "w") as archive:
        for i, row in enumerate(columns["image"]):
            for suffix, data in (("bin", row), ("cls", str(i % 10).encode())):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    ray_session.connect()
    # Ray reads the variables that connect() sets when it is imported.
    import ray  # import cost

    ray.data.DataContext.get_current().enable_progress_bars = False

    def ours() -> int:
        return drain(Loader(dataset, seed=0, global_batch=BATCH, stop=count, raw=True, verify=False))

    def unpack(batch: Any) -> Any:
        joined = np.frombuffer(b"".join(batch["image"]), np.uint8)
        return {"image": joined.reshape(-1, 32, 32, 3), "label": batch["label"]}

    def ray_data() -> int:
        data = ray.data.read_parquet(f"{work}/peers.parquet").map_batches(unpack)
        batches = data.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=4096)
        return sum(len(batch["label"]) for batch in batches)

    def collate(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        joined = np.frombuffer(b"".join(row["image"] for row in rows), np.uint8).reshape(-1, 32, 32, 3)
        return torch.from_numpy(joined.copy()), torch.tensor([row["label"] for row in rows])

    def hugging_face(workers: int) -> int:
        loader = torch.utils.data.DataLoader(
            stored,
            BATCH,
            shuffle=True,
            collate_fn=collate,
            num_workers=workers,
        )
        return sum(len(labels) for _, labels in loader)

    def web() -> int:
        stream = webdataset.WebDataset(f"{work}/peers.tar", shardshuffle=False).shuffle(1000)
        stream = stream.to_tuple("bin", "cls").map_tuple(lambda b: np.frombuffer(b, np.uint8).reshape(32, 32, 3), int)
        return sum(len(labels) for _, labels in stream.batched(BATCH))

    peers: list[tuple[str, Callable[[], int]]] = [
        ("Ray Data iter_torch_batches", ray_data),
        ("Hugging Face datasets, DataLoader, 0 workers", lambda: hugging_face(0)),
        ("Hugging Face datasets, DataLoader, 2 workers", lambda: hugging_face(2)),
        ("WebDataset, 0 workers", web),
    ]
    rows = [{"what": "uint8", "against": name, **race(ours, call, count, PAIRS)} for name, call in peers]
    ray.shutdown()
    return rows


def measure_decode(work: str) -> list[dict[str, Any]]:
    """Against Pillow's decoding to an array, in the same number of threads.

    Both begin every turn with new threads, on the same processors: JPEG decoding was seen at two speeds, 1.5 times
    apart, which a thread mostly kept; why was not found.
    """
    emoji = open_dataset(resolve("builtin:emoji", 64, work)).gather(np.arange(256))[0].numpy()
    everywhere = os.sched_getaffinity(0)
    rows = []
    for form in ("png", "webp", "jpeg"):
        files = [_encoded(image, form) for image in emoji]
        folder = write_dataset(f"{work}/decode-{form}", iter([files]), 256).path
        for threads in (1, 2):
            os.sched_setaffinity(0, sorted(everywhere)[:threads])

            def ours(folder: str = folder) -> int:
                return drain(Loader(open_dataset(folder), seed=0, global_batch=64, stop=1024, raw=True, verify=False))

            def alone(files: list[bytes] = files * 4, threads: int = threads) -> None:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(_decode, np.array_split(np.array(files, object), 4 * threads)))

            found = race(ours, alone, 1024, DECODE_PAIRS)
            rows.append({"what": f"256x256 {form}", "against": f"the decoder alone, {threads} threads", **found})
    os.sched_setaffinity(0, everywhere)
    return rows


def _decode(files: Iterable[bytes]) -> None:
    for data in files:
        with Image.open(io.BytesIO(data)) as image:
            np.asarray(image)


def _encoded(image: np.ndarray, form: str, side: int = 256) -> bytes:
    large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    if form == "jpeg":
        out = io.BytesIO()
        large.save(out, "JPEG", quality=95)
        return out.getvalue()
    return encode(large, form)  # type: ignore[arg-type]


def measure_step(work: str) -> list[dict[str, Any]]:
    """A convolutional training step on the CPU, batches from the loader: how long next() blocks."""
    dataset = write_dataset(f"{work}/step", iter([pixels(10_000)]), 32)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 3, 3, padding=1)
    )
    optimizer = torch.optim.AdamW(network.parameters())
    blocked, total = [], []
    with Loader(dataset, seed=0, global_batch=64, flip=True) as loader:
        batches = iter(loader)
        fixed = next(batches)
        for step in range(70):
            begin = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - begin
            loss = (network(batch.images) - fixed.images).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= 10:
                blocked.append(waited)
                total.append(time.perf_counter() - begin)
    shares = np.array(blocked) / np.array(total)
    draws = np.random.default_rng(0).choice(shares, (10_000, len(shares))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return [
        {
            "what": "share of the step spent waiting for the loader",
            "step_ms": round(1e3 * float(np.median(total)), 3),
            "blocked_share": round(float(shares.mean()), 5),
            "low": round(float(low), 5),
            "high": round(float(high), 5),
            "target": 0.01,
            "threads": torch.get_num_threads(),
        }
    ]


def _rss_anon(folder: str, answer: Any) -> None:
    """Measure in a fresh process: anonymous memory after 200 batches over the whole dataset."""
    dataset = open_dataset(folder)
    with Loader(dataset, seed=0, global_batch=BATCH, stop=200 * BATCH, verify=True) as loader:
        for _ in loader:
            pass
        loader.wait_verified()
    status = Path("/proc/self/status").read_text().splitlines()
    answer.put(next(int(line.split()[1]) for line in status if line.startswith("RssAnon")))


def measure_memory(work: str) -> list[dict[str, Any]]:
    rows = []
    context = multiprocessing.get_context("spawn")
    for times in (1, 10):
        folder = f"{work}/memory-{times}"
        dataset = write_dataset(folder, (pixels(20_000, seed=s) for s in range(times)), 32)
        values = []
        for _ in range(3):
            answer = context.Queue()
            process = context.Process(target=_rss_anon, args=(folder, answer))
            process.start()
            values.append(answer.get())
            process.join()
        size = sum(shard.bytes for shard in dataset.split.shards) / 1e6
        rows.append(
            {"images": dataset.n, "dataset_mb": round(size, 1), "rss_anon_mb": round(np.median(values) / 1e3, 1)}
        )
    return rows


def measure_first(work: str) -> list[dict[str, Any]]:
    folder = write_dataset(f"{work}/first", iter([pixels(50_000)]), 32).path
    seconds = []
    for _ in range(PAIRS):
        begin = time.perf_counter()
        with Loader(open_dataset(folder), seed=0, global_batch=BATCH, flip=True) as loader:
            next(iter(loader))
            seconds.append(time.perf_counter() - begin)
    return [
        {
            "what": "open_dataset to first batch",
            "median_s": round(float(np.median(seconds)), 4),
            "worst_s": round(max(seconds), 4),
            "target_s": 1.0,
        }
    ]


def measure_build(work: str) -> list[dict[str, Any]]:
    """Peak MB of the tasks, which the limit is for, and of all processes that the command started, Ray's too."""
    source, count, side = f"{work}/images.zip", 1500, 1024
    images = [_encoded(image, "jpeg", side) for image in pixels(8, 64)]
    with zipfile.ZipFile(source, "w") as archive:
        for i in range(count):
            archive.writestr(f"{i % 10}/{i:05d}.jpg", images[i % len(images)])
    rows = []
    for limit in (2.0, 4.0):
        command = [sys.executable, "-m", "diffscale.data", "build", source, f"{work}/built-{limit}"]
        command += ["--resolution", "256", "--resolution", "64", "--layout", "pixels", "--memory", str(limit)]
        started = time.perf_counter()
        build = psutil.Popen(command, stdout=subprocess.DEVNULL)
        tasks, everything = 0.0, 0.0
        while build.poll() is None:
            held = _anonymous_of(build)
            everything = max(everything, sum(held.values()))
            tasks = max(tasks, sum(mb for name, mb in held.items() if "map" in name.lower()))
            time.sleep(0.1)
        if build.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {build.returncode}")
        rows.append(
            {
                "images": count,
                "side": side,
                "limit_mb": 1e3 * limit,
                "tasks_peak_mb": round(tasks, 1),
                "all_processes_peak_mb": round(everything, 1),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    return rows


def _anonymous_of(command: psutil.Process) -> dict[str, float]:
    """Megabytes of anonymous memory of a command and all that it has started, by the process's number and title."""
    held = {}
    for process in [command, *command.children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):
            held[f"{process.pid} {' '.join(process.cmdline())[:60]}"] = anonymous_megabytes(process.pid)
    return held


def measure_shuffle(work: str) -> list[dict[str, Any]]:
    """A dataset of 64 shards of 4,000 rows, 1,000 classes: classes in a batch of 256, and the share of near rows.

    stored sorted: by class, as an image folder lists them; shuffled: as `data build` stores folders and archives.
    """
    n, classes, block = 64 * 4000, 1000, 4000
    expected = classes * (1 - (1 - 1 / classes) ** BATCH)
    storing = permutation(n, 0, 5).forward(np.arange(n))
    rows = []
    forms: list[dict[str, Any]] = [{"order": "rows"}]
    forms += [{"order": "blocks", "block_rows": block, "window": window} for window in (1, 2, 4, 16, 64)]
    forms += [{"order": "blocks", "block_rows": 64, "window": 512}]
    forms += [{"order": "lanes", "block_rows": block, "window": 1, "lanes": lanes} for lanes in (64, 1024)]
    for stored, form in itertools.product(("sorted", "shuffled"), forms):
        index = positions_to_indices(np.arange(n), n, 0, **form)
        labels = (index if stored == "sorted" else storing[index]) * classes // n
        found = [len(np.unique(labels[i : i + BATCH])) for i in range(0, n - BATCH, BATCH)]
        rows.append(
            {
                "stored": stored,
                "order": form["order"],
                "block_rows": form.get("block_rows", 1),
                "window": form.get("window", n),
                "lanes": form.get("lanes", 1),
                "share_near": round(_rows_near(form, n) / n, 4),
                "classes_per_batch": round(np.mean(found), 1),
                "fewest": min(found),
                "classes_per_batch_uniform": round(expected, 1),
                "neighbours_of_one_class": round(float(np.mean(labels[1:] == labels[:-1])), 5),
                "neighbours_of_one_class_uniform": 1 / classes,
            }
        )
    return rows


def _rows_near(form: dict[str, Any], n: int) -> int:
    """Rows from which an order draws at a time."""
    return min(n, form.get("block_rows", 1) * form.get("window", n) * form.get("lanes", 1))


def main(parts: Annotated[list[str] | None, typer.Argument(help=", ".join(PARTS))] = None) -> None:
    configure_process(int(os.environ.get("OMP_NUM_THREADS", "1")), torch.device("cpu"))  # as a training worker does
    measures: dict[str, Callable[[str], list[dict[str, Any]]]] = {
        "gather": measure_gather,
        "peers": measure_peers,
        "decode": measure_decode,
        "step": measure_step,
        "memory": measure_memory,
        "first": measure_first,
        "build": measure_build,
        "shuffle": measure_shuffle,
    }
    for part in parts or PARTS:
        with tempfile.TemporaryDirectory() as work:
            os.environ["DIFFSCALE_CACHE"] = f"{work}/cache"
            rows = measures[part](work)
        print(write(f"loading_{part}", rows))
        for row in rows:
            print("  ", *(f"{key}={value}" for key, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
