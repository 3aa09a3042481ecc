"""The recipe: fits the laws of the search, chooses backbone and size for the compute that is left, and says why."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from diffscale.core.device import money
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.models.families import RUNGS
from diffscale.recommendation.plan import Plan
from diffscale.records.recommendation import Prediction, Recipe, Searched
from diffscale.report.stats.isoflop import IsoFlop
from diffscale.report.stats.predictions import distance_law, loss_law


def choose_recipe(
    searched: list[Searched], plan: Plan, flops: float, dataset: Dataset, price: float | None = None
) -> Recipe:
    """Return the recipe for the compute that the search left.

    The backbone is that of the lowest predicted validation loss: a distance at small compute orders networks by noise.

    flops: training FLOPs of the recipe's run
    price: of a device-hour
    """
    laws = {part.backbone: law for part in searched if (law := loss_law(part)) is not None}
    if not laws:
        raise UserError(
            setting="backbones",
            value=[part.backbone for part in searched],
            expected="a backbone whose runs reach three budgets of three sizes without diverging",
            fix="look at the search's runs with diffscale runs; try smaller learning rates",
        )
    predicted = {name: _prediction(law.loss([flops], of="run")[:, 0]) for name, law in laws.items()}
    backbone = min(predicted, key=lambda name: predicted[name].value)
    part, law = next(p for p in searched if p.backbone == backbone), laws[backbone]
    rung = _nearest_rung(backbone, law, flops, plan)
    cost = plan.cost(backbone, rung)
    off = float(law.at([cost.parameters], flops)[0]) / predicted[backbone].value
    size, images = law.size([flops])[:, 0], law.images([flops])[:, 0]
    distance = distance_law(part)
    fastest = max(part.points, key=lambda point: point.flops)
    seconds = flops * fastest.device_seconds / fastest.flops
    seen = int(flops / cost.flops_per_image)
    rate = rate_beyond(part.budget_rates or (part.learning_rate,), plan.budgets, flops)
    return Recipe(
        backbone=backbone,
        rung=rung,
        parameters=cost.parameters,
        learning_rate=rate,
        flops=flops,
        images=seen,
        epochs=seen / dataset.n,
        parameters_best=_prediction(size),
        images_best=_prediction(images),
        val_loss=_prediction(off * np.array(predicted[backbone].numbers)),
        distance=None if distance is None else _prediction(distance.predict(flops)),
        device_seconds=seconds,
        cost=money(seconds, price),
        others={name: value for name, value in predicted.items() if name != backbone},
        why=tuple(_why(backbone, predicted, part, rate)),
        caveats=tuple(_caveats(searched, part, law, plan, cost.parameters, flops, seen / dataset.n)),
    )


def _nearest_rung(backbone: str, law: IsoFlop, flops: float, plan: Plan) -> int:
    """Return the size of the ladder at which the law's loss is lowest: the first after which it rises."""

    def loss(rung: int) -> float:
        return float(law.at([plan.cost(backbone, rung).parameters], flops)[0])

    rungs = range(plan.smallest[backbone], RUNGS - 1)
    return next((rung for rung in rungs if loss(rung + 1) >= loss(rung)), RUNGS - 1)


def rate_beyond(rates: Sequence[float], budgets: Sequence[float], flops: float) -> float:
    """Return the learning rate for more compute, by the power law through those of the last two budgets.

    rates: learning rate at each budget so far
    budgets: FLOPs of a run, the smallest first
    flops: those of the run that the rate is for
    """
    if len(rates) < 2:
        return rates[-1]
    (smaller, higher), (larger, rate) = list(zip(budgets, rates, strict=False))[-2:]
    exponent = math.log(rate / higher) / math.log(larger / smaller)
    return float(f"{rate * (flops / larger) ** exponent:.3g}")


def _why(backbone: str, predicted: dict[str, Prediction], part: Searched, rate: float) -> list[str]:
    best = predicted[backbone]
    lines = [f"{backbone} has the lowest predicted validation loss: {best}."]
    for name, other in sorted(predicted.items(), key=lambda item: item[1].value):
        if name != backbone:
            apart = "worse" if other.low > best.high else "not separated from it"
            lines.append(f"{name} at its own best size: {other}, {apart}.")
    lines.append(f"Its learning rate, {rate:g}, began as the best of {', '.join(part.learning_rates)}.")
    if len(set(part.budget_rates)) > 1:
        rates = ", ".join(f"{tuned:g}" for tuned in part.budget_rates)
        lines.append(f"With more compute a lower one was better: {rates} from the smallest budget to the largest.")
    return lines


def _caveats(
    searched: list[Searched], part: Searched, law: IsoFlop, plan: Plan, parameters: int, flops: float, epochs: float
) -> list[str]:
    lines = [f"The prediction goes {flops / plan.budgets[-1]:.3g} times beyond the largest budget of the search."]
    largest = max(point.parameters for point in part.points)
    if parameters > largest:
        lines.append(f"The network is {parameters / largest:.2g} times the largest one of the search.")
    low, high = (float(v[0]) for v in law.size([flops])[1:])
    if high > 4 * low:
        lines.append(f"The best size is not known better than between {low:.2g} and {high:.2g} parameters.")
    if part.at_edge:
        lines.append(f"The learning rate is at the {part.at_edge} end of those tried: try further ones too.")
    if epochs > 20:
        lines.append(f"{epochs:.0f} epochs of the images: the law knows nothing of overfitting that begins later.")
    lines.append("The learning rate follows from those of the last two budgets; it was not tried at this compute.")
    dropped = [(p.backbone, p.dropped_after) for p in searched if p.dropped_after is not None]
    return lines + [f"{name} was dropped after budget {budget + 1}: it has no law." for name, budget in dropped]


def _prediction(values: np.ndarray | pd.Series | tuple) -> Prediction:
    value, low, high = (float(v) for v in values)
    return Prediction(value=value, low=low, high=high)
