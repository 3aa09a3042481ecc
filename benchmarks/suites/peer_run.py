"""One run of another project's recipe (peers.py): trained to the suite's FLOPs and evaluated like our runs."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.peers import RECIPES, Recipe
from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_solver, open_training_data
from diffscale.core import storage
from diffscale.core.hashing import identify
from diffscale.data import Dataset, Loader
from diffscale.evaluation import make_evaluator
from diffscale.evaluation.sampling import given_batch
from diffscale.records.schema import Record
from diffscale.training.checkpoint_evaluation import evaluate_checkpoint
from diffscale.training.ema import Weights
from diffscale.training.numerics import Numerics
from diffscale.training.parallel import World
from diffscale.training.record_columns import record_columns
from diffscale.training.validation_loss import validation_loss

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class PeerRun:
    """A peer at one width, with the data, training FLOPs and evaluation of the run `like`."""

    suite: str
    peer: str
    width: int
    like: Experiment
    flags: dict[str, int | float] = field(default_factory=dict)  # of the peer's script, other than its defaults

    @property
    def name(self) -> str:
        return name_of(self.suite, self.peer, self.width)

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
            **self.flags,
        )

    def run_folder(self, content_hash: str) -> str:
        return storage.join(self.like.storage, "runs", f"{self.name}-{self.run_id(content_hash)}")


def name_of(suite: str, peer: str, width: int) -> str:
    return f"{suite}-{peer}-{width}"


def version_of(peer: str) -> str:
    return metadata.version(peer)


def run(peer: PeerRun) -> list[Record]:
    """Train or resume the peer, evaluate its average and write the records into its run folder."""
    torch.set_num_threads(peer.like.train.cpus_per_worker)
    dataset = open_training_data(peer.like)
    folder = peer.run_folder(dataset.content_hash)
    torch.manual_seed(peer.like.train.seed)
    recipe = RECIPES[peer.peer](peer.width, dataset.resolution, peer.flops, device_of(peer.like), **peer.flags)
    images_seen, seconds = train(peer, recipe, dataset, Path(folder) / "peer.pt")
    return evaluate(peer, recipe, dataset, folder, images_seen, seconds)


def device_of(like: Experiment) -> torch.device:
    """Return the device on which our runs would train on this machine."""
    wanted = like.train.gpu if like.train.gpu != "auto" else torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


def train(peer: PeerRun, recipe: Recipe, dataset: Dataset, file: Path) -> tuple[int, float]:
    """Train to the end and return (images seen, seconds). A checkpoint every minute lets a killed run resume."""
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


def evaluate(
    peer: PeerRun, recipe: Recipe, dataset: Dataset, folder: str, images_seen: int, seconds: float
) -> list[Record]:
    """Evaluate the trained network as our runs are evaluated at their end."""
    evaluator = make_evaluator(peer.like, dataset, device=recipe.device)
    model, world = recipe.averaged(), World(device=recipe.device)
    val_loss, by_logsnr = validation_loss(
        model,
        dataset.heldout,
        recipe.diffusion,
        Numerics(),
        world,
        batch=given_batch(peer.like.eval),
        threads=peer.like.train.cpus_per_worker,
    )
    columns = _columns(peer, recipe, dataset, world, images_seen, seconds)
    return evaluate_checkpoint(
        evaluator,
        Weights(model, "peer"),
        recipe.diffusion,
        evaluator.sampling(build_solver(peer.like), precision="fp32"),
        columns | {"val_loss": val_loss, "val_loss_by_logsnr": by_logsnr},
        run_folder=folder,
        evaluated_on="training workers",
        work=Path(folder),
    )


def _columns(
    peer: PeerRun, recipe: Recipe, dataset: Dataset, world: World, images_seen: int, seconds: float
) -> dict[str, Any]:
    """Return the columns of a record that training determines: those of our runs, with the recipe's own values."""
    columns = record_columns(
        peer.like,
        dataset,
        recipe.cost,
        world,
        images_seen,
        seconds,
        energy_joules=None,
        train_loss=None,
        precision="fp32",
        launches=None,
    )
    settings = {"peer": peer.peer, "version": version_of(peer.peer)} | recipe.settings
    return columns | {
        "run_id": peer.run_id(dataset.content_hash),
        "run_name": peer.name,
        "model": peer.peer,
        "schedule": recipe.schedule,
        "interpolant": recipe.diffusion.interpolant,
        "prediction": recipe.diffusion.prediction,
        "weighting": "uniform_" + recipe.diffusion.prediction,
        "input_scale": 1.0,
        "global_batch": recipe.batch,
        "endpoint": recipe.endpoint,
        "settings": {f"peer.{k}": v for k, v in settings.items()},
    }


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
