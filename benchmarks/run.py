"""`python -m benchmarks.run SUITE ...`: the runs of a suite, one after the other; cut it off and call it again.

The unit of resumption is one run: a run whose records are committed under benchmarks/results/SUITE/records is
skipped, one that was cut off resumes from its checkpoint. At the end of each run its records are copied there, and
the suite's report is made again from all of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from diffscale import storage
from diffscale.cli import explain, load_experiment, run_app, valid
from diffscale.errors import UserError
from diffscale.experiment import Experiment
from diffscale.records import read_records

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
HERE = Path(__file__).parent


class SuiteRun(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    overrides: list[str] = []
    seeds: list[int] = Field([0], min_length=1)


class Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str = Field(description="what the suite is to show")
    overrides: list[str] = Field([], description="dotted settings of every run")
    runs: list[SuiteRun] = Field(min_length=1)

    def experiments(self, extra: list[str]) -> list[Experiment]:
        return [
            load_experiment(run.preset, [*self.overrides, *run.overrides, f"train.seed={seed}", *extra])
            for run in self.runs
            for seed in run.seeds
        ]


def load_suite(name: str) -> Suite:
    files = {f.stem: f for f in sorted((HERE / "suites").glob("*.yaml"))}
    if name not in files:
        raise UserError(setting="SUITE", value=name, expected=valid(name, files))
    tree: dict[str, Any] = yaml.safe_load(files[name].read_text())
    try:
        return Suite.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Suite, tree) from None


def results_folder(suite: Suite) -> Path:
    return HERE / "results" / suite.name


def is_committed(folder: Path, experiment: Experiment, content_hash: str) -> bool:
    """Whether the run's last evaluation is among the committed records."""
    run_id = experiment.run_id(content_hash)
    rows = [r for r in read_records([str(folder)]) if r.run_id == run_id] if folder.exists() else []
    reached = max((r.images_seen for r in rows), default=0)
    flops = max((r.train_flops for r in rows), default=0.0)
    goal_images, goal_flops = experiment.train.images, experiment.train.flops
    return bool(rows) and (
        (goal_images is not None and reached >= goal_images) or (goal_flops is not None and flops >= goal_flops)
    )


def keep_records(run_folder: str, folder: Path) -> None:
    """Copies the run's record files and sample grids to the suite's results."""
    target = folder / "records"
    target.mkdir(parents=True, exist_ok=True)
    for uri in storage.list_files(storage.join(run_folder, "records"), ".json"):
        (target / Path(uri).name).write_bytes(storage.read_bytes(uri))
    grids = storage.list_files(storage.join(run_folder, "samples"), ".png")
    if grids:
        samples = folder / "samples" / Path(run_folder).name
        shutil.rmtree(samples, ignore_errors=True)
        samples.mkdir(parents=True)
        (samples / Path(grids[-1]).name).write_bytes(storage.read_bytes(grids[-1]))


@app.command()
def main(
    suites: Annotated[list[str] | None, typer.Argument(help="suites to run; none lists them")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the budget table and start nothing")] = False,
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value for every run")] = None,
) -> None:
    """Run suites of the benchmark, or go on with them."""
    from diffscale import train
    from diffscale.build import open_training_data
    from diffscale.report import write_report

    console = Console()
    for suite in map(load_suite, suites or sorted(f.stem for f in (HERE / "suites").glob("*.yaml"))):
        folder = results_folder(suite)
        experiments = suite.experiments(override or [])
        table = Table(title=f"{suite.name}: {suite.about}")
        for name in ("run", "seed", "train FLOPs", "images", "state"):
            table.add_column(name)
        todo = []
        for experiment in experiments:
            done = is_committed(folder, experiment, open_training_data(experiment).content_hash)
            todo += [] if done else [experiment]
            t = experiment.train
            flops = "" if t.flops is None else f"{t.flops:.3g}"
            images = "" if t.images is None else f"{t.images:,}"
            table.add_row(experiment.name, str(t.seed), flops, images, "done" if done else "to do")
        console.print(table)
        if dry_run:
            continue
        for experiment in todo:
            result = train.run(experiment)
            keep_records(result.run_folder, folder)
            write_report([str(folder)], folder)


if __name__ == "__main__":
    run_app(app)
