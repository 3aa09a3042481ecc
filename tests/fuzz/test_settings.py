"""Random settings from and around every range: each is refused with a UserError, or three training steps run.

The values are drawn from the settings models themselves, so a new setting is tried without a change here. Without
DIFFSCALE_FUZZ_SECONDS the test tries a few dozen for 20 s; a tree that once failed is in FIXED.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import pytest
import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, build_solver
from diffscale.config.load import merge, validate
from diffscale.config.unions import Choice
from diffscale.core.errors import UserError
from diffscale.diffusion import Guidance, keyed_noise, sample
from diffscale.training.parallel import World
from diffscale.training.run import count
from diffscale.training.settings_check import check_settings
from diffscale.training.trainer import Trainer

SECONDS = float(os.environ.get("DIFFSCALE_FUZZ_SECONDS", "20"))
FIRST_SEED = int(os.environ.get("DIFFSCALE_FUZZ_SEED", "0"))
BATCH = 4
MOST_MACS, MOST_PARAMETERS, MOST_LAYERS, MOST_STEPS = 3e7, 2e6, 400, 60

TINY: dict[str, dict[str, Any]] = {
    "unet": {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "edm2": {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "uvit": {"conv_widths": [8], "width": 16, "depth": 1, "num_heads": 2, "embedding_width": 16},
    "rin": {
        "interface_width": 16,
        "latents": 8,
        "latent_width": 16,
        "num_blocks": 1,
        "layers": 1,
        "latent_heads": 2,
        "rw_heads": 2,
    },
    "dit": {"width": 16, "depth": 1, "num_heads": 2},
    "jit": {"width": 16, "depth": 2, "num_heads": 2, "bottleneck": 8, "context_tokens": 2, "context_start": 1},
    "hdit": {"patch_size": 2, "widths": [16, 16], "depths": [1, 1], "head": 8, "mapping_width": 16},
}
BASE: dict[str, Any] = {
    "name": "drawn",
    "data": {"resolution": 8},
    "model": {"name": "unet", **TINY["unet"]},
    "train": {"images": 3 * BATCH, "global_batch": BATCH, "gpu": False, "compile": False, "trackers": []},
    "eval": {"n_generated": 0, "solver": {"name": "ddim", "steps": 4}},
}
LEFT_OUT = {"name", "storage", "train.compile", "train.gpu", "train.cpus_per_worker"}
LEFT_OUT |= {f"data.{key}" for key in ("path", "cache", "decoder", "loader")}
"""Settings of places and machines, and one that takes minutes: tests of their own hold them."""
WORDS = {
    "optim.name": ["adamw", "adam", "sgd", "lamb", "muon", "lion", "rmsprop", "adafactor", "kron", "adamm", ""],
    "eval.metrics": ["fid", "kid", "fd_efficientnet_lite0", "precision", "fdd", ""],
    "eval.resize": ["default", "clean", "tf1", "lanczos", ""],
    "eval.ema": ["none", "halflife", "0.05", "0.5", "std0.100", "last", ""],
}

FIXED: list[dict[str, Any]] = [
    {"optim": {"betas": [0.9, 1.5]}},
    {"train": {"workers": [4, 2]}},
    {"train": {"workers": 0}},
    {"train": {"seed": 2**64}},
    {"train": {"ema": {"power": [0.05, 0.0501]}}},
    {"eval": {"guidance_interval": [5, -5], "guidance_scale": 2}},
    {"model": {"name": "dit", **TINY["dit"], "out_channels": 1}},
    {"model": {"name": "hdit", **TINY["hdit"], "head": 0}},
    {"model": {"resample_filter": [1, -1]}},
    {"model": {"model_channels": 1, "channel_mult": [0.5]}},
    {"diffusion": {"schedule": {"name": "sigmoid_gamma", "tau": 1e-3}}},
    {"diffusion": {"multiscale_loss": True}, "data": {"resolution": 48}},
    {"diffusion": {"weighting": "learned_uncertainty"}},
    {"train": {"activation_checkpointing": True}},
]


class Leaf(typing.NamedTuple):
    """One setting that can be drawn."""

    key: str  # dotted; that of an alternative of a union contains its name: model[dit].width
    annotation: Any
    metadata: tuple[Any, ...]


def leaves(model: type[BaseModel] = Experiment, prefix: str = "") -> Iterator[Leaf]:
    """Yield every setting of the schema."""
    for name, field in model.model_fields.items():
        key = prefix + name
        models = [m for m in members(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        if models and issubclass(models[0], Choice):
            yield Leaf(f"{key}.name", typing.Literal[tuple(m.model_fields["name"].default for m in models)], ())
            for m in models:
                own = m.model_fields["name"].default
                for inner, f in m.model_fields.items():
                    if inner != "name":
                        yield Leaf(f"{key}[{own}].{inner}", f.annotation, tuple(f.metadata))
        elif models:
            yield from leaves(models[0], f"{key}.")
        elif key not in LEFT_OUT:
            yield Leaf(key, field.annotation, tuple(field.metadata))


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of a union, or the type itself."""
    if typing.get_origin(annotation) is typing.Annotated:
        return members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for option in typing.get_args(annotation) for m in members(option)]
    return [annotation]


def draw(rng: random.Random, leaf: Leaf) -> Any:
    """Return a value from, on the edge of, or beyond the range of a setting."""
    if leaf.key in WORDS:
        words = WORDS[leaf.key]
        return [rng.choice(words)] if leaf.key == "eval.metrics" else rng.choice(words)
    return value_of(rng, leaf.annotation, leaf.metadata)


