"""Builds Arrow shards from a source of images with Ray Data (`python -m diffscale.data build`).

    list the source as units (local files, so that a later call can continue), print what was found
    ->  Ray Data: do_unit, in parallel
    ->  Ray Data: merge parts into shards  ->  rejected.csv, manifest.json (last: a folder with one is complete)

The same command continues after any interruption and repeats no finished task. The rows, their order and the content
hash depend only on the source and the choices, not on workers, memory or interruptions.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console

from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.places import require_writable
from diffscale.core.progress import working
from diffscale.data.build.decode import Preparation
from diffscale.data.build.finalize import merge_jobs, write_manifests
from diffscale.data.build.fingerprint import check_finished, check_interrupted
from diffscale.data.build.items import Kind, Reading
from diffscale.data.build.listing import describe, list_source
from diffscale.data.build.tasks import PART_BYTES, BuildPlan, do_unit, load_json, merge
from diffscale.data.format.manifest import FILE, Layout, read_manifest
from diffscale.distributed import connect as ray_session

MEGABYTE = 1 << 20
PROCESS = 620 * MEGABYTE  # a Ray worker with its libraries (most of it shared between workers)
GROUP = 3  # memory of a row group while it is unpacked, in multiples of its bytes
PIXEL = 18  # bytes per pixel of the largest image: decoding takes 15.3 (grey or colour with alpha), plus the file
PIXELS_UP_TO = 128  # side; larger images are stored encoded
MOST_UNIT_ROWS = 20_000

OnTask = Callable[[str, int], None]


def _ignore(title: str, index: int) -> None:
    pass


@dataclass(frozen=True)
class BuildOptions:
    """What to build, from what, and with which resources."""

    source: str  # absolute path or URI
    target: str  # dataset folder, absolute path or URI
    resolutions: tuple[int, ...]  # pixels; several make one folder each (TARGET/64, ...)
    kind: Kind = "auto"
    preparation: Preparation = field(default_factory=Preparation)
    layout: Literal["auto", "pixels", "encoded"] = "auto"  # auto is pixels up to 128
    encoding: Literal["webp", "png"] = "webp"  # lossless form of large resized images
    split: float = 0.0  # share of images held out, if the source has no split
    split_seed: int = 0  # another choice of held-out images
    shuffle: bool | None = None  # store rows in a pseudo-random order, so that `data.order=blocks` shuffles well; None
    #     does so for folders and archives, which are sorted by class, but not for tables and arrays
    labels: str | None = None  # CSV of files and labels
    image_column: str | None = None  # of the images, in a table; in a tar their extension
    label_column: str | None = None  # of the labels, in the CSV or in a table; in a tar an extension; or none
    config: str | None = None  # configuration of a Hugging Face dataset, or a pattern such as *
    split_names: str | None = None  # train=NAME,heldout=NAME, or none
    folders: str | None = None  # what each level of folders is, for example */split/class
    memory: int | None = None  # bytes for all tasks together; None is half of the free memory
    workers: int | None = None  # upper bound on tasks at once; 0 works in this process, without Ray
    strict: bool = False  # stop at the first image that cannot be used
    shard_bytes: int = 256 * MEGABYTE
    unit_bytes: int = PART_BYTES  # pixels of the images in one unit at the largest resolution

    def reading(self) -> Reading:
        """Return the choices about how the source is read."""
        return Reading(**{f.name: getattr(self, f.name) for f in fields(Reading)})


def build(options: BuildOptions, show: bool = True, on_task: OnTask = _ignore) -> list[str]:
    """Build the dataset and return its folders, one for each resolution.

    options: what to build
    show: print the plan of the build
    on_task: called with `units` or `shards` and the index of each task that ends

    Raises UserError for an invalid source or option, an unusable image with `strict`, a target that holds another
    dataset, or a memory limit too small for one task.
    """
    source, target, folders, sides = _check(options)
    require_writable(target, "DATASET")
    work = _work_folder(target)
    with file_lock(cache_dir() / "locks" / identify(target=target)):  # one build of a folder at a time on this node
        wanted = _plan(options, source, sides)
        identity = identify(plan=wanted.to_json())
        if _is_complete(folders, identity):
            check_finished(folders[0], source, options.reading(), show)
            return folders
        plan, images = _prepare(options, wanted, identity, work, show)
        results = _do_units(work, plan, images, options, on_task)
        built = dict(zip(map(str, plan.resolutions), folders, strict=True))
        _finish(work, plan, identity, built, results, options, on_task)
        shutil.rmtree(work)
    return folders


def _check(options: BuildOptions) -> tuple[str, str, list[str], list[int]]:
    """Return source, target, the folder of each resolution, and the resolutions. Raises UserError."""
    source = storage.check_absolute(options.source, "SOURCE", written=False)
    target = storage.check_absolute(options.target, "DATASET")
    sides = sorted(set(options.resolutions))
    if any(side < 1 or side > 8192 for side in sides):
        raise UserError(setting="--resolution", value=sides, expected="1 to 8192 pixels")
    if not 0 <= options.split < 1:
        raise UserError(setting="--split", value=options.split, expected="a share from 0 to below 1")
    folders = [target if len(sides) < 2 else storage.join(target, str(side)) for side in sides] or [target]
    return source, target, folders, sides


def _work_folder(target: str) -> Path:
    """Return the folder of unfinished work: next to a local dataset, so that the cluster's workers share it; in the
    user's cache for a remote one."""
    if storage.is_remote(target):
        return cache_dir() / "builds" / identify(target=target)
    folder = Path(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent / f".{folder.name}.build"


def _plan(options: BuildOptions, source: str, sides: list[int]) -> BuildPlan:
    def layout(side: int) -> Layout:
        if options.layout != "auto":
            return options.layout
        return "pixels" if side <= PIXELS_UP_TO else "encoded"

    most = max(sides, default=64)
    return BuildPlan(
        source=source,
        kind=options.kind,
        resolutions=sides,
        layouts={str(side): layout(side) for side in sides},
        preparation=options.preparation,
        encoding=options.encoding,
        split=options.split,
        split_seed=options.split_seed,
        shuffle=options.shuffle,
        labels=options.labels,
        reading=_chosen(options.reading()),
        shard_bytes=options.shard_bytes,
        unit_rows=max(1, min(MOST_UNIT_ROWS, options.unit_bytes // (most * most * options.preparation.channels))),
    )


def _chosen(reading: Reading) -> dict[str, str]:
    """Return the choices that a person made, except those that a plan has a field for."""
    choices = {f.name: getattr(reading, f.name) for f in fields(reading) if f.name not in ("kind", "labels")}
    return {name: value for name, value in choices.items() if value is not None}


def _prepare(
    options: BuildOptions, plan: BuildPlan, identity: str, work: Path, show: bool
) -> tuple[BuildPlan, int | None]:
    """List the source unless an interrupted build has done so.

    Return the plan, completed from the source, and the number of images; None where an older version listed them.

    Raises UserError if the interrupted build had other options, or if the source has changed since.
    """
    state = load_json(work / "state.json")
    if state is not None:
        if state["identity"] != identity:
            raise UserError(
                setting="DATASET",
                value=options.target,
                expected="the options of the interrupted build of this folder",
                fix=f"repeat that command, or remove {work} to start again",
            )
        plan = BuildPlan.from_json((work / "plan.json").read_text())
        check_interrupted(work, plan, options.reading())
        _show(work, show)
        return plan, state.get("images")
    shutil.rmtree(work, ignore_errors=True)
    for name in ("units", "parts", "done", "shards", "spool"):
        (work / name).mkdir(parents=True)
    try:
        listing = list_source(plan, options.reading(), work / "spool", work)
        (work / "plan.txt").write_text(describe(listing), "utf-8")
        _show(work, show)
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    images = listing.counts.total()
    storage.write_bytes(str(work / "state.json"), json.dumps({"identity": identity, "images": images}).encode())
    return listing.plan, images


def _show(work: Path, show: bool) -> None:
    """Print the plan of a build, also of one that continues."""
    text = work / "plan.txt"
    if show and text.exists():
        Console().print(text.read_text("utf-8"), markup=False, highlight=False, soft_wrap=True)


def examine(options: BuildOptions) -> str:
    """Return what `build` would read, as text for a person; nothing is written. Raises UserError where it would."""
    source, _, folders, sides = _check(options)
    plan = _plan(options, source, sides)
    if _is_complete(folders, identify(plan=plan.to_json())):
        check_finished(folders[0], source, options.reading(), False)
    with tempfile.TemporaryDirectory(prefix="diffscale-") as spool:
        return describe(list_source(plan, options.reading(), Path(spool)))


def _do_units(
    work: Path, plan: BuildPlan, images: int | None, options: BuildOptions, on_task: OnTask
) -> list[dict[str, Any]]:
    """Do the units that have no result yet; return the results of all units in order. images: in all units."""
    units = sorted(int(f.stem) for f in (work / "units").glob("*.json"))
    results = {index: load_json(work / "done" / f"{index:06d}.json") for index in units}
    found = {index: result for index, result in results.items() if result is not None}
    todo = [index for index in units if index not in found]
    refused = json.loads((work / "refused.json").read_text())
    if options.strict and refused:
        raise _unusable(*refused[0])
    tasks = [{"index": index} for index in todo]

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return do_unit(str(work), row["index"])

    memory = PART_BYTES * 5 + PIXEL * plan.preparation.max_pixels + GROUP * plan.group_bytes
    done = sum(result["seen"] for result in found.values())
    with working("preparing", images, done=done) as progress:
        for index, result in _run(tasks, call, memory, options):
            found[index] = result
            progress.advance(result["seen"])
            on_task("units", index)
            if options.strict and result["rejected"]:
                raise _unusable(*result["rejected"][0])
    bad = [rejected for index in units for rejected in found[index]["rejected"]]
    if options.strict and bad:  # of a build that began without --strict
        raise _unusable(*bad[0])
    return [found[index] for index in units]


def _unusable(name: str, reason: str) -> UserError:
    return UserError(
        setting="SOURCE",
        value=name,
        expected="a usable image",
        reason=reason,
        fix="without --strict, unusable images are listed in rejected.csv and left out",
    )


def _run(
    rows: list[dict[str, Any]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    memory: int,
    options: BuildOptions,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Run the tasks with Ray Data, as many at once as memory allows; yield (index, result) as each one ends."""
    if not rows:
        return
    limit = options.memory or psutil.virtual_memory().available // 2
    each = PROCESS + memory
    fitting = limit // each
    if not fitting:
        raise UserError(
            setting="--memory",
            value=f"{limit / 1e9:.2f} GB",
            expected=f"at least {each / 1e9:.2f} GB for one task",
            fix="allow more, or a smaller --max-pixels",
        )
    if options.workers == 0:
        for row in rows:
            yield row["index"], work(row)
        return
    ray_session.connect()
    import ray  # import cost; and Ray reads its settings when it is imported, so connect() comes first
    from ray.data import DataContext, TaskPoolStrategy  # import cost

    cpus = int(ray.cluster_resources().get("CPU", 1))
    at_once = max(1, min(options.workers or cpus, cpus, fitting, len(rows)))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the build shows its own progress

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "result": json.dumps(work(row))}

    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        call, num_cpus=1, compute=TaskPoolStrategy(at_once)
    )
    for row in data.iter_rows():
        yield row["index"], json.loads(row["result"])


def _finish(
    work: Path,
    plan: BuildPlan,
    identity: str,
    folders: dict[str, str],
    results: list[dict[str, Any]],
    options: BuildOptions,
    on_task: OnTask,
) -> None:
    """Merge parts into shards and write the manifests."""
    jobs = merge_jobs(work, plan, folders, results)
    todo = [{**job, "index": i} for i, job in enumerate(jobs) if load_json(Path(str(job["done"]))) is None]

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return merge(str(work), row)

    memory = plan.shard_bytes * 2 + PART_BYTES
    with working("writing", len(jobs), "shards", done=len(jobs) - len(todo)) as progress:
        for index, _ in _run(todo, call, memory, options):
            progress.advance()
            on_task("shards", index)
    write_manifests(work, plan, identity, folders, results)


def _is_complete(folders: list[str], identity: str) -> bool:
    """Return whether the same build has finished. Raises UserError if the folders hold another dataset."""
    present = [folder for folder in folders if storage.exists(storage.join(folder, FILE))]
    for folder in present:
        if read_manifest(folder).source.get("plan") != identity:
            raise UserError(
                setting="DATASET",
                value=folder,
                expected="a new folder",
                reason="this one holds another dataset",
                fix="choose another folder, or remove this one",
            )
    return len(present) == len(folders)
