"""Makes a run of a file of published weights, which `evaluate`, `sample`, `export` and `train.init_from` take."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffscale.config.experiment import GIVEN_BY_DATA, Experiment
from diffscale.config.factory import build_model, open_training_data
from diffscale.config.load import load_tree, merge, parse_overrides, validate
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.hashing import digest_of
from diffscale.core.progress import working
from diffscale.data import Dataset
from diffscale.interchange.containers import Source, read_source
from diffscale.interchange.families import Candidate, Family, family_of
from diffscale.interchange.hub_weights import fetch
from diffscale.interchange.renaming import UnfitError, Weights, state_dict_for
from diffscale.models import create_model
from diffscale.models.cost import count_cost
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import write_group
from diffscale.training.load import is_run, settings_of_run
from diffscale.training.parallel import World
from diffscale.training.record_columns import record_columns

FILE = "imported.json"
"""What a run's folder says about the weights that it was made of."""


class Choice(NamedTuple):
    """A network that a file's weights fit."""

    candidate: Candidate
    tree: dict[str, Any]  # settings
    weights: Weights


def import_run(
    file: str | Path, family: str, overrides: Sequence[str] = (), recipe: str | None = None, out: str | None = None
) -> str:
    """Return the folder of the run that holds a file's weights, in our names and float32.

    Raises UserError before anything is written: for an unknown family, a file that cannot be read safely, weights that
    fit none of the family's networks, and data that the network cannot have.

    file: path, or a model on the hub: owner/name[@revision][:file]
    overrides: dotted settings; data.path is needed, since metrics compare with its images
    recipe: whose settings the run has; None tries the family's own until the weights fit
    out: folder of the run; None is one under `storage`
    """
    known = family_of(family)
    with working(f"reading {file}", unit=""):
        fetched = fetch(str(file), family)
        source = read_source(fetched.path, known.parts)
    classes = known.num_classes(source.tensors)
    choice = _fitting(known, source, parse_overrides(overrides), recipe, classes)
    experiment = validate(choice.tree)
    dataset = open_training_data(experiment)
    _check_data(experiment, dataset, choice.candidate.channels, classes)
    model = build_model(experiment, dataset)
    state = state_dict_for(model, choice.weights, known.given)
    folder = out or experiment.run_folder(dataset.content_hash)
    if ck.list_checkpoints(folder):
        raise UserError(setting="--out", value=folder, expected="a folder without checkpoints", fix="--out ANOTHER")
    images = experiment.train.images or 0
    cost = count_cost(lambda: build_model(experiment, dataset), dataset.resolution, dataset.channels, classes)
    columns = record_columns(
        experiment, dataset, cost, World(), images, 0.0, None, None, experiment.train.precision, None
    )
    licence = known.licence.of_page(fetched.licence)
    about = {
        "file": fetched.source,
        "sha256": source.sha256,
        "container": source.container,
        "family": family,
        "recipe": choice.candidate.recipe,
        "licence": licence.name,
        "may_be_passed_on": licence.may_be_passed_on,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    shape = {"resolution": dataset.resolution, "channels": dataset.channels, "num_classes": classes}
    with working(f"writing {folder}", unit=""):
        _write(folder, experiment, state, images, columns | {"device": "imported"}, shape, about)
    return folder


def imported_from(run_folder: str) -> dict[str, Any] | None:
    """Return what `import_run` noted about a run's weights, None for a run that was trained here."""
    uri = storage.join(run_folder, FILE)
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def origin(run: str) -> dict[str, Any] | None:
    """Return what is noted about the published weights that a run was made of or began at, None if there are none.

    run: its folder or a checkpoint
    """
    while True:
        if about := imported_from(ck.run_of(run) or run):
            return about
        start = settings_of_run(run).train.init_from
        if start is None or not is_run(start):
            return None
        run = start


def _fitting(known: Family, source: Source, given: dict[str, Any], recipe: str | None, classes: int) -> Choice:
    """Return the first candidate that the weights fit. Raises UserError with what did not fit the nearest one."""
    candidates = known.candidates
    if recipe is not None:
        like = next((c for c in candidates if c.recipe == recipe), candidates[0])
        candidates = (like._replace(recipe=recipe, changes=()),)
    elif "model" in given:
        candidates = candidates[:1]
    failures: list[tuple[int, Candidate, str]] = []
    for candidate in candidates:
        tree = _settings(known, candidate, source, given, classes)
        with torch.device("meta"):
            model = _network(tree, candidate, classes)
        variant = "swap" if source.config.get("flip_sin_to_cos") is False else candidate.variant
        weights = known.convert(source.tensors, model, variant)
        try:
            state_dict_for(model, weights, known.given)
        except UnfitError as error:
            own = model.state_dict()
            fits = sum(name in own and own[name].shape == t.shape for name, (_, t) in weights.items())
            failures.append((fits, candidate, str(error)))
            continue
        return Choice(candidate, tree, weights)
    _, nearest, why = max(failures, key=lambda failure: failure[0])
    what = nearest.recipe + "".join(f" {change}" for change in nearest.changes)
    raise UserError(
        setting="FILE",
        value=str(source.path),
        expected=f"weights of a network of the family {known.name}; the nearest is {what}",
        reason=why,
        fix="--recipe and model.* settings describe another network",
    )


def _settings(
    known: Family, candidate: Candidate, source: Source, given: dict[str, Any], classes: int
) -> dict[str, Any]:
    """Return the settings of a candidate's run: the published weights are averages already, so eval.ema is none."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.path.stem).strip("-._")[:60] or "weights"
    own = {"name": f"imported-{stem}", "data": {"class_conditional": classes > 0}, "eval": {"ema": "none"}}
    tree = merge(merge(load_tree(candidate.recipe), parse_overrides(candidate.changes)), own)
    if known.settings is not None:
        tree = merge(tree, known.settings(source.config))
    return merge(tree, given)


def _network(tree: dict[str, Any], candidate: Candidate, classes: int) -> torch.nn.Module:
    """Build the network of settings whose data are not known yet."""
    some = validate(merge(tree, {"data": {"path": "builtin:emoji"}}))
    return create_model(
        some.model.name,
        resolution=some.data.resolution,
        channels=candidate.channels,
        num_classes=classes,
        **{key: value for key, value in some.model.arguments().items() if key not in GIVEN_BY_DATA},
    )


def _check_data(experiment: Experiment, dataset: Dataset, channels: int, classes: int) -> None:
    """Raise UserError for data whose channels or classes are not those of the weights."""
    for what, wanted, has in (
        ("channels", channels, dataset.channels),
        ("classes", classes, experiment.num_classes(dataset)),
    ):
        if wanted != has:
            raise UserError(
                setting="data.path",
                value=experiment.data.path,
                expected=f"a dataset of {wanted} {what}, as the weights have",
                reason=f"it has {has}",
            )


def _write(
    folder: str,
    experiment: Experiment,
    state: dict[str, Tensor],
    images: int,
    columns: dict[str, Any],
    shape: dict[str, int],
    about: dict[str, Any],
) -> None:
    """Write the run's folder with one checkpoint; COMPLETE comes last."""
    checkpoint = ck.folder_of(folder, images)
    files = write_group(checkpoint, "model", state, {}, 0, 1)
    texts = {
        "state.json": json.dumps({"images_seen": images, "record": columns, "data": shape}, indent=1).encode(),
        "experiment.yaml": ck.save_settings(experiment),
    }
    for name, data in texts.items():
        storage.write_bytes(storage.join(checkpoint, name), data)
        files[name] = digest_of(storage.join(checkpoint, name))
    storage.write_bytes(storage.join(folder, "experiment.yaml"), texts["experiment.yaml"])
    storage.write_bytes(storage.join(folder, FILE), json.dumps(about, indent=1).encode())
    ck.complete(checkpoint, files)
