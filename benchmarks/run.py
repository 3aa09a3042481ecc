"""`python -m benchmarks.run SUITE ...`: the runs of a suite, one after the other; cut it off and call it again.

The unit of resumption is one run: a run whose records are committed under benchmarks/results/SUITE/records is
skipped, one that was cut off resumes from its checkpoint, and an evaluation from the samples it had. Records are
copied there whenever a run ends or is stopped, and the suite's report is made again from all of them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.suites import peer_run
from benchmarks.suites.against_peers import against_peers
from benchmarks.suites.budget import budget
from benchmarks.suites.peer_run import PeerRun
from benchmarks.suites.suite import RESULTS, Suite, load_suite, suite_names
from diffscale.config.experiment import Experiment
from diffscale.config.factory import open_training_data
from diffscale.config.load import parse_overrides
from diffscale.core import storage
from diffscale.core.app import command_app, run_app
from diffscale.core.errors import UserError
from diffscale.records.schema import Record
from diffscale.records.store import read_records
from diffscale.training.numerics import settled

app = command_app()
STOPPED = 143


@dataclass(frozen=True)
class Unit:
    """A part of a suite that is done or not: `go` does it and says whether it got to its end."""

    name: str
    run_folder: str
    done: Callable[[list[Record]], bool]
    go: Callable[[], bool]


@app.command()
def main(
    suites: Annotated[list[str] | None, typer.Argument(help="suites to run; none: all of them")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the budget table and start nothing")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="the suite at its GPU size: 50 times the compute")] = False,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value for every run")] = None,
    only: Annotated[str, typer.Option(help="a regular expression: the units in whose names it is found")] = "",
    part: Annotated[str, typer.Option(help="I/N: every N-th unit from the I-th, for N processes or machines")] = "1/1",
    results: Annotated[Path, typer.Option(help="where records are committed")] = RESULTS,
) -> None:
    """Run suites of the benchmark, or go on with them. Exit code 143: stopped by SIGTERM, to be resumed."""
    share, wanted = share_of(part), pattern(only)
    for suite in map(load_suite, suites or suite_names()):
        suite = suite.on_gpu() if gpu else suite
        run_suite(suite, gpu, parse_overrides(override or []), results.resolve(), dry_run, share, wanted)


def pattern(only: str) -> re.Pattern[str]:
    """Raises UserError for what is no regular expression."""
    try:
        return re.compile(only)
    except re.error as error:
        raise UserError(setting="--only", value=only, expected=f"a regular expression ({error})") from None


def share_of(part: str) -> slice:
    """2/3 → the second, fifth, ... unit. Raises UserError for what is no share."""
    first, _, step = part.partition("/")
    if not (first.isdecimal() and step.isdecimal() and 1 <= int(first) <= int(step)):
        raise UserError(setting="--part", value=part, expected="I/N with 1 ≤ I ≤ N, such as 1/2")
    return slice(int(first) - 1, None, int(step))


def run_suite(
    suite: Suite,
    gpu: bool,
    extra: dict,
    results: Path,
    dry_run: bool,
    share: slice,
    wanted: re.Pattern[str],
) -> None:
    from diffscale import train

    console = Console()
    experiments = suite.experiments(gpu, extra)
    suite.make_data(experiments[0])
    hashes = [train.prepare(experiment)[0].content_hash for experiment in experiments]
    units = units_of(suite, experiments, hashes, wanted)
    if not units:
        raise UserError(setting="--only", value=wanted.pattern, expected=f"what a unit of {suite.name} is called by")
    out = results / (f"{suite.name}-gpu" if gpu else suite.name)
    for unit in units:
        keep_records(unit.run_folder, out)  # of a run that was killed before it could
    records = committed(out)
    done = {unit.name: unit.done(records) for unit in units}
    show(console, suite, budget(suite, experiments), done)
    if dry_run:
        return
    if all(done[unit.name] for unit in units[share]):  # records may have been put there from several machines
        tabulate(suite, out)
    for unit in units[share]:
        if unit.done(committed(out)):
            continue
        console.rule(unit.name, align="left")
        try:
            finished = unit.go()
        finally:
            keep_records(unit.run_folder, out)
        if not finished:
            console.print("stopped; the same command resumes")
            raise typer.Exit(STOPPED)
        tabulate(suite, out)


def units_of(suite: Suite, experiments: list[Experiment], hashes: list[str], wanted: re.Pattern[str]) -> list[Unit]:
    """Every run in order, then the peers, then one more evaluation of each run's end where the suite asks for one; of
    these the ones in whose names the pattern is found."""
    runs = [_run_unit(e, h) for e, h in zip(experiments, hashes, strict=True)]
    peers = [
        _peer_unit(PeerRun(suite.name, peer.name, width, experiments[0]), hashes[0])
        for peer in suite.peers
        for width in peer.widths
    ]
    ends = [_end_unit(e, h, suite.ends) for e, h in zip(experiments, hashes, strict=True) if suite.ends]
    return [unit for unit in runs + peers + ends if wanted.search(unit.name)]


def _run_unit(experiment: Experiment, content_hash: str) -> Unit:
    from diffscale import train

    def go() -> bool:
        return train.run(experiment, handle_signals=True).finished

    resolved = settled(experiment, open_training_data(experiment))
    ids = {resolved.run_id(content_hash), experiment.run_id(content_hash)}  # the second: before "auto" was part of it

    def done(records: list[Record]) -> bool:
        return any(r.run_id in ids and reached(r, experiment) for r in records)

    name = f"{experiment.name} seed {experiment.train.seed}"
    return Unit(name, resolved.run_folder(content_hash), done, go)


def reached(record: Record, experiment: Experiment) -> bool:
    """Whether a record is of the end of its run's budget."""
    images, flops = experiment.train.images, experiment.train.flops
    enough = [images is not None and record.images_seen >= images]
    enough += [flops is not None and record.train_flops >= flops * (1 - 1e-9)]
    return any(enough)


