"""Counts what simulated ranks ask of an S3 API server to open data, read it, restore and evaluate.

Ranks are threads that meet where real ranks call collectives; eight of them share a node's cache. The server is moto's
on this machine's loopback, with counters in front. Run by its path, it measures the diffscale that PYTHONPATH names,
with the orders and the functions that this tree has: `benchmarks.scaling` compares two trees with it.

    python count_requests.py RANKS [...]      prints one JSON line for each operation
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.config.load import validate
from diffscale.data import Dataset, Loader, ShardCache, open_dataset
from diffscale.data.format.manifest import Manifest, Split, rows_hash, write_manifest
from diffscale.data.format.shard import make_batch, write_shard
from diffscale.evaluation.distribute import run_on_ranks
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint import saver as saving
from diffscale.training.checkpoint.state import Slice
from diffscale.training.checkpoint.tensors import read_group, write_group
from diffscale.training.learner import Learner
from diffscale.training.parallel import World

try:  # a tree whose ranks share the work has these
    from diffscale.data import share_of_batch
    from diffscale.training.checkpoint.restore import restore_newest
    from diffscale.training.shared_dataset import open_for_ranks

    SHARED = True
except ImportError:  # one whose ranks each do all of it
    from diffscale.training.checkpoint.saver import restore as restore_alone  # type: ignore[attr-defined]

    SHARED = False

NODE = 8  # ranks of a node
SHARDS, SHARD_ROWS, BATCH, LANES = 120, 55, 64, 64
FEATURES = 2048  # numbers for each sample of an evaluation


class Counted:
    """A WSGI application that counts the requests and the bytes of its answers."""

    def __init__(self, app: Any) -> None:
        self.app, self.lock = app, threading.Lock()
        self.requests: Counter[str] = Counter()
        self.bytes = 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterator[bytes]:
        with self.lock:
            self.requests[environ["REQUEST_METHOD"]] += 1
        for part in self.app(environ, start):
            with self.lock:
                self.bytes += len(part)
            yield part


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        pass


@contextmanager
def server(kind: type[Counted] = Counted) -> Iterator[Counted]:
    """Yield the counters of a server with the bucket "data", to which this process's storage leads."""
    app = kind(DomainDispatcherApplication(create_backend_app))
    httpd = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{httpd.server_port}",
    }
    boto3.client("s3").create_bucket(Bucket="data")
    try:
        yield app
    finally:
        httpd.shutdown()


class Ranks:
    """Threads that stand for ranks, and what their collectives exchange."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier = size, threading.Barrier(size)
        self.slots: list[Any] = [None] * size
        self.received = [0] * size  # bytes of objects that each rank got from collectives

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """Call `work` with the World of each rank, all at once."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(Simulated(self, rank)), range(self.size)))


class Simulated(World):
    """The World of a simulated rank."""

    ranks: Ranks

    def __init__(self, ranks: Ranks, rank: int) -> None:
        values = {"rank": rank, "size": ranks.size, "device": torch.device("cpu"), "ranks": ranks}
        values |= {"node_rank": rank % NODE, "node_size": min(NODE, ranks.size)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def gather(self, value: Any) -> list[Any]:
        self.ranks.slots[self.rank] = value
        self.ranks.barrier.wait()
        everyone = list(self.ranks.slots)
        self.ranks.barrier.wait()
        return everyone

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]

    def to_first(self, value: Any) -> list[Any]:
        everyone = self.gather(value)
        return everyone if self.rank == 0 else []

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        tensor.copy_(self.gather(tensor)[source])

    def barrier(self) -> None:
        self.ranks.barrier.wait()


def write_data(place: str) -> None:
    """Write a dataset of small shards."""
    rng = np.random.default_rng(0)
    shards = []
    for s in range(SHARDS):
        images = rng.integers(0, 256, (SHARD_ROWS, 8, 8, 3), np.uint8)
        shards.append(
            write_shard(place, f"train-{s:05d}.arrow", make_batch(images, [s % 4] * SHARD_ROWS, [""] * SHARD_ROWS))
        )
    content = rows_hash("uint8", 8, 3, shards)
    split = Split(rows=SHARDS * SHARD_ROWS, content_hash=content, mean=[0.0] * 3, std=[1.0] * 3, shards=shards)
    fields: dict[str, Any] = {"layout": "pixels", "dtype": "uint8", "resolution": 8, "channels": 3, "lossy": False}
    fields |= {"class_names": [*"0123"], "content_hash": content, "resize": {}, "source": {}, "made_with": {}}
    write_manifest(place, Manifest(**fields, splits={"train": split}))


def settings(cache: str) -> Any:
    """Return the settings of a run on the dataset, with the cache of its node."""
    return validate(
        {
            "name": "requests",
            "storage": "s3://data/storage",
            "data": {"path": "s3://data/set", "resolution": 8, "cache": cache},
            "model": {
                "name": "unet",
                "model_channels": 16,
                "channel_mult": [1],
                "num_blocks": 1,
                "attn_resolutions": [],
            },
            "train": {"images": 10**6, "global_batch": BATCH, "trackers": []},
            "eval": {"n_generated": 0},
        }
    )


def opened(world: World, cache: str) -> Dataset:
    return open_for_ranks(settings(cache), world) if SHARED else open_training_data(settings(cache))


def loader(dataset: Dataset, world: World, stop: int) -> Loader:
    form: dict[str, Any] = {"order": "blocks", "window": 8, "shard": world.share(BATCH)}
    if SHARED:
        share = share_of_batch("lanes", BATCH, world.rank, world.size, LANES)
        form = {"order": "lanes", "lanes": LANES, "shard": share}
    return Loader(dataset, seed=0, global_batch=BATCH, stop=stop, **form)


