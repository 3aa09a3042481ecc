"""Evaluations of one checkpoint under several guidances, and the choice among them on held-out images.

The choice never sees the distance that is reported: that to the training images would be lowest by chance, or for the
guidance that copies most.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from diffscale.records.schema import rank

Row = Mapping[str, Any]
SAME = ("run_id", "images_seen", "ema", "metric", "reference", "eval_resolution", "resize", "n_generated")
"""What evaluations of one checkpoint have in common besides the sampler, where only the guidance differs."""


def without_guidance(sampler: str) -> str:
    """Return a record's `sampler` without its guidance, as JSON."""
    kept = {key: value for key, value in json.loads(sampler).items() if not _is_guidance(key)}
    return json.dumps(kept, sort_keys=True, separators=(",", ":"))


def guidance_text(sampler: str) -> str:
    """Return the guidance of a record's `sampler` in a few words: `1.5 in [-3, 5]`, or `none`."""
    s = json.loads(sampler)
    scale = s.get("guidance_scale", 1)
    if scale == 1:
        return "none"
    text = f"{scale:g}"
    if s.get("guidance_interval"):
        text += " in [{:g}, {:g}]".format(*s["guidance_interval"])
    more = {k.removeprefix("guidance_"): v for k, v in s.items() if _is_guidance(k) and v not in (None, False)}
    rest = [
        key if value is True else f"{key} {value}" for key, value in more.items() if key not in ("scale", "interval")
    ]
    return ", ".join([text, *rest])


def choices(rows: Iterable[Row]) -> list[tuple[list[Row], Row | None]]:
    """Return the evaluations of each checkpoint that differ in guidance alone, and the best of them on held-out images.

    The best is None where an evaluation has no distance to held-out images. Checkpoints with one guidance are left out.
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row[name] for name in SAME), without_guidance(row["sampler"])), []).append(row)
    found = []
    for group in groups.values():
        if len({row["sampler"] for row in group}) > 1:
            known = all(_known(row["value_heldout"]) for row in group)
            best = min(group, key=lambda row: rank(row["metric"], row["value_heldout"])) if known else None
            found.append((group, best))
    return found


def choice_text(group: list[Row], best: Row | None) -> str:
    """Return the choice as a sentence, with what sampling costs."""
    metric = group[0]["metric"]
    if best is None:
        return f"No guidance is chosen by {metric}: that takes distances to held-out images, 50 of them at least."
    others = ", ".join(f"{guidance_text(row['sampler'])} {row['value_heldout']:.4g}" for row in group)
    total = best["n_generated"] * best["sampling_flops"]
    return (
        f"Best guidance by {metric} to held-out images: {guidance_text(best['sampler'])} (of {others}). Its "
        f"{metric} to the training images is {best['value']:.4g}; an image takes {best['nfe']} network evaluations, "
        f"{best['sampling_flops']:.3g} FLOPs, and the {best['n_generated']:,} of the evaluation {total:.3g}."
    )


def _is_guidance(key: str) -> bool:
    return key.startswith(("guidance", "autoguidance", "guide"))


def _known(value: Any) -> bool:
    return value is not None and value == value
