"""The files of a finished sweep: trials.csv, importance.csv and best.yaml."""

from __future__ import annotations

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
        records, value = ledger.records(trial), ledger.value(trial)
        last = records[-1] if records else None
        rows.append(
            {
                "trial": trial.id,
                **trial.point,
                "end": ledger.ended(trial.id) or "",
                ledger.metric: "" if value is None else value,  # nan of a diverged trial is not the same as none
                "train_flops": last.train_flops if last else "",
                "device_seconds": last.device_seconds if last else "",
                "runs": " ".join(trial.folders),
            }
        )
    text = pd.DataFrame(rows).to_csv(index=False, na_rep="nan")
    storage.write_bytes(storage.join(ledger.folder, "trials.csv"), text.encode())
    # Trials that were stopped early are compared where all of them were evaluated: at the first rung.
    rung = ledger.sweep.scheduler.rungs_flops[0] if ledger.sweep.scheduler.name != "none" else None
    values = ledger.known_values(trials, rung)
    known = [t for t in trials if t.id in values]
    table = importance([overrides_of(ledger.sweep, t.point) for t in known], [values[t.id] for t in known])
    storage.write_bytes(storage.join(ledger.folder, "importance.csv"), table.to_csv(index=False).encode())
    if best is not None:
        settings = best.experiments[0].model_dump(mode="json", exclude={"storage"})
        text = f"# Best of sweep {ledger.sweep.name} by {ledger.metric}: {ledger.value(best):.6g}\n"
        text += "".join(f"# {edge}\n" for edge in edges(ledger.sweep, best.point))
        text += yaml.safe_dump(validate(settings).model_dump(mode="json", exclude={"storage"}), sort_keys=False)
        storage.write_bytes(storage.join(ledger.folder, "best.yaml"), text.encode())
