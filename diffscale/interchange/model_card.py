"""The card of a model, written from its records: data, recipe, cost, metrics with interval and protocol, licence."""

from __future__ import annotations

import json
from typing import Any

import yaml

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.interchange.families import OPEN
from diffscale.interchange.form import Form, Trained
from diffscale.records.schema import Record
from diffscale.records.store import read_records
from diffscale.training.run_readme import metrics_table

UNSTATED = "not stated; ask whoever trained the model before you use it"
NOT_PASSED_ON = (
    "The weights were converted from published ones whose licence does not allow everyone to pass them on. "
    "Keep this folder to yourself unless that licence permits what you do."
)


def model_card(
    trained: Trained,
    columns: dict[str, Any],
    form: Form,
    to: str,
    imported: dict[str, Any] | None,
    licence: str = "",
) -> str:
    """Return README.md of an exported model, with the front matter that the Hub reads.

    columns: the record's columns that training determines
    form, to: of the export and its name
    imported: what `origin` returns
    licence: of the weights; empty takes that of an import, or says that none is stated
    """
    experiment, ema = trained.experiment, trained.ema
    records = _records(trained.run_folder, columns["images_seen"], ema)
    terms = licence or (imported["licence"] if imported else UNSTATED)
    settings = experiment.dotted()
    lines = [
        _front_matter(experiment, columns, records, to, licence),
        f"# {experiment.name}",
        "",
        f"{columns['model']}, {columns['parameters']:,} parameters, images of {columns['train_resolution']} pixels,",
        f"{_origin(imported, experiment.train.init_from is not None)}",
        "",
        "| | |",
        "|---|---|",
        f"| data | {columns['dataset']} (content {columns['dataset_hash']}) |",
        f"| process | {columns['schedule']}, {columns['interpolant']}, prediction {columns['prediction']}, "
        f"weighting {columns['weighting']} |",
        f"| training | {columns['images_seen']:,} images in batches of {columns['global_batch']:,}, "
        f"{columns['train_flops']:.3g} FLOPs, precision {columns['precision']} |",
        f"| weights | {ema} |",
        f"| run | {columns['run_id']}, commit {columns['commit']} |",
        f"| licence | {terms} |",
        *_autoencoder(trained, to),
        "",
        *([NOT_PASSED_ON, ""] if imported and not imported["may_be_passed_on"] else []),
        "## How to draw images",
        "",
        form.about,
        "",
        "```python",
        *form.usage,
        "```",
        "",
        "## Metrics",
        "",
        *(metrics_table(records) or ["None was measured."]),
        "",
        "## How it was made",
        "",
        *_command(None if experiment.train.init_from else imported),
        "",
        "<details><summary>Settings</summary>",
        "",
        "```json",
        json.dumps({k: v for k, v in settings.items() if k not in ("storage", "data.path", "data.cache")}, indent=1),
        "```",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _autoencoder(trained: Trained, to: str) -> list[str]:
    """Return the row about what decodes a network's latents, and whose licence holds for it."""
    if trained.decoder is None:
        return []
    found = trained.decoder.autoencoder
    name = f"{found.name}, commit {found.revision}" if found.revision else trained.decoder.name
    terms = "the licence that its page on the hub states" if found.revision else "its author's licence, not stated here"
    where = "in `vae/`, " if to == "diffusers" else ""
    return [f"| autoencoder | {name}, {where}under {terms} |"]


def _records(run_folder: str, images_seen: int, ema: str) -> list[Record]:
    if not storage.exists(storage.join(run_folder, "records")):
        return []
    return [r for r in read_records([run_folder]) if r.images_seen == images_seen and r.ema == ema]


def _front_matter(experiment: Experiment, columns: dict[str, Any], records: list[Record], to: str, licence: str) -> str:
    results = [
        {
            "task": {"type": "image-generation"},
            "dataset": {"name": str(columns["dataset"]), "type": str(columns["dataset"])},
            "metrics": [{"type": record.metric, "value": record.value} for record in records],
        }
    ]
    known = licence.lower().replace(" ", "-")
    content: dict[str, Any] = {
        **({"license": known} if known in OPEN else {"license": "other", "license_name": known or "see-below"}),
        "library_name": "diffusers" if to == "diffusers" else "diffscale",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "diffscale", str(columns["model"])],
    }
    if records:
        content["model-index"] = [{"name": experiment.name, "results": results}]
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def _origin(imported: dict[str, Any] | None, tuned: bool) -> str:
    if imported is None:
        return "trained with diffscale."
    return (
        f"{'trained with diffscale from weights ' if tuned else ''}"
        f"imported by diffscale from {imported['file']} (SHA-256 {imported['sha256']}), family {imported['family']}, "
        f"with the settings of the recipe {imported['recipe']}."
    )


def _command(imported: dict[str, Any] | None) -> list[str]:
    if imported is not None:
        return [f"    diffscale import {imported['file']} --family {imported['family']} data.path=DATASET"]
    return [
        "    diffscale train experiment.yaml data.path=DATASET",
        "",
        "experiment.yaml is the settings below as YAML.",
    ]