def _peer_unit(peer: PeerRun, content_hash: str) -> Unit:
    def go() -> bool:
        peer_run.run(peer)
        return True

    def done(records: list[Record]) -> bool:
        return any(r.run_id == peer.run_id(content_hash) for r in records)

    return Unit(peer.name, peer.run_folder(content_hash), done, go)


def _end_unit(experiment: Experiment, content_hash: str, ends: dict) -> Unit:
    from diffscale.evaluate import How, evaluate_run

    unit, n = _run_unit(experiment, content_hash), int(ends["n_generated"])

    def go() -> bool:
        how = How(precision="bf16" if experiment.train.precision == "bf16" else "fp32")  # as along the curve
        evaluate_run(unit.run_folder, [f"eval.{key}={value}" for key, value in ends.items()], how)
        return True

    def done(records: list[Record]) -> bool:
        return unit.done([r for r in records if r.n_generated == n])

    return Unit(f"{unit.name}, n = {n:,}", unit.run_folder, done, go)


# ---- results


def committed(out: Path) -> list[Record]:
    return read_records([str(out)]) if (out / "records").exists() else []


def keep_records(run_folder: str, out: Path) -> None:
    """Copies the run's record files and its newest sample grid to the suite's results."""
    target = out / "records"
    for uri in storage.list_files(storage.join(run_folder, "records"), ".json"):
        target.mkdir(parents=True, exist_ok=True)
        (target / Path(uri).name).write_bytes(storage.read_bytes(uri))
    grids = storage.list_files(storage.join(run_folder, "samples"), ".png")
    if grids:
        samples = out / "samples" / Path(run_folder).name
        shutil.rmtree(samples, ignore_errors=True)
        samples.mkdir(parents=True)
        (samples / Path(grids[-1]).name).write_bytes(storage.read_bytes(grids[-1]))


def tabulate(suite: Suite, out: Path) -> None:
    """The suite's tables, plots and page, from all its records."""
    from diffscale.report import write_report

    write_report([str(out)], out, title=f"diffscale: {suite.name}")
    if suite.peers:
        against_peers(committed(out)).to_csv(out / "peers.csv", index=False, lineterminator="\n")


def show(console: Console, suite: Suite, table: pd.DataFrame, done: dict[str, bool]) -> None:
    console.print(f"[bold]{suite.name}[/]: {suite.about}", highlight=False)
    columns = ["run", "seed", "forward_gflop", "train_flops", "points", "n", "training_seconds", "evaluation_seconds"]
    shown = Table("run", "seed", "forward\nGFLOP", "train\nFLOPs", "points", "n", "train\ns", "evaluate\ns", box=None)
    for row in table[columns].itertuples(index=False):
        shown.add_row(*[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row])
    console.print(shown)
    left = [name for name, is_done in done.items() if not is_done]
    console.print(f"{len(done) - len(left)} of {len(done)} units done; to do: {', '.join(left) or 'nothing'}")


if __name__ == "__main__":
    run_app(app)
