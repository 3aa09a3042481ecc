"""The search: the pilot of the learning rate, then one iso-FLOP budget after the other, each a sweep.

Every stage is a function of the records of the stages before it, so the same request continues after any interruption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rich.console import Console

from diffscale.core.errors import UserError
from diffscale.models.families import FAMILIES
from diffscale.recommendation.plan import FURTHER_RATES, Plan, alternatives, resolution_of, stage, window
from diffscale.recommendation.request import Request
from diffscale.records.recommendation import Point, Searched
from diffscale.records.schema import Record
from diffscale.report.stats.isoflop import SAME_BUDGET
from diffscale.sweep.decisions import survivors
from diffscale.sweep.ledger import Ledger, Trial
from diffscale.sweep.run import run
from diffscale.sweep.settings import Sweep


@dataclass
class Found:
    """What the search knows of one backbone so far.

    learning_rates: the pilot's validation loss by learning rate, infinite where it diverged
    learning_rate: that of the present budget
    budget_rates: that of each budget so far
    """

    backbone: str
    rungs: tuple[int, ...]
    learning_rates: dict[float, float] = field(default_factory=dict)
    learning_rate: float = math.nan
    budget_rates: list[float] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    dropped_after: int | None = None

    def best(self, budget: int) -> tuple[float, int]:
        """Return the lowest validation loss at a budget, a mean over seeds, and its rung; (inf, ...) without any."""
        by_rung: dict[int, list[float]] = {}
        for point in self.points:
            if point.budget == budget:
                by_rung.setdefault(point.rung, []).append(point.val_loss)
        means = [(sum(losses) / len(losses), rung) for rung, losses in by_rung.items()]
        return min((m for m in means if math.isfinite(m[0])), default=(math.inf, self.rungs[len(self.rungs) // 2]))

    def searched(self) -> Searched:
        """Return it as a part of the recommendation."""
        rates = self.learning_rates
        best = min(rates, key=rates.__getitem__)
        edge = "" if len(rates) < 2 else {min(rates): "low", max(rates): "high"}.get(best, "")
        return Searched(
            backbone=self.backbone,
            learning_rates={f"{rate:g}": _finite(loss) for rate, loss in rates.items()},
            learning_rate=self.learning_rate,
            budget_rates=tuple(self.budget_rates),
            at_edge=edge,
            dropped_after=self.dropped_after,
            points=tuple(self.points),
        )


def search(
    request: Request, plan: Plan, handle_signals: bool = False
) -> tuple[list[Searched], dict[str, float | None], float]:
    """Run the unfinished part of the search. Return what it found and the FLOPs of all its runs.

    The second result is the distance by schedule and training resolution, if the request has several.

    handle_signals: SIGTERM and SIGINT end the running trials at a checkpoint and raise Stopped (main thread only).
    """
    console = Console()
    spent: dict[str, float] = {}  # FLOPs by run
    found = {name: Found(name, rungs) for name, rungs in plan.rungs.items()}
    console.rule(f"learning rate at {plan.budgets[0]:.3g} FLOPs", align="left")
    _pilot(request, plan, found, spent, handle_signals)
    for number, flops in enumerate(plan.budgets):
        alive = [f for f in found.values() if f.dropped_after is None]
        console.rule(f"budget {number + 1} of {len(plan.budgets)}: {flops:.3g} FLOPs a run", align="left")
        _budget(request, plan, alive, number, flops, spent, handle_signals)
        if number + 1 < len(plan.budgets):
            losses = {f.backbone: f.best(number)[0] for f in alive}
            keep = survivors(losses, max(min(len(losses) / request.keep, 2.0), 1.0))
            for f in alive:
                f.rungs = window(f.best(number)[1])
                f.dropped_after = None if f.backbone in keep else number
    tried = _alternatives(request, plan, list(found.values()), spent, handle_signals)
    return [f.searched() for f in found.values()], tried, sum(spent.values())


def _alternatives(
    request: Request, plan: Plan, found: list[Found], spent: dict[str, float], handle_signals: bool
) -> dict[str, float | None]:
    """Return the distance by schedule and resolution, of the network with the lowest loss at the largest budget.

    They are compared by the distance: losses of different schedules or resolutions are not comparable.
    """
    compared = alternatives(request)
    if not compared:
        return {}
    last = len(plan.budgets) - 1
    best = min(found, key=lambda f: f.best(last)[0])
    variants = {
        name: keys
        | {
            "model": FAMILIES[best.backbone](best.best(last)[1], keys["data.resolution"]),
            "optim.lr": best.learning_rate,
            "optim.warmup_images": plan.warmup(best.backbone, best.best(last)[1], plan.budgets[-1]),
        }
        for name, keys in compared.items()
    }
    sweep = stage(request, variants, plan.budgets[-1]).model_copy(update={"metric": None})
    ledger, trials = _run(sweep, handle_signals)
    for trial in trials:
        _add_spent(spent, ledger.records(trial))
    return {trial.point["variant"]: _finite(ledger.value(trial)) for trial in trials}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _pilot(
    request: Request, plan: Plan, found: dict[str, Found], spent: dict[str, float], handle_signals: bool
) -> None:
    """Choose the learning rate of each backbone, at the middle one of its sizes at the smallest budget.

    While the best one is at an end of those tried, the next further one is tried too, FURTHER_RATES times at most.
    """
    wanted = [(f, list(request.learning_rates)) for f in found.values()]
    for _ in range(1 + FURTHER_RATES):
        if not wanted:
            break
        for name, losses in _try_rates(request, plan, wanted, plan.budgets[0], spent, handle_signals).items():
            found[name].learning_rates |= losses
        further = [(f, further_rate(f.learning_rates)) for f, _ in wanted]
        wanted = [(f, [rate]) for f, rate in further if rate is not None]
    for f in found.values():
        f.learning_rate = min(f.learning_rates, key=f.learning_rates.__getitem__)
        if f.learning_rates[f.learning_rate] == math.inf:
            raise UserError(
                setting="learning_rates",
                value=list(request.learning_rates),
                expected=f"rates with one at which {f.backbone} does not diverge",
            )


def _try_rates(
    request: Request,
    plan: Plan,
    wanted: list[tuple[Found, list[float]]],
    flops: float,
    spent: dict[str, float],
    handle_signals: bool,
) -> dict[str, dict[float, float]]:
    """Train the middle size of backbones with learning rates. Return their losses by backbone and rate."""
    places = {f"{f.backbone} {rate:g}": (f, rate) for f, rates in wanted for rate in rates}
    variants = {
        name: _network(request, plan, f.backbone, f.rungs[len(f.rungs) // 2], flops) | {"optim.lr": rate}
        for name, (f, rate) in places.items()
    }
    ledger, trials = _run(stage(request, variants, flops), handle_signals)
    losses: dict[str, dict[float, float]] = {}
    for trial in trials:
        f, rate = places[trial.point["variant"]]
        value = ledger.value(trial)
        losses.setdefault(f.backbone, {})[rate] = math.inf if value is None or math.isnan(value) else value
        _add_spent(spent, ledger.records(trial))
    return losses


def further_rate(losses: dict[float, float]) -> float | None:
    """Return the learning rate to try beyond the best one, as far as its neighbour; None if it has two, or is alone.

    losses: by learning rate; infinite where it diverged
    """
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    if len(rates) < 2 or losses[best] == math.inf or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best**2 / neighbour:.3g}")


def _budget(
    request: Request,
    plan: Plan,
    alive: list[Found],
    number: int,
    flops: float,
    spent: dict[str, float],
    handle_signals: bool,
) -> None:
    """Train the sizes of each backbone to one budget, and add their ends to what is known."""
    if number > 0 and len(request.learning_rates) > 1:
        _slow_down(request, plan, alive, flops, spent, handle_signals)
    for f in alive:
        f.budget_rates.append(f.learning_rate)
    places = {f"{f.backbone}-{rung}": (f, rung) for f in alive for rung in f.rungs}
    variants = {
        name: _network(request, plan, f.backbone, rung, flops) | {"optim.lr": f.learning_rate}
        for name, (f, rung) in places.items()
    }
    seeds = request.seeds if number == 0 else 1
    ledger, trials = _run(stage(request, variants, flops, replicates=seeds), handle_signals)
    for trial in trials:
        f, rung = places[trial.point["variant"]]
        records = ledger.records(trial)
        _add_spent(spent, records)
        f.points += [_point(r, rung, number) for r in _ends(records, flops) if r.val_loss is not None]


def _slow_down(
    request: Request, plan: Plan, alive: list[Found], flops: float, spent: dict[str, float], handle_signals: bool
) -> None:
    """Halve the learning rate of each backbone whose middle size has a lower loss at this budget with the half.

    The longer a run, the lower its best learning rate; the pilot's is that of the shortest runs.
    """
    wanted = [(f, [f.learning_rate, f.learning_rate / 2]) for f in alive]
    losses = _try_rates(request, plan, wanted, flops, spent, handle_signals)
    for f in alive:
        own = losses[f.backbone]
        f.learning_rate = min(own, key=own.__getitem__)


def _run(sweep: Sweep, handle_signals: bool) -> tuple[Ledger, list[Trial]]:
    ledger = Ledger(sweep)
    result = run(ledger, handle_signals)
    if result.failed:
        name, reason = next(iter(result.failed.items()))
        raise RuntimeError(f"trial {name} failed: {reason}; the same command tries it again")
    return ledger, result.trials


def _network(request: Request, plan: Plan, backbone: str, rung: int, flops: float) -> dict:
    """Return the settings of a run that follow from its size and budget."""
    model = FAMILIES[backbone](rung, resolution_of(request))
    return {"model": model, "optim.warmup_images": plan.warmup(backbone, rung, flops)}


def _ends(records: list[Record], flops: float) -> list[Record]:
    """Return the record of each run at the budget. A run that another command took further may have none."""
    ends: dict[str, Record] = {}
    for record in records:
        if flops * (1 - 1e-9) <= record.train_flops <= flops * SAME_BUDGET:
            ends.setdefault(record.run_id, record)
    return list(ends.values())


def _add_spent(spent: dict[str, float], records: list[Record]) -> None:
    """Add what runs cost."""
    for record in records:
        spent[record.run_id] = max(spent.get(record.run_id, 0.0), record.train_flops)


def _point(record: Record, rung: int, budget: int) -> Point:
    assert record.val_loss is not None
    return Point(
        run_id=record.run_id,
        run_name=record.run_name,
        rung=rung,
        seed=record.seed,
        budget=budget,
        parameters=record.parameters,
        images=record.images_seen,
        flops=record.train_flops,
        flops_per_image=record.flops_per_image,
        device_seconds=record.device_seconds,
        val_loss=record.val_loss,
        distance=record.value,
    )
