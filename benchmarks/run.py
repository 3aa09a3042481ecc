"""`python -m benchmarks.run SUITE ...`: the runs of a suite, one after the other; interrupt it and call it again.

A suite is a sweep (diffscale/sweep) with peers and evaluations at its runs' ends: the sweep's ledger plans the runs,
and each trains as `diffscale train` does. The unit of resumption is one run: a run whose records are committed in
benchmarks/results/SUITE/records.jsonl is skipped, an interrupted run resumes from its checkpoint, an evaluation from
the samples it had. Records are copied there whenever a run ends or is stopped, and the suite's report is written again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.console import make_console
from diffscale.core.errors import UserError
from diffscale.core.progress import working
from diffscale.records.schema import Record
from diffscale.records.store import RECORDS_FILE, read_records, write_records_file
from diffscale.training.numerics import settled

app = command_app()
STOPPED = 143


@dataclass(frozen=True)
class Unit:
    """A part of a suite that is done or not. `go` does it and returns whether it reached its end."""

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
    """Run suites of the benchmark, or resume them. Exit code 143: stopped by SIGTERM; the same command resumes."""
    share, wanted = share_of(part), pattern(only)
    for suite in map(load_suite, suites or suite_names()):
        suite = suite.on_gpu() if gpu else suite
        run_suite(suite, gpu, parse_overrides(override or []), results.resolve(), dry_run, share, wanted)


def pattern(only: str) -> re.Pattern[str]:
    """Return the compiled --only. Raise UserError if it is not a regular expression."""
    try:
        return re.compile(only)
    except re.error as error:
        raise UserError(setting="--only", value=only, expected="a regular expression", reason=str(error)) from None


def share_of(part: str) -> slice:
    """Return the slice of --part: 2/3 is the second, fifth, ... unit. Raise UserError for a malformed share."""
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
    """Run the unfinished units of a suite.

    gpu: the suite at its GPU size
    extra: nested settings over those of every run
    results: folder of the folders of results
    dry_run: print what is done and start nothing
    share: of the units, for this process
    wanted: pattern in the units' names
    """
    from diffscale.training.run import prepare  # import cost

    console = make_console()
    experiments = suite.experiments(gpu, extra)
    asked = asked_of(suite, wanted)
    costs = budget(asked, experiments)  # refuses a suite whose peers are not installed, before any data is made
    suite.make_data(experiments[0])
    hashes = [prepare(experiment)[0].content_hash for experiment in experiments]
    units = units_of(asked, experiments, hashes, wanted)
    if not units:
        raise UserError(setting="--only", value=wanted.pattern, expected=f"part of a unit's name in {suite.name}")
    out = results / (f"{suite.name}-gpu" if gpu else suite.name)
    for unit in units:
        keep_records(unit.run_folder, out)  # a killed run has not copied its own
    records = committed(out)
    done = {unit.name: unit.done(records) for unit in units}
    show(console, suite, costs, done)
    if dry_run:
        return
    if all(done[unit.name] for unit in units[share]):  # several machines may have added records
        tabulate(suite, out)
    todo = [unit for unit in units[share] if not done[unit.name]]
    with working(suite.name, len(units[share]), "runs", len(units[share]) - len(todo)) as work:
        for unit in todo:
            if not unit.done(committed(out)):
                console.rule(unit.name, align="left")
                _go(unit, out, console)
                tabulate(suite, out)
            work.advance()


def asked_of(suite: Suite, wanted: re.Pattern[str]) -> Suite:
    """Return the suite with those peers that have a unit whose name matches: the others need not be installed."""
    peers = [p for p in suite.peers if any(wanted.search(peer_run.name_of(suite.name, p.name, w)) for w in p.widths)]
    return suite.model_copy(update={"peers": peers})


def _go(unit: Unit, out: Path, console: Console) -> None:
    """Do a unit and keep its records. Raises typer.Exit if it was stopped."""
    try:
        finished = unit.go()
    finally:
        keep_records(unit.run_folder, out)
    if not finished:
        console.print("stopped; the same command resumes")
        raise typer.Exit(STOPPED)


def units_of(suite: Suite, experiments: list[Experiment], hashes: list[str], wanted: re.Pattern[str]) -> list[Unit]:
    """Return every run in order, the peers, and the evaluations at the runs' ends, filtered by the pattern."""
    runs = [_run_unit(e, h) for e, h in zip(experiments, hashes, strict=True)]
    peers = [
        _peer_unit(PeerRun(suite.name, peer.name, width, experiments[0], peer.flags), hashes[0])
        for peer in suite.peers
        for width in peer.widths
    ]
    ends = [_end_unit(e, h, suite.ends) for e, h in zip(experiments, hashes, strict=True) if suite.ends]
    return [unit for unit in runs + peers + ends if wanted.search(unit.name)]


