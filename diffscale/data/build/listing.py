"""The listing of a source: its units in the work folder, and the plan that a person reads before the build."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffscale.core.errors import UserError
from diffscale.core.progress import working
from diffscale.data.build.fingerprint import fingerprint
from diffscale.data.build.items import BuildSource, Reading
from diffscale.data.build.names import shown
from diffscale.data.build.sources import open_source
from diffscale.data.build.tasks import BuildPlan, save_unit
from diffscale.data.build.tree import class_names

MOST_CLASSES = 24  # named in the plan
MOST_EXAMPLES = 3  # of files that are left out, for each reason

Counts = Counter[tuple[str | None, Any]]


@dataclass(frozen=True)
class Listing:
    """A listed source.

    plan: completed from the source
    source: with all its units consumed
    classes: names by number; empty without labels
    counts: {(split, class): images}; one of them is None where the source does not say
    """

    plan: BuildPlan
    source: BuildSource
    classes: list[str]
    counts: Counts


def list_source(plan: BuildPlan, reading: Reading, spool: Path, work: Path | None = None) -> Listing:
    """List a source. Raises UserError for one without images or with several readings.

    plan: the choices of a person
    spool: folder for unpacked archives
    work: folder to write the listing to
    """
    source = open_source(plan.source, plan.unit_rows, spool, reading)
    plan = _fitted(plan, source)
    counts: Counts = Counter()
    with working("listing") as listed:
        for index, unit in enumerate(source.units):
            if work is not None:
                save_unit(work / "units" / f"{index:06d}.json", unit)
            counts.update((unit.split, item.label) for item in unit.items)
            if unit.rows:
                counts[unit.split, None] += unit.rows[1] - unit.rows[0]
            listed.done = counts.total()
    if not counts:
        raise UserError(
            setting="SOURCE",
            value=plan.source,
            expected="a folder or file with images; found none",
            reason="; ".join(_by_reason(source.refused + source.left_out)[:4]),
        )
    classes = source.class_names
    if classes is None:
        classes = class_names(label for _, label in counts)
    counts = Counter(source.counts) if source.counts is not None else counts
    splits = {split for split, _ in counts}
    plan = replace(plan, split_train=plan.split > 0 and "train" in splits and "heldout" not in splits)
    if work is not None:
        (work / "classes.json").write_text(json.dumps(classes))
        (work / "refused.json").write_text(json.dumps(source.refused))
        (work / "left_out.json").write_text(json.dumps(source.left_out))
        state = fingerprint(plan.source, plan.kind, reading, source.files)
        (work / "fingerprint.json").write_text(json.dumps(state.to_json()))
        (work / "plan.json").write_text(plan.to_json())
    return Listing(plan, source, classes, counts)


def _fitted(plan: BuildPlan, source: BuildSource) -> BuildPlan:
    """Return the plan with the properties of the source: its kind, whether to shuffle, the shape of latents."""
    by_name = source.kind in ("folder", "zip", "tar")
    plan = replace(
        plan,
        kind=source.kind,
        shuffle=by_name if plan.shuffle is None else plan.shuffle,
        group_bytes=source.group_bytes,
    )
    if source.latents is None:
        if not plan.resolutions:
            raise UserError(setting="--resolution", value=None, expected="at least one resolution in pixels")
        return plan
    dtype, channels, side = source.latents
    if plan.resolutions not in ([], [side]):
        raise UserError(
            setting="--resolution",
            value=plan.resolutions,
            expected=f"{side}, the resolution of the latents",
            reason="latents are stored unchanged",
        )
    return replace(
        plan,
        dtype=dtype,  # type: ignore[arg-type]
        resolutions=[side],
        layouts={str(side): "latents"},
        preparation=replace(plan.preparation, channels=channels),  # type: ignore[arg-type]
    )


def describe(listing: Listing) -> str:
    """Return the plan of a build as text: what was found, splits, classes, what is left out and why."""
    plan, source, counts = listing.plan, listing.source, listing.counts
    of_split: Counter[str] = Counter()
    for (split, _), images in counts.items():
        of_split[split or "train"] += images
    rows = [("source", f"{shown(plan.source)}, read as {source.kind}")]
    splits = ", ".join(f"{of_split[split]:,} {name}" for split, name in SPLITS.items() if of_split[split])
    if plan.split and (plan.split_train or not of_split["heldout"]):
        splits += f", of which about {plan.split:.0%} are held out (--split)"
    rows.append(("images", splits))
    rows.append(("classes", _describe_classes(listing.classes, counts)))
    for title, files in (("not usable", source.refused), ("left out", source.left_out)):
        if files:
            rows.append((title, f"{len(files):,} file{'s' if len(files) > 1 else ''}, listed in rejected.csv"))
            rows += [("", line) for line in _by_reason(files)]
    notes = [*source.notes, *_warnings(listing)]
    rows += [("note" if i == 0 else "", note) for i, note in enumerate(notes)]
    return "\n".join(f"{title:<11} {shown(text)}".rstrip() for title, text in rows)


SPLITS = {"train": "for training", "heldout": "held out"}


def _describe_classes(classes: list[str], counts: Counts) -> str:
    if not classes:
        return "none"
    train: Counter[str | None] = Counter()
    heldout: Counter[str | None] = Counter()
    for (split, label), images in counts.items():
        (heldout if split == "heldout" else train)[label] += images
    if set(train) | set(heldout) <= {None}:  # a table or array that does not count them
        named = ", ".join(classes[:MOST_CLASSES])
    else:
        named = ", ".join(
            f"{name} {train[name]:,}" + (f" + {heldout[name]:,}" if heldout else "") for name in classes[:MOST_CLASSES]
        )
    more = f" and {len(classes) - MOST_CLASSES:,} more" if len(classes) > MOST_CLASSES else ""
    return f"{len(classes):,}: {named}{more}" + (" (training + held out)" if heldout and train else "")


def _by_reason(files: list[tuple[str, str]]) -> list[str]:
    """Return a line for each reason, with examples."""
    reasons: dict[str, list[str]] = {}
    for name, reason in files:
        reasons.setdefault(reason, []).append(name)
    lines = []
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(names) > MOST_EXAMPLES else ""
        lines.append(f"{len(names):,}: {reason} ({', '.join(names[:MOST_EXAMPLES])}{more})")
    return lines[:12] + ([f"and {len(lines) - 12:,} other reasons"] if len(lines) > 12 else [])


def _warnings(listing: Listing) -> list[str]:
    """Return sentences about what is unusual in the classes and splits."""
    counts, plan = listing.counts, listing.plan
    labels = {label for _, label in counts if label is not None}
    trained = {label for split, label in counts if split != "heldout"}
    warnings = []
    if plan.split and not plan.split_train and any(split == "heldout" for split, _ in counts):
        warnings.append(f"--split {plan.split:g} is not used: the source has its own held-out images")
    if labels and (absent := sorted(labels - trained)):
        warnings.append(f"classes without images for training: {', '.join(map(str, absent[:MOST_CLASSES]))}")
    folded: dict[str, list[str]] = {}
    for name in listing.classes:
        folded.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(names) for names in folded.values() if len(names) > 1]
    if alike:
        warnings.append(f"classes that differ in upper and lower case alone: {', '.join(alike[:MOST_CLASSES])}")
    return warnings