def learner(dataset: Dataset, cache: str) -> Learner:
    e = settings(cache)
    return Learner(build_model(e, dataset), build_diffusion(e, dataset), e, World(), num_classes=4)


def restore(of: Learner, world: World) -> None:
    run = "s3://data/run"
    if SHARED:
        assert restore_newest(of, run, world) is not None
        return
    found = world.from_first(ck.newest_good(run) if world.rank == 0 else None)
    restore_alone(of, found)


class NoImages:
    """A source of images that are not looked at."""

    n, batch = 0, 64


def evaluate(world: Any, ranks: Ranks) -> None:
    """Exchange the features of one chunk of 64 samples for each rank; count the bytes that each rank receives."""

    def features(*_: Any) -> dict[str, Any]:
        return {"features": np.zeros((64, FEATURES), np.float32)}

    def counted(collective: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        def call(value: Any) -> list[Any]:
            found = collective(value)
            others = [found[r] for r in range(len(found)) if r != world.rank]
            ranks.received[world.rank] += sum(len(pickle.dumps(other)) for other in others)
            return found

        return call

    more = {"to_first": counted(world.to_first)} if SHARED else {}
    ranges = [(64 * i, 64 * i + 64) for i in range(world.size)]
    chunks = run_on_ranks(NoImages(), features, ranges, world.rank, world.size, counted(world.gather), **more)  # type: ignore[arg-type]
    for _ in chunks:
        pass


def write_sharded(of: Learner, size: int) -> None:
    """Write the weights of a learner as FSDP2 ranks would: each a slice of the rows of every tensor."""
    for rank in range(size):
        parts, places = {}, {}
        for name, tensor in of.model.state_dict().items():
            rows = len(tensor) if tensor.ndim else 0
            chunk = -(-rows // size)
            parts[name] = tensor[rank * chunk : (rank + 1) * chunk] if tensor.ndim else tensor
            places[name] = Slice(min(rank * chunk, rows), rows) if tensor.ndim else None
        write_group(f"s3://data/sharded-{size}", "model", parts, places, rank, size)


def read_sharded(world: World) -> None:
    def rows(_: str, shape: tuple[int, ...]) -> tuple[int, int]:
        chunk = -(-shape[0] // world.size)
        return min(world.rank * chunk, shape[0]), min((world.rank + 1) * chunk, shape[0])

    names = [f"model.{rank:05d}-of-{world.size:05d}.safetensors" for rank in range(world.size)]
    more: dict[str, Any] = {"files": names if world.size > 1 else ["model.safetensors"]} if SHARED else {}
    read_group(f"s3://data/sharded-{world.size}", "model", rows, **more)


def measure(size: int, counts: Counted, work: Path) -> Iterator[dict[str, Any]]:
    """Yield what each operation costs with a number of ranks."""
    ranks, before = Ranks(size), (0, 0)
    caches = [str(work / f"cache-{size}-{rank // NODE}") for rank in range(size)]

    def cost(operation: str, **more: Any) -> dict[str, Any]:
        nonlocal before
        now = sum(counts.requests.values()), counts.bytes
        requests, received = now[0] - before[0], now[1] - before[1]
        before = now
        row = {"operation": operation, "ranks": size, "requests": requests, "requests_per_rank": requests / size}
        return row | {"bytes": received, "bytes_per_rank": received / size} | more

    cost("")
    datasets = ranks.run(lambda world: opened(world, caches[world.rank]))
    yield cost("open")
    ranks.run(lambda world: drain(loader(datasets[world.rank], world, BATCH)))
    yield cost("first batch")
    ranks.run(lambda world: drain(loader(datasets[world.rank], world, datasets[0].n)))
    held = [sum(f.stat().st_size for f in Path(cache).glob("*.arrow")) for cache in dict.fromkeys(caches)]
    share = sum(shard.bytes for shard in datasets[0].split.shards) / len(held)
    yield cost("epoch", bytes_of_a_node=max(held), of_its_share=max(held) / share)
    learners = [learner(datasets[0], caches[0]) for _ in range(size)]
    cost("")
    ranks.run(lambda world: restore(learners[world.rank], world))
    whole = sum(info.bytes for info in ck.files_of(ck.list_checkpoints("s3://data/run")[-1]).values())
    row = cost("restore")
    yield row | {"of_the_checkpoint": row["bytes"] / whole}
    write_sharded(learners[0], size)
    cost("")
    ranks.run(read_sharded)
    yield cost("restore sharded weights")
    ranks.run(lambda world: evaluate(world, ranks))
    yield cost(
        "evaluate a round", received_by_a_rank=int(np.median(ranks.received)), received_by_rank_0=ranks.received[0]
    )


def drain(batches: Loader) -> None:
    with batches:
        for _ in batches:
            pass


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, server() as counts:
        os.environ["DIFFSCALE_CACHE"] = f"{work}/cache"
        write_data("s3://data/set")
        of = learner(open_dataset("s3://data/set", cache=ShardCache(f"{work}/one")), f"{work}/one")
        of.images_seen = BATCH
        for p in of.model.parameters():
            p.grad = torch.zeros_like(p)
        of.optimizer.step()  # so that there is optimizer state to restore
        saver = saving.Saver("s3://data/run", 0, 1, "one", ck.save_settings(of.experiment), lambda _: None)
        saver.save(saving.snapshot(of, {"record": {}, "data": {}}, 0))
        saver.wait()
        for size in map(int, sys.argv[1:]):
            for row in measure(size, counts, Path(work)):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
