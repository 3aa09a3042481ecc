"""One run of another project's recipe (benchmarks/suites/peers.py): trained to the suite's FLOPs, evaluated like our runs."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.peers import RECIPES, Recipe
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_solver, open_training_data
from diffscale.core import storage
from diffscale.core.device import device_name, money
from diffscale.core.provenance import source, versions
from diffscale.data import Dataset, Loader
from diffscale.evaluation import Evaluator
from diffscale.records.store import Record, identify, write_record
from diffscale.training.checkpoint_evaluation import make_record

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class PeerRun:
    """A peer at one width, beside the runs of `like`: the same data, training FLOPs and evaluation."""

    suite: str
    peer: str
    width: int
    like: Experiment

    @property
    def name(self) -> str:
        return f"{self.suite}-{self.peer}-{self.width}"

    @property
    def flops(self) -> float:
        assert self.like.train.flops is not None
        return self.like.train.flops

    def run_id(self, content_hash: str) -> str:
        """The length is part of it: a recipe's learning rate may depend on where it ends."""
        return identify(
            peer=self.peer,
            width=self.width,
            flops=self.flops,
            seed=self.like.train.seed,
            data=content_hash,
            version=version_of(self.peer),
            flip=self.like.data.flip,
        )

    def run_folder(self, content_hash: str) -> str:
        return storage.join(self.like.storage, "runs", f"{self.name}-{self.run_id(content_hash)}")


def version_of(peer: str) -> str:
    return metadata.version(peer)


def run(peer: PeerRun) -> list[Record]:
    """Trains it, or goes on with it, evaluates its average and writes the records into its run folder."""
    torch.set_num_threads(peer.like.train.cpus_per_worker)
    dataset = open_training_data(peer.like)
    folder = peer.run_folder(dataset.content_hash)
    torch.manual_seed(peer.like.train.seed)
    recipe = RECIPES[peer.peer](peer.width, dataset.resolution, peer.flops, device_of(peer.like))
    images_seen, seconds = train(peer, recipe, dataset, Path(folder) / "peer.pt")
    return judge(peer, recipe, dataset, folder, images_seen, seconds)


def device_of(like: Experiment) -> torch.device:
    """Where our runs would train on this machine."""
    wanted = like.train.gpu if like.train.gpu != "auto" else torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


def train(peer: PeerRun, recipe: Recipe, dataset: Dataset, file: Path) -> tuple[int, float]:
    """Images seen and seconds of training at the end; every minute a checkpoint, from which a killed run goes on."""
    images_seen, seconds = _load(recipe, file)
    loader = Loader(
        dataset,
        seed=peer.like.train.seed,
        global_batch=recipe.batch,
        start=images_seen,
        flip=recipe.flip,
    )
    with loader:
        batches, saved, mark = iter(loader), time.monotonic(), time.monotonic()
        while images_seen * recipe.cost.flops_per_image < peer.flops:
            torch.manual_seed(peer.like.train.seed * 1_000_003 + images_seen)
            recipe.step(next(batches).images)
            images_seen += recipe.batch
            now = time.monotonic()
            seconds, mark = seconds + now - mark, now
            if now - saved > SAVE_SECONDS:
                _save(recipe, file, images_seen, seconds)
                print(f"{peer.name}: {images_seen:,} images, {seconds:.0f} s", flush=True)
                saved = mark = time.monotonic()
    _save(recipe, file, images_seen, seconds)
    return images_seen, seconds


def judge(
    peer: PeerRun, recipe: Recipe, dataset: Dataset, folder: str, images_seen: int, seconds: float
) -> list[Record]:
    """The same evaluation as our runs get at their end, features kept until it is complete."""
    e = peer.like
    evaluator = Evaluator(e.eval, dataset, e.storage, heldout=dataset.heldout, device=recipe.device)
    evaluator.prepare()
    sampling = evaluator.sampling(build_solver(e), precision="fp32")
    evaluation = evaluator.evaluate(
        recipe.averaged(), recipe.diffusion, sampling, folder=Path(folder) / f"evaluating-{images_seen:09d}"
    )
    if evaluation.grid_png is not None:
        storage.write_bytes(storage.join(folder, "samples", f"images-{images_seen:09d}.png"), evaluation.grid_png)
    columns = _columns(peer, recipe, dataset, images_seen, seconds)
    records = [make_record(columns, m, sampling, recipe.diffusion, "peer") for m in evaluation.measurements]
    for record in records:
        write_record(folder, record)
    return records


def _columns(peer: PeerRun, recipe: Recipe, dataset: Dataset, images_seen: int, seconds: float) -> dict[str, Any]:
    commit, dirty = source()
    cost, d = recipe.cost, recipe.diffusion
    settings = {"peer": peer.peer, "version": version_of(peer.peer)} | recipe.settings
    return {
        "run_id": peer.run_id(dataset.content_hash), "run_name": peer.name, "model": peer.peer,
        "parameters": cost.parameters, "schedule": recipe.schedule, "interpolant": d.interpolant,
        "prediction": d.prediction, "weighting": "uniform_" + d.prediction, "input_scale": 1.0,
        "dataset": peer.like.data.path.rpartition("/")[2], "dataset_hash": dataset.content_hash,
        "dataset_lossy": dataset.lossy, "train_resolution": dataset.resolution, "seed": peer.like.train.seed,
        "global_batch": recipe.batch, "precision": "fp32", "images_seen": images_seen,
        "epochs": images_seen / dataset.n, "endpoint": recipe.endpoint, "forward_macs": cost.forward_macs,
        "flops_per_image": cost.flops_per_image, "train_flops": cost.flops_per_image * images_seen,
        "device_seconds": seconds, "device": device_name(recipe.device), "devices": 1, "energy_joules": None,
        "cost": money(seconds, peer.like.train.price_per_device_hour), "train_loss": None, "val_loss": None,
        "val_loss_by_logsnr": None, "commit": commit, "dirty": dirty, "versions": versions(),
        "settings": {f"peer.{k}": v for k, v in settings.items()}, "evaluated_on": "training workers",
    }  # fmt: skip


def _save(recipe: Recipe, file: Path, images_seen: int, seconds: float) -> None:
    state = {name: part.state_dict() for name, part in recipe.parts.items()}
    buffer = io.BytesIO()
    torch.save({"images_seen": images_seen, "seconds": seconds, "parts": state}, buffer)
    storage.write_bytes(str(file), buffer.getvalue())


def _load(recipe: Recipe, file: Path) -> tuple[int, float]:
    if not file.exists():
        return 0, 0.0
    saved = torch.load(file, map_location=recipe.device, weights_only=True)
    for name, part in recipe.parts.items():
        part.load_state_dict(saved["parts"][name])
    return int(saved["images_seen"]), float(saved["seconds"])