def _run_unit(experiment: Experiment, content_hash: str) -> Unit:
    from diffscale.training.run import train  # import cost

    def go() -> bool:
        return train(experiment, handle_signals=True).finished

    resolved = settled(experiment, open_training_data(experiment))
    ids = {
        resolved.run_id(content_hash),
        experiment.run_id(content_hash),
    }  # 2nd: before "auto" was part of it

    def done(records: list[Record]) -> bool:
        return any(r.run_id in ids and reached(r, experiment) for r in records)

    name = f"{experiment.name} seed {experiment.train.seed}"
    return Unit(name, resolved.run_folder(content_hash), done, go)


def reached(record: Record, experiment: Experiment) -> bool:
    """Return whether a record is of the end of its run's budget."""
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
    from diffscale.training.checkpoint.layout import list_checkpoints  # import cost
    from diffscale.training.evaluate_runs import evaluate_run  # import cost

    unit, n = _run_unit(experiment, content_hash), int(ends["n_generated"])

    def go() -> bool:
        if not list_checkpoints(unit.run_folder) and not unit.go():  # its records came from another machine
            return False
        evaluate_run(unit.run_folder, [f"eval.{key}={value}" for key, value in ends.items()])
        return True

    def done(records: list[Record]) -> bool:
        return unit.done([r for r in records if r.n_generated == n])

    return Unit(f"{unit.name}, n = {n:,}", unit.run_folder, done, go)


# ---- results


def committed(out: Path) -> list[Record]:
    """Return the records of a suite's results."""
    file = out / RECORDS_FILE
    return read_records([str(file)]) if file.exists() else []


def without_place(record: Record) -> Record:
    """Return a record whose settings do not say where on this machine its run was stored."""
    place = str(record.settings.get("storage") or "STORAGE")

    def hidden(value: Any) -> Any:
        inside = isinstance(value, str) and (value == place or value.startswith(f"{place}/"))
        return f"STORAGE{value[len(place) :]}" if inside else value

    return record.model_copy(update={"settings": {k: hidden(v) for k, v in record.settings.items()}})


def keep_records(run_folder: str, out: Path) -> None:
    """Add the run's records to the suite's records file, and copy its newest sample grid."""
    if storage.list_files(storage.join(run_folder, "records"), ".json"):
        with file_lock(cache_dir() / "benchmarks" / f"{out.name}.lock"):  # two parts of a suite may run at once
            known = {record.record_id: record for record in committed(out)}
            found = {record.record_id: without_place(record) for record in read_records([run_folder])}
            every = found | known  # what is committed stays, also where a run was trained again for its end
            if len(every) > len(known):
                out.mkdir(parents=True, exist_ok=True)
                write_records_file(str(out / RECORDS_FILE), every.values())
    grids = storage.list_files(storage.join(run_folder, "samples"), ".png")
    if grids:
        samples = out / "samples" / Path(run_folder).name
        shutil.rmtree(samples, ignore_errors=True)
        samples.mkdir(parents=True)
        (samples / Path(grids[-1]).name).write_bytes(storage.read_bytes(grids[-1]))


def tabulate(suite: Suite, out: Path) -> None:
    """Write the suite's tables, plots and page from all its records; one image for each figure."""
    from diffscale.report import write_report  # import cost

    write_report([str(out)], out, title=f"diffscale: {suite.name}")
    for twin in (out / "plots").glob("*.svg"):
        twin.unlink()
    if suite.peers:
        against_peers(committed(out)).to_csv(out / "peers.csv", index=False, lineterminator="\n")


def show(console: Console, suite: Suite, table: pd.DataFrame, done: dict[str, bool]) -> None:
    """Print the runs, their expected cost and the unfinished units."""
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
