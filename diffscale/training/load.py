"""A trained network and all that it takes to draw images from it: what `sample` and `evaluate` start from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, open_training_data
from diffscale.config.load import merge, parse_overrides, parse_yaml, validate
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Dataset, open_dataset, resolve
from diffscale.diffusion import Diffusion
from diffscale.training.checkpoint import layout as ck
from diffscale.training.numerics import Numerics

__all__ = ["Trained", "find_checkpoints", "is_run", "load_trained", "settings_of_run", "solver_settings"]

CHANGEABLE = ("eval", "storage")


@dataclass(frozen=True)
class Trained:
    """One checkpoint with one average of its weights. columns: those of a record that training determined."""

    experiment: Experiment
    model: nn.Module
    diffusion: Diffusion
    dataset: Dataset
    images_seen: int
    columns: dict[str, Any]
    run_folder: str
    ema: str

    def at_eval_resolution(self) -> Dataset | None:
        """The training images at `eval.eval_resolution`, where that is set and another."""
        side, data = self.experiment.eval.eval_resolution, self.experiment.data
        if side is None or side == self.dataset.resolution:
            return None
        return open_dataset(resolve(data.path, side, self.experiment.storage))

    @property
    def label(self) -> str:
        return f"{self.experiment.name} {self.images_seen:,} images, {self.ema}"


def is_run(target: str) -> bool:
    """Whether it is a run's folder or one checkpoint of a run."""
    return any(storage.exists(storage.join(target, name)) for name in ("checkpoints", ck.COMPLETE))


def find_checkpoints(target: str, which: str = "last") -> list[str]:
    """The checkpoints that a RUN or CHECKPOINT means. which: last (the newest undamaged one), all, or images seen.

    Raises UserError when there is none.
    """
    if storage.exists(storage.join(target, ck.COMPLETE)):
        return [target.rstrip("/")]
    if which == "last":
        newest = ck.newest_good(target, for_resuming=False)
        found = [newest] if newest else []
    else:
        found = [c for c in ck.list_checkpoints(target) if which == "all" or str(ck.images_of(c)) == which]
    if not found:
        have = ", ".join(str(ck.images_of(c)) for c in ck.list_checkpoints(target)) or "none"
        raise UserError(setting="checkpoint", value=which, expected=f"last, all, or images seen; {target} has: {have}")
    return found


def settings_of_run(checkpoint: str, overrides: Iterable[str] = (), solver: str | None = None) -> Experiment:
    """The run's settings with other `eval` settings laid over them: `eval.n_generated=50000`. Anything else would make
    it another run: UserError. solver: "heun" or "heun,steps=18", short for the settings of eval.solver."""
    changes = parse_overrides(overrides)
    for section in changes:
        if section not in CHANGEABLE:
            expected = "eval.* or storage: other settings were fixed when the run was trained"
            raise UserError(setting="OVERRIDE", value=section, expected=expected)
    uri = storage.join(checkpoint, "experiment.yaml")
    tree = merge(parse_yaml(storage.read_bytes(uri).decode(errors="replace"), uri), changes)
    if solver is not None:
        tree = merge(tree, {"eval": {"solver": solver_settings(solver)}})
    return validate(tree)


def solver_settings(text: str) -> dict[str, Any]:
    """`heun,steps=18,grid=karras` as settings."""
    name, *rest = text.split(",")
    return {"name": name, **parse_overrides(rest)}


def load_trained(checkpoint: str, ema: str, experiment: Experiment) -> Trained:
    """Raises UserError for a damaged checkpoint, an average that was not tracked, or data that is not there."""
    _, model, images_seen, columns = ck.load_for_sampling(checkpoint, ema)
    dataset = open_training_data(experiment)
    run_folder = checkpoint.rpartition("/checkpoints/")[0]
    return Trained(
        experiment,
        _numerics_of(run_folder).prepare(model),
        build_diffusion(experiment, dataset),
        dataset,
        images_seen,
        columns,
        run_folder,
        ck.ema_name(ema),
    )


def _numerics_of(run_folder: str) -> Numerics:
    """How the run computed, less its compiling, which sampling would wait for; the defaults where nothing says so."""
    uri = storage.join(run_folder, "numerics.json")
    if not run_folder or not storage.exists(uri):
        return Numerics()
    try:
        return replace(Numerics(**json.loads(storage.read_bytes(uri))["numerics"]), compile=False)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(setting="RUN", value=uri, expected=f"the numerics that training wrote ({error})") from None
