"""Begins a run at the weights of another one, which was trained here or imported: `train.init_from`."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from torch import Tensor

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.storage import resolve
from diffscale.data import Dataset
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.state import local_rows, local_shard
from diffscale.training.checkpoint.tensors import CheckpointDamaged
from diffscale.training.learner import Learner
from diffscale.training.load import is_run, list_targets


def with_initial_weights(experiment: Experiment, dataset: Dataset) -> Experiment:
    """Return the experiment with one checkpoint as `train.init_from`, and its weights' hash, which is part of run_id.

    Raises UserError for a place without checkpoints, a damaged one, and weights that do not fit the network.
    """
    train = experiment.train
    if train.init_from is None:
        return experiment
    place = resolve(train.init_from, "train.init_from")
    if not is_run(place):
        raise UserError(setting="train.init_from", value=place, expected="a run's folder or a checkpoint of one")
    (checkpoint,) = list_targets(place)
    ema = ck.read_experiment(checkpoint).eval.ema
    with torch.device("meta"):
        model = build_model(experiment, dataset)
    try:
        _check(model.state_dict(), ck.read_weights(checkpoint, ema), train.init_skip)
        digests = {name: info.sha256 for name, info in ck.files_of(checkpoint).items() if name.endswith(".safetensors")}
    except CheckpointDamaged as error:
        raise UserError(
            setting="train.init_from", value=place, expected="an undamaged checkpoint", reason=str(error)
        ) from None
    weights = identify(ema=ck.ema_name(ema), **{n: d for n, d in digests.items() if n.startswith(("model", "ema/"))})
    found = {"init_from": checkpoint, "init_weights": weights}
    return experiment.model_copy(update={"train": train.model_copy(update=found)})


def start_from(learner: Learner, checkpoint: str, skip: tuple[str, ...]) -> None:
    """Give a new learner the weights that the checkpoint's run is evaluated with, in the network and in its averages.

    checkpoint: its `eval.ema` says which average
    skip: patterns of names that keep their random values
    """
    model = learner.model.state_dict()
    weights = ck.read_weights(checkpoint, ck.read_experiment(checkpoint).eval.ema)
    with torch.no_grad():
        for name, target in model.items():
            if not _skipped(name, skip):
                rows = local_rows(target)
                local_shard(target).copy_(weights[name] if rows is None else weights[name][rows[0] : rows[1]])
        for average in learner.ema.averages.values():
            for name, mine in average.items():
                mine.copy_(learner.ema.parameters[name])


def _check(own: dict[str, Tensor], weights: dict[str, Tensor], skip: tuple[str, ...]) -> None:
    """Raise UserError that names the first weight which does not fit."""
    for name, tensor in own.items():
        if _skipped(name, skip):
            continue
        if name not in weights or weights[name].shape != tensor.shape:
            has = tuple(weights[name].shape) if name in weights else "nothing"
            raise UserError(
                setting="train.init_from",
                value=name,
                expected=f"weights of the shape {tuple(tensor.shape)}",
                reason=f"the checkpoint has {has}",
                fix=f'train.init_skip=["{name}"] begins these at random, or model.* as the checkpoint has it',
            )


def _skipped(name: str, skip: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in skip)
