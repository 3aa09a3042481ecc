"""Which networks `train.compile=auto` compiles: rules by kind of GPU and backbone, in compile_rules.csv.

A rule is the number of parameters from which a captured pass is faster compiled. It is measured once for a kind of GPU
and committed (`python -m benchmarks.throughput.compile_rules`), so that a run's numerics never depend on a timing of
the moment. The row `cuda,any` serves kinds that were not measured: there compiling fuses the operations between the
matrix products, which are memory-bound, and pays within minutes for large networks; small ones wait for launches, which
a captured graph removes. On a CPU compiling takes minutes and saves at most 15 %, so there are no rules.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from importlib import resources

ANY_GPU, ANY_BACKBONE = "cuda", "any"
FILE = "compile_rules.csv"


@dataclass(frozen=True)
class Rule:
    """A row of the table."""

    device: str  # a word of the GPU's name (H200), or ANY_GPU
    backbone: str  # or ANY_BACKBONE
    parameters: int | None  # from which networks are compiled; None for never
    measured: str  # date and version of torch; empty for a guess


def read_rules() -> list[Rule]:
    """Return the committed rules."""
    text = resources.files(__package__).joinpath(FILE).read_text()
    return [
        Rule(row["device"], row["backbone"], int(row["parameters"]) if row["parameters"] else None, row["measured"])
        for row in csv.DictReader(text.splitlines())
    ]


def compiled_from(gpu: str, backbone: str, rules: list[Rule] | None = None) -> int | None:
    """Return the parameters from which "auto" compiles a backbone on a GPU, None for never.

    The rule of the GPU comes before that of any, and of the same GPU the rule of the backbone before that of any.

    gpu: its name by Ray ("H200") or NVIDIA ("NVIDIA H200"); empty where it is unknown
    rules: None for the committed ones
    """
    words = {ANY_GPU, *re.split("[ -]", gpu)}
    fitting = [
        rule
        for rule in (read_rules() if rules is None else rules)
        if rule.device in words and rule.backbone in (backbone, ANY_BACKBONE)
    ]
    best = max(fitting, key=lambda rule: (rule.device != ANY_GPU, rule.backbone != ANY_BACKBONE), default=None)
    return None if best is None else best.parameters
