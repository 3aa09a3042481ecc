"""README.md of a finished run: what it is, its best value, how to sample, export and cite it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffscale.config.experiment import Experiment
from diffscale.core import storage
from diffscale.core.progress import clock
from diffscale.records.schema import Record, rank
from diffscale.records.store import read_records
from diffscale.training.checkpoint import layout as ck
from diffscale.training.own_records import first_metric

FILE = "README.md"


def write_readme(run_folder: str, experiment: Experiment) -> None:
    """Write the README of a run, from its newest checkpoint and its records; nothing for a run without a checkpoint."""
    checkpoints = ck.list_checkpoints(run_folder)
    if not checkpoints:
        return
    columns = ck.read_state(checkpoints[-1])["record"]
    has_records = storage.exists(storage.join(run_folder, "records"))
    text = readme(run_folder, experiment, columns, read_records([run_folder]) if has_records else [])
    storage.write_bytes(storage.join(run_folder, FILE), text.encode())


def readme(run_folder: str, experiment: Experiment, columns: dict[str, Any], records: Sequence[Record]) -> str:
    """Return the README as Markdown.

    columns: the record's columns that training determines, of the newest checkpoint
    records: of all evaluations of the run
    """
    run = run_folder if storage.is_remote(run_folder) else "."
    metric = first_metric(experiment)
    own = [record for record in records if record.metric == metric]
    lines = [
        f"# {experiment.name}",
        "",
        f"A run of diffscale: {columns['model']} with {columns['parameters']:,} parameters on {columns['dataset']}, "
        f"{columns['train_resolution']} pixels, {columns['images_seen']:,} images seen "
        f"({columns['epochs']:.3g} epochs, {columns['train_flops']:.3g} FLOPs, "
        f"{clock(columns['device_seconds'])} on {columns['devices']} x {columns['device']}).",
        "",
        *_best(metric, own),
        "## Use it",
        "",
        *(["In this folder:", ""] if run == "." else []),
        f"    diffscale sample {run} --n 64",
        f"    diffscale evaluate {run} --n 5000",
        f"    diffscale export {run} ~/{experiment.name} --to safetensors",
        "",
        "## Evaluations",
        "",
        *(metrics_table(sorted(records, key=lambda r: (r.images_seen, r.ema, r.metric))) or ["None was made."]),
        "",
        "## Cite it",
        "",
        "```bibtex",
        f"@misc{{{columns['run_id']},",
        f"  title = {{{experiment.name}: {columns['model']} on {columns['dataset']}}},",
        f"  note = {{diffscale {columns['versions'].get('diffscale', '')}, commit {columns['commit']}, "
        f"run {columns['run_id']}, data {columns['dataset_hash']}, seed {columns['seed']}}}",
        "}",
        "```",
        "",
        "`experiment.yaml` has every setting, `provenance.json` every launch, `records/` one file for each value.",
        "",
    ]
    return "\n".join(lines)


def _best(metric: str, records: Sequence[Record]) -> list[str]:
    if not records:
        return ["It was not evaluated.", ""]
    most = max(record.n_generated for record in records)  # values of other numbers of samples do not compare
    best = min((r for r in records if r.n_generated == most), key=lambda record: rank(record.metric, record.value))
    interval = f" (95 % interval {_interval(best)})" if _interval(best) else ""
    protocol = (
        f"{best.n_generated:,} samples against {best.n_reference:,} reference images at {best.eval_resolution} pixels, "
        f"{best.solver} with {best.nfe} evaluations of the network, guidance {best.guidance_scale:g}"
    )
    warning = [f"Note: {best.warning}.", ""] if best.warning else []
    return [
        f"**Best {metric}: {best.value:.5g}**{interval}, at {best.images_seen:,} images with the weights `{best.ema}`: "
        f"{protocol}.",
        "",
        *warning,
    ]


def _interval(record: Record) -> str:
    known = record.value_low is not None and record.value_high is not None
    return f"{record.value_low:.4g} to {record.value_high:.4g}" if known else ""


def metrics_table(records: Sequence[Record]) -> list[str]:
    """Return the values with their intervals and protocols as lines of a Markdown table; none without records."""
    if not records:
        return []
    several = len({(record.images_seen, record.ema) for record in records}) > 1
    names = ["metric", "value", "95 % interval", "n", "reference images", "pixels", "sampler", "evaluations"]
    rules = ["---", "---:", "---", "---:", "---:", "---:", "---", "---:"]
    rows = [[*(["images seen", "weights"] if several else []), *names], [*(["---:", "---"] if several else []), *rules]]
    for r in records:
        own = [f"{r.images_seen:,}", r.ema] if several else []
        counts = [f"{r.n_generated:,}", f"{r.n_reference:,}", str(r.eval_resolution)]
        sampler = f"{r.solver}, guidance {r.guidance_scale:g}"
        rows.append([*own, r.metric, f"{r.value:.5g}", _interval(r), *counts, sampler, str(r.nfe)])
    return [f"| {' | '.join(row)} |" for row in rows]
