"""One trial of a sweep in its own process: its runs one after the other, and the decision at each rung under ASHA."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from diffscale.config.experiment import Experiment
from diffscale.core.errors import UserError
from diffscale.records.schema import Record
from diffscale.sweep.decisions import survivors
from diffscale.sweep.ledger import Ledger
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import point_of


def run_trial(sweep: Sweep, config: dict[str, Any], flops: float | None, stop_with: str, here: bool) -> None:
    """Run every replicate to its end, or to `flops`, and report the metric to Ray Tune.

    A trial that diverges, or whose settings cannot train, counts as the worst value and ends. One that cannot go on for
    another reason is reported as failed, and the same command runs it again.

    stop_with: launch id of the message channel that carries the sweep's stop request.
    here: the run's one worker is this process.
    """
    from ray import tune  # import cost

    from diffscale.distributed.messages import STOP, Messages  # import cost
    from diffscale.training.run import train  # import cost

    ledger = Ledger(sweep)
    point = point_of(sweep, config)
    trial = ledger.trial(point)
    worst = float("-inf") if ledger.higher_is_better else float("inf")
    if trial is None:
        tune.report({"value": worst, "note": "ruled out by a constraint"})
        return
    if Messages(stop_with).get(STOP) is not None:
        tune.report({"value": worst, "note": "the sweep is stopping"})
        return
    over = ledger.over_budget()
    if over and not ledger.records(trial):
        tune.report({"value": worst, "note": over})
        return
    ledger.note_begun(point)
    stopped = False
    for experiment in trial.experiments:
        if flops is not None:
            experiment = with_budget(experiment, flops)
        should_stop = AshaRule(sweep, trial.id) if sweep.scheduler.name == "asha" else None
        try:
            result = train(experiment, should_stop=should_stop, show=False, stop_with=stop_with, here=here)
        except UserError as error:
            ledger.note_ended(trial.id, "refused")
            tune.report({"value": worst, "note": error.text(), "trial": trial.id})
            return
        if result.resumable:
            tune.report({"value": worst, "note": "the sweep is stopping"})
            return
        if result.reason == "nonfinite":
            ledger.note_ended(trial.id, "diverged")
            tune.report({"value": worst, "note": result.message, "trial": trial.id})
            return
        if result.reason not in ("finished", "early"):
            tune.report({"value": worst, "failed": f"{result.reason}: {result.message}", "trial": trial.id})
            return
        stopped |= result.stopped
    if flops is None:
        ledger.note_ended(trial.id, "stopped" if stopped else "finished")
    value = ledger.value(trial, flops)
    known = value is not None and math.isfinite(value)
    tune.report({"value": value if known else worst, "trial": trial.id})


def with_budget(experiment: Experiment, flops: float) -> Experiment:
    """Return the experiment with another budget of training FLOPs."""
    train_settings = experiment.train.model_copy(update={"flops": flops})
    return experiment.model_copy(update={"train": train_settings})


@dataclass(frozen=True)
class AshaRule:
    """The `should_stop` of a trial under ASHA: at each rung, continue only among the best trials that reached it.

    The decision is written when it is made, so a resumed sweep keeps it.
    """

    sweep: Sweep
    trial_id: str

    def __call__(self, record: Record) -> bool:
        ledger = Ledger(self.sweep)
        rungs = self.sweep.scheduler.rungs_flops
        reached = [i for i, flops in enumerate(rungs[:-1]) if record.train_flops >= flops * (1 - 1e-9)]
        if record.metric != ledger.rows_metric or not reached:
            return False
        rung = reached[-1]
        earlier = ledger.decisions.get(rung, self.trial_id)
        if earlier is None:
            trials = [t for t in map(ledger.trial, ledger.begun()) if t is not None]
            values = {t.id: ledger.value(t, rungs[rung]) for t in trials} | {self.trial_id: ledger.measured(record)}
            known = {name: value for name, value in values.items() if value is not None}
            keep = survivors(known, self.sweep.scheduler.reduction, ledger.higher_is_better)
            earlier = ledger.decisions.put(rung, self.trial_id, self.trial_id in keep, ledger.measured(record))
        return not earlier