def value_of(rng: random.Random, annotation: Any, metadata: tuple[Any, ...]) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        more = [b for m in arguments[1:] for b in (m.metadata if isinstance(m, FieldInfo) else [m])]
        return value_of(rng, arguments[0], (*metadata, *more))
    if origin in (typing.Union, types.UnionType):
        return value_of(rng, rng.choice(arguments), metadata)
    if origin is typing.Literal:
        return rng.choice([*arguments, rng.choice([*arguments, "nonsense", -1])])
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return [value_of(rng, arguments[0], ()) for _ in range(rng.choice([0, 1, 2, 2, 3]))]
        return [value_of(rng, a, ()) for a in arguments]
    if annotation is type(None):
        return None
    if annotation is bool:
        return rng.random() < 0.5
    low = next((m.ge for m in metadata if isinstance(m, annotated_types.Ge)), None)
    low = next((m.gt for m in metadata if isinstance(m, annotated_types.Gt)), low)
    high = next((m.le for m in metadata if isinstance(m, annotated_types.Le)), None)
    high = next((m.lt for m in metadata if isinstance(m, annotated_types.Lt)), high)
    if annotation is int:
        edges = [v for bound in (low, high) if bound is not None for v in (bound - 1, bound, bound + 1)]
        return rng.choice([*edges, 0, -1, 2**64, *([rng.randint(1, 8), rng.choice([4, 8, 12, 16, 32])] * 4)])
    if annotation is float:
        edges = [
            v for bound in (low, high) if bound is not None for v in (bound, math.nextafter(bound, math.inf), -bound)
        ]
        inside = [rng.uniform(low or 0, min(high if high is not None else 8.0, 8.0)) for _ in range(4)]
        return rng.choice([*edges, math.inf, math.nan, 10.0 ** rng.uniform(-6, 4), *inside])
    return rng.choice(["", "nonsense"])


def tree_of(key: str, value: Any) -> dict[str, Any]:
    """Return a value under its dotted key; one of an alternative chooses the alternative, in a small size."""
    *parents, last = key.split(".")
    tree: Any = {last: value}
    for part in reversed(parents):
        section, _, alternative = part.partition("[")
        if alternative:
            name = alternative.removesuffix("]")
            tree = {"name": name, **(TINY[name] if section == "model" else {}), **tree}
        elif section == "model" and last == "name" and value in TINY:
            tree = {"name": value, **TINY[value]}
        tree = {section: tree}
    return tree


def drawn(seed: int) -> dict[str, Any]:
    """Return one to three random settings."""
    rng, tree = random.Random(seed), dict[str, Any]()
    every = list(leaves())
    for leaf in rng.sample(every, rng.choice([1, 1, 2, 3])):
        tree = merge(tree, tree_of(leaf.key, draw(rng, leaf)))
    return tree


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


def refused_or_trained(changes: dict[str, Any], place: Path) -> str:
    """Return what became of the settings; raise what the training raised."""
    try:
        experiment = validate(merge(BASE | {"storage": str(place)}, changes))
        dataset = check_settings(experiment)
    except UserError:
        return "refused"
    train = experiment.train
    with torch.device("meta"):
        layers = sum(1 for _ in build_model(experiment, dataset).modules())
    if layers > MOST_LAYERS:
        return "too large to try"
    cost = count(experiment, dataset)
    if cost.forward_macs > MOST_MACS or cost.parameters > MOST_PARAMETERS or train.global_batch > 64:
        return "too large to try"
    ends = {"images": 3 * train.global_batch, "flops": None, "device_seconds": None}
    experiment = experiment.model_copy(
        update={
            "name": f"drawn-{random.getrandbits(40):x}",
            "train": train.model_copy(update=ends),
            "eval": experiment.eval.model_copy(update={"n_generated": 0}),
        }
    )
    trainer = Trainer(experiment, experiment.run_folder(dataset.content_hash), World(), cost)
    outcome = trainer.run()
    assert outcome.reason in ("finished", "wall", "nonfinite"), outcome
    assert outcome.reason != "nonfinite" or trainer.state.skipped < 3, "the loss was never finite"
    solver = build_solver(experiment)
    if solver.steps <= MOST_STEPS and outcome.reason == "finished":
        draw_two(experiment, dataset, solver)
    return outcome.reason


def draw_two(experiment: Experiment, dataset: Any, solver: Any) -> None:
    """Draw two images with a fresh network, as an evaluation would."""
    model = build_model(experiment, dataset).eval()
    shape = (dataset.channels, dataset.resolution, dataset.resolution)
    label = torch.zeros(2, dtype=torch.int64) if experiment.num_classes(dataset) else None
    settings = experiment.eval
    images = sample(
        build_diffusion(experiment, dataset),
        model,
        torch.randn(2, *shape),
        solver=solver,
        label=label,
        guidance=Guidance(settings.guidance_scale, settings.guidance_interval),
        noise_fn=keyed_noise(0, torch.arange(2), shape),
    )
    assert images.shape == (2, *shape)


@pytest.mark.parametrize("changes", FIXED, ids=json.dumps)
def test_settings_that_once_failed(changes: dict[str, Any], place: Path) -> None:
    refused_or_trained(changes, place)


def test_random_settings_are_refused_or_train(place: Path) -> None:
    torch.set_num_threads(1)
    began, seed, found = time.monotonic(), FIRST_SEED, dict[str, int]()
    while time.monotonic() - began < SECONDS:
        changes = drawn(seed)
        try:
            became = refused_or_trained(changes, place)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {json.dumps(changes)}") from error
        found[became] = found.get(became, 0) + 1
        seed += 1
    print(found)
    assert {"refused", "finished"} <= set(found)
