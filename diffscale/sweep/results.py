"""The files of a finished sweep: trials.csv, importance.csv and best.yaml."""

from __future__ import annotations

import math

import pandas as pd
import yaml

from diffscale.config.load import validate
from diffscale.core import storage
from diffscale.sweep.importance import importance
from diffscale.sweep.ledger import Ledger, Trial
from diffscale.sweep.space import edges, overrides_of


def write_results(ledger: Ledger, trials: list[Trial], best: Trial | None) -> None:
    """Write trials.csv, importance.csv and best.yaml, a preset for `diffscale train`."""
    rows = []
    for trial in trials:
        records = ledger.records(trial)
        last = records[-1] if records else None
        rows.append(
            {
                "trial": trial.id,
                **trial.point,
                "end": ledger.ended(trial.id) or "",
                ledger.metric: ledger.value(trial),
                "train_flops": last.train_flops if last else None,
                "device_seconds": last.device_seconds if last else None,
                "runs": " ".join(trial.folders),
            }
        )
    storage.write_bytes(storage.join(ledger.folder, "trials.csv"), pd.DataFrame(rows).to_csv(index=False).encode())
    # Trials that were stopped early are compared where all of them were evaluated: at the first rung.
    rung = ledger.sweep.scheduler.rungs_flops[0] if ledger.sweep.scheduler.name != "none" else None
    valued = [(overrides_of(ledger.sweep, t.point), ledger.value(t, rung)) for t in trials]
    known = [(p, v) for p, v in valued if v is not None and math.isfinite(v)]
    table = importance([p for p, _ in known], [v for _, v in known])
    storage.write_bytes(storage.join(ledger.folder, "importance.csv"), table.to_csv(index=False).encode())
    if best is not None:
        settings = best.experiments[0].model_dump(mode="json", exclude={"storage"})
        text = f"# Best of sweep {ledger.sweep.name} by {ledger.metric}: {ledger.value(best):.6g}\n"
        text += "".join(f"# {edge}\n" for edge in edges(ledger.sweep, best.point))
        text += yaml.safe_dump(validate(settings).model_dump(mode="json", exclude={"storage"}), sort_keys=False)
        storage.write_bytes(storage.join(ledger.folder, "best.yaml"), text.encode())
