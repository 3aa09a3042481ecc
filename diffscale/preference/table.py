"""The result of a study on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from diffscale.preference.result import Result


def print_result(console: Console, found: Result) -> None:
    """Print the contenders, the preferences that the intervals support, and how careful the raters were."""
    table = Table("contender", "points against the average", "95 %", "votes")
    for row in found.contenders.to_dict("records"):
        interval = f"{row['win_share_low']:.2f} to {row['win_share_high']:.2f}"
        table.add_row(row["contender"], f"{row['win_share']:.2f}", interval, str(row["votes"]))
    console.print(table)
    lines = []
    for row in found.pairs.to_dict("records"):
        if row["preferred"]:
            other = row["b"] if row["preferred"] == row["a"] else row["a"]
            lines.append(f"{row['preferred']} is preferred to {other}")
    for row in found.raters.to_dict("records"):
        mark = " - INATTENTIVE" if row["inattentive"] else ""
        repeats = f", {row['consistency']:.0%} of {row['repeats']} repeats alike" if row["repeats"] else ""
        checks = f", {row['failed_checks']} of {row['checks']} checks failed" if row["checks"] else ""
        lines.append(f"rater {row['rater']}: {row['votes']} votes{repeats}{checks}{mark}")
    share, pairs = found.agreement
    if pairs:
        lines.append(f"raters agree on {share:.0%} of {pairs} pairs that two have seen")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
