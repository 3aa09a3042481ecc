"""Fails when the quickstart's CSV lacks a row: 3 backbones x 3 compute points, and the sweep's 4 runs."""

import csv
import sys
from collections import defaultdict

with open(sys.argv[1], newline="") as file:
    rows = list(csv.DictReader(file))
points = defaultdict(set)
for row in rows:
    points[row["run_name"]].add(row["images_seen"])
problems = [
    f"{name}: {len(points[name])} compute points, expected at least 3"
    for name in ("quickstart-unet", "quickstart-uvit", "quickstart-rin")
    if len(points[name]) < 3
]
swept = {row["run_id"] for row in rows if row["run_name"] == "quickstart-sweep"}
if len(swept) != 4:
    problems.append(f"quickstart-sweep: {len(swept)} runs, expected 4")
problems += [f"{row['record_id']}: no value" for row in rows if not row["value"]]
print("\n".join(problems) or f"report: {len(rows)} rows, nothing lacks")
sys.exit(bool(problems))
