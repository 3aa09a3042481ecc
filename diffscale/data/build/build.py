"""`python -m diffscale.data build`: a source of images to Arrow shards, with Ray Data.

    list the source into units (local files, so that a later call goes on)  ->  Ray Data: do_unit, in parallel
    ->  Ray Data: merge parts into shards  ->  rejected.csv, manifest.json (last: a folder with one is complete)

Taken up again after any interruption by the same command; what is done is not done again. The rows, their order and the
content hash depend on the source and the choices only, not on workers, memory or interruptions.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build import sources
from diffscale.data.build.decode import Preparation
from diffscale.data.build.finalize import merge_jobs, write_manifests
from diffscale.data.build.tasks import PART, PIXELS_UP_TO, Plan, do_unit, load_json, merge, save_unit
from diffscale.data.format.cache import cache_root, locked
from diffscale.data.format.manifest import FILE, Layout, read_manifest
from diffscale.distributed import connect as ray_session
from diffscale.records.store import identify

MEGABYTE = 1 << 20
PROCESS = 620 * MEGABYTE  # a Ray worker with its libraries (most of it shared between workers)
GROUP = 3  # times its own bytes that a row group takes while it is unpacked
PIXEL = 18  # bytes for each pixel of the largest image: decoding takes 15.3 (grey or colour with alpha), and the file


@dataclass(frozen=True)
class Settings:
    """source, target: paths or URIs. resolutions: one dataset folder each when there are several (TARGET/64, ...).

    layout: `pixels`, `encoded`, or `auto` (pixels up to 128). encoding: lossless form of resized large images. split:
    share held out, where the source has no split of its own. shuffle: store the rows in a pseudo-random order, so that
    `data.order=blocks` shuffles well; None does for folders and archives, which come sorted by class, not for tables
    and arrays. labels: CSV of file, label. memory: bytes that all tasks together may take; None is half of what is
    free. workers: most tasks at once; 0 works in this process, without Ray. strict: stop at the first image that cannot
    be used.
    """

    source: str
    target: str
    resolutions: tuple[int, ...]
    kind: sources.Kind = "auto"
    preparation: Preparation = field(default_factory=Preparation)
    layout: Literal["auto", "pixels", "encoded"] = "auto"
    encoding: Literal["webp", "png"] = "webp"
    split: float = 0.0
    split_seed: int = 0
    shuffle: bool | None = None
    labels: str | None = None
    memory: int | None = None
    workers: int | None = None
    strict: bool = False
    shard_bytes: int = 256 * MEGABYTE


def build(settings: Settings, show: bool = True) -> list[str]:
    """Builds the dataset and returns its folders, one for each resolution.

    Raises UserError for a source or setting that cannot be used, an image that cannot be with `strict`, a target that
    holds something else, or a memory limit too small for one task.
    """
    source = storage.check_absolute(settings.source, "SOURCE")
    target = storage.check_absolute(settings.target, "DATASET")
    sides = sorted(set(settings.resolutions))
    if any(side < 1 or side > 8192 for side in sides):
        raise UserError(setting="--resolution", value=sides, expected="1 to 8192 pixels")
    if not 0 <= settings.split < 1:
        raise UserError(setting="--split", value=settings.split, expected="a share from 0 to below 1")
    work = _work_folder(target)
    with locked(cache_root() / "locks" / identify(target=target)):  # one build of a folder at a time on this node
        folders = [target if len(sides) < 2 else storage.join(target, str(side)) for side in sides] or [target]
        wanted = _plan(settings, source, sides)
        identity = identify(plan=wanted.to_json())
        if _is_complete(folders, identity):
            return folders
        plan = _prepare(settings, wanted, identity, work, show)
        units = sorted(int(f.stem) for f in (work / "units").glob("*.json"))
        results = _do_units(work, plan, units, settings, show)
        built = dict(zip(map(str, plan.resolutions), folders, strict=True))
        _finish(work, plan, identity, built, results, settings, show)
        shutil.rmtree(work)
    return folders


def _work_folder(target: str) -> Path:
    """Beside a local dataset, so that the cluster's workers share it; in the user's cache for a remote one."""
    if storage.is_remote(target):
        return cache_root() / "builds" / identify(target=target)
    folder = Path(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent / f".{folder.name}.build"


def _plan(settings: Settings, source: str, sides: list[int]) -> Plan:
    def layout(side: int) -> Layout:
        if settings.layout != "auto":
            return settings.layout
        return "pixels" if side <= PIXELS_UP_TO else "encoded"

    most = max(sides, default=64)
    return Plan(
        source=source,
        kind=settings.kind,
        resolutions=sides,
        layouts={str(side): layout(side) for side in sides},
        preparation=settings.preparation,
        encoding=settings.encoding,
        split=settings.split,
        split_seed=settings.split_seed,
        shuffle=settings.shuffle,
        labels=settings.labels,
        shard_bytes=settings.shard_bytes,
        unit_rows=max(1, min(20_000, PART // (most * most * settings.preparation.channels))),
    )


def _prepare(settings: Settings, plan: Plan, identity: str, work: Path, show: bool) -> Plan:
    """Lists the source, unless an interrupted build has finished that. Returns the plan, fitted to latents."""
    state = load_json(work / "state.json")
    if state is not None:
        if state["identity"] != identity:
            raise UserError(
                setting="DATASET",
                value=settings.target,
                fix=f"repeat that command, or remove {work} to start again",
                expected="the same settings as those of the interrupted build of this folder",
            )
        return Plan.from_json((work / "plan.json").read_text())
    shutil.rmtree(work, ignore_errors=True)
    for name in ("units", "parts", "done", "shards", "spool"):
        (work / name).mkdir(parents=True)
    try:
        listing = sources.list_source(plan.source, plan.unit_rows, work / "spool", settings.kind, settings.labels)
        plan = _fitted(plan, listing)
        _write_units(work, plan, listing, show)
    except UserError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    storage.write_bytes(str(work / "state.json"), json.dumps({"identity": identity}).encode())
    return plan


def _fitted(plan: Plan, listing: sources.Listing) -> Plan:
    """The plan with what only the source tells: its kind, whether to shuffle, and the shape of latents."""
    by_name = listing.kind in ("folder", "zip", "tar")
    plan = replace(
        plan,
        kind=listing.kind,
        shuffle=by_name if plan.shuffle is None else plan.shuffle,
        group_bytes=listing.group_bytes,
    )
    if listing.latents is None:
        if not plan.resolutions:
            raise UserError(setting="--resolution", value=None, expected="at least one resolution in pixels")
        return plan
    dtype, channels, side = listing.latents
    if plan.resolutions not in ([], [side]):
        raise UserError(setting="--resolution", value=plan.resolutions, expected=f"{side}: latents pass unchanged")
    return replace(
        plan,
        dtype=dtype,  # type: ignore[arg-type]
        resolutions=[side],
        layouts={str(side): "latents"},
        preparation=replace(plan.preparation, channels=channels),  # type: ignore[arg-type]
    )


def _write_units(work: Path, plan: Plan, listing: sources.Listing, show: bool) -> None:
    """Writes the units and the class names."""
    labels: set[Any] = set()
    images = 0
    with _progress(show) as bar:
        task = bar.add_task("listing", total=None)
        for index, unit in enumerate(listing.units):
            save_unit(work / "units" / f"{index:06d}.json", unit)
            labels.update(item.label for item in unit.items)
            images += len(unit.items) or (unit.rows[1] - unit.rows[0] if unit.rows else 0)
            bar.update(task, completed=images)
    if not images:
        raise UserError(
            setting="SOURCE",
            value=plan.source,
            expected="images, and none was found",
            fix=listing.refused[0][0] + ": " + listing.refused[0][1] if listing.refused else "",
        )
    classes = listing.class_names if listing.class_names is not None else class_names(labels)
    (work / "classes.json").write_text(json.dumps(classes))
    (work / "refused.json").write_text(json.dumps(listing.refused))
    (work / "plan.json").write_text(plan.to_json())


def class_names(labels: set[Any]) -> list[str]:
    """Names in the order of their numbers: numbers stay what they are, other labels are sorted."""
    known = {label for label in labels if label is not None}
    if not known:
        return []
    if all(isinstance(label, int) or str(label).isdigit() for label in known) and max(map(int, known)) < 100_000:
        names = {int(label): str(label) for label in known}
        return [names.get(i, str(i)) for i in range(max(names) + 1)]
    return sorted(map(str, known))


def _do_units(work: Path, plan: Plan, units: list[int], settings: Settings, show: bool) -> list[dict[str, Any]]:
    """The results of all units in order; only those without one are done now."""
    results = {index: load_json(work / "done" / f"{index:06d}.json") for index in units}
    found = {index: result for index, result in results.items() if result is not None}
    todo = [index for index in units if index not in found]
    refused = json.loads((work / "refused.json").read_text())
    if settings.strict and refused:
        raise _not_usable(*refused[0])
    tasks = [{"index": index} for index in todo]

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return do_unit(str(work), row["index"])

    memory = PART * 5 + PIXEL * plan.preparation.max_pixels + GROUP * plan.group_bytes
    done = len(units) - len(todo)
    for index, result in _run(tasks, call, memory, settings, "units", done, show):
        found[index] = result
        if settings.strict and result["rejected"]:
            raise _not_usable(*result["rejected"][0])
    bad = [rejected for index in units for rejected in found[index]["rejected"]]
    if settings.strict and bad:  # of a build that began without --strict
        raise _not_usable(*bad[0])
    return [found[index] for index in units]


def _not_usable(name: str, reason: str) -> UserError:
    return UserError(
        setting="SOURCE",
        value=name,
        expected=f"an image that can be used, but: {reason}",
        fix="without --strict such images are listed in rejected.csv and left out",
    )


def _run(
    rows: list[dict[str, Any]],
    work: Callable[[dict[str, Any]], dict[str, Any]],
    memory: int,
    settings: Settings,
    title: str,
    done: int,
    show: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Runs the tasks through Ray Data, as many at once as the memory limit allows: (index, result) as they end."""
    if not rows:
        return
    limit = settings.memory or psutil.virtual_memory().available // 2
    each = PROCESS + memory
    fitting = limit // each
    if not fitting:
        raise UserError(
            setting="--memory",
            value=f"{limit / 1e9:.2f} GB",
            expected=f"at least {each / 1e9:.2f} GB for one task",
            fix="allow more, or a smaller --max-pixels",
        )
    if settings.workers == 0:
        with _progress(show) as bar:
            task = bar.add_task(title, total=len(rows) + done, completed=done)
            for row in rows:
                yield row["index"], work(row)
                bar.advance(task)
        return
    ray_session.connect()
    import ray  # Ray reads its settings when it is imported, so connect() comes first
    from ray.data import DataContext, TaskPoolStrategy

    cpus = int(ray.cluster_resources().get("CPU", 1))
    at_once = max(1, min(settings.workers or cpus, cpus, fitting, len(rows)))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # this bar stands for Ray Data's own

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "result": json.dumps(work(row))}

    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        call, num_cpus=1, compute=TaskPoolStrategy(at_once)
    )
    with _progress(show) as bar:
        task = bar.add_task(title, total=len(rows) + done, completed=done)
        for row in data.iter_rows():
            bar.advance(task)
            yield row["index"], json.loads(row["result"])


def _finish(
    work: Path,
    plan: Plan,
    identity: str,
    folders: dict[str, str],
    results: list[dict[str, Any]],
    settings: Settings,
    show: bool,
) -> None:
    """Merges parts into shards and writes the manifests."""
    jobs = merge_jobs(work, plan, folders, results)
    todo = [{**job, "index": i} for i, job in enumerate(jobs) if load_json(Path(str(job["done"]))) is None]

    def call(row: dict[str, Any]) -> dict[str, Any]:
        return merge(str(work), row)

    memory = plan.shard_bytes * 2 + PART
    for _ in _run(todo, call, memory, settings, "shards", len(jobs) - len(todo), show):
        pass
    write_manifests(work, plan, identity, folders, results)


def _is_complete(folders: list[str], identity: str) -> bool:
    """True when the same build finished before. Raises UserError when the folders hold another dataset."""
    there = [folder for folder in folders if storage.exists(storage.join(folder, FILE))]
    for folder in there:
        if read_manifest(folder).source.get("plan") != identity:
            raise UserError(
                setting="DATASET",
                value=folder,
                expected="a new folder; this one holds another dataset",
                fix="choose another folder, or remove this one",
            )
    return len(there) == len(folders)


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, disable=not show)
