"""How the search divides its compute: the budgets, the sizes at the smallest one, and what does not fit, told early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from diffscale.config.experiment import Experiment
from diffscale.config.load import load_tree, merge, validate
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.evaluation.evaluator import make_evaluator
from diffscale.models.cost import Cost
from diffscale.models.families import FAMILIES, RUNGS, smallest
from diffscale.recommendation.request import Request
from diffscale.sweep.ledger import VALIDATION_LOSS
from diffscale.sweep.settings import Sweep
from diffscale.sweep.space import nest
from diffscale.training.run import count
from diffscale.training.settings_check import check_settings

FEWEST_STEPS = 50
"""Optimisation steps of the middle size at the smallest budget, below which a loss says nothing."""
LATER_SIZES = 3
"""Sizes at every budget but the smallest."""
FURTHER_RATES = 2
"""Learning rates that the pilot adds at most for a backbone whose best one is the lowest or the highest."""
WARMUP_SHARE = 0.1
"""Largest part of a run for the warm-up of the learning rate. A fixed number of images would be most of a small run and
little of a large one, which distorts laws (Porian et al., arXiv 2406.19146)."""
PAPER_SIZE, PAPER_EXPONENT, PAPER_COMPUTE = 1.5e12, 0.568, 1.5e21
"""FLOPs of an image that are best with a compute: a diffusion transformer of 1e9 parameters and 256 tokens at 1.5e21
FLOPs, and the exponent of its size (Liang et al., arXiv 2410.08184). Where the search begins."""


CostOf = Callable[[str, int], Cost]


@dataclass(frozen=True)
class Plan:
    """The budgets of the search and the sizes with which it begins.

    budgets: FLOPs of one run at each
    rungs: by backbone, the sizes at the smallest budget
    smallest: by backbone, the first size whose tokens hold their patch
    most: FLOPs that the search uses at most
    cost: of a backbone and rung
    warmup_images: as in the settings, the most that a run has
    """

    budgets: tuple[float, ...]
    rungs: dict[str, tuple[int, ...]]
    smallest: dict[str, int]
    most: float
    cost: CostOf
    warmup_images: int = 0

    def warmup(self, backbone: str, rung: int, flops: float) -> int:
        """Return the images of the warm-up of a run of `flops`."""
        return warmup_images(self.warmup_images, flops / self.cost(backbone, rung).flops_per_image)


def warmup_images(setting: int, images: float) -> int:
    """Return the images of the warm-up of a run of `images`, at most those of the setting."""
    return min(setting, int(WARMUP_SHARE * images))


def make_plan(request: Request) -> Plan:
    """Return the plan. Raises UserError for settings that cannot train and for a budget that is too small."""
    first = run_settings(request, request.backbones[0], 0)
    dataset = check_settings(first)
    make_evaluator(first, dataset)  # raises UserError for a metric without weights
    if dataset.heldout is None:
        raise UserError(
            setting="DATASET",
            value=first.data.path,
            expected="a dataset with held-out images",
            reason="sizes are compared by their validation loss",
            fix="build it with python -m diffscale.data build ... --split 0.1",
        )
    batch = first.train.global_batch
    if dataset.n < batch:
        raise UserError(
            setting="train.global_batch",
            value=batch,
            expected=f"at most {dataset.n}, the images of the dataset",
            fix=f"train.global_batch={max(dataset.n // 4, 1)}",
        )

    @cache
    def cost(backbone: str, rung: int) -> Cost:
        return count(run_settings(request, backbone, rung), dataset)

    units = _units(request)
    flops = request.share * request.flops / units
    firsts = {name: _first(name, resolution_of(request), first.diffusion.prediction) for name in request.backbones}
    middles = {name: min(lowest + request.sizes // 2, RUNGS - 1) for name, lowest in firsts.items()}
    needed = max(FEWEST_STEPS * batch * cost(name, middle).flops_per_image for name, middle in middles.items())
    if flops < needed:
        raise UserError(
            setting="--flops",
            value=request.flops,
            expected=f"at least {needed * units / request.share:.3g}",
            reason=f"its share for the search ({request.share:g}) gives {flops:.3g} FLOPs to a run of the smallest "
            f"budget; {FEWEST_STEPS} steps of the small networks take {needed:.3g}",
            fix="more compute, a larger --share, fewer backbones, or a smaller train.global_batch",
        )
    rungs = {name: _around(_middle(name, flops, cost), request.sizes, firsts[name]) for name in request.backbones}
    budgets = tuple(flops * request.factor**k for k in range(request.budgets))
    return Plan(budgets, rungs, firsts, request.share * request.flops, cost, first.optim.warmup_images)


def window(best: int) -> tuple[int, ...]:
    """Return the sizes to try at a budget from the best size of the budget before: the best size grows with compute."""
    return _around(best + 1, LATER_SIZES)


def run_settings(request: Request, backbone: str, rung: int) -> Experiment:
    """Return the settings of a run of a backbone and size, but for its budget and learning rate."""
    sweep = stage(request, {backbone: {"model": FAMILIES[backbone](rung, resolution_of(request))}}, 1.0)
    settings = sweep.overrides | sweep.variants[backbone] | {"name": runs_name(request)}
    return validate(merge(load_tree(request.base), nest(settings)))


def runs_name(request: Request) -> str:
    """Return the name of a request's runs and folders: other requests have others, so no evaluation is mistaken."""
    what = request.model_dump(mode="json", exclude={"max_concurrent", "guidance", "solvers"})
    return f"{request.name}-{identify(base_settings=load_tree(request.base), **what)[:8]}"


def resolution_of(request: Request) -> int:
    """Return the side in pixels of the training images."""
    data = merge(load_tree(request.base), nest(request.overrides)).get("data", {})
    return int(data.get("resolution", 32))


def stage(request: Request, variants: dict[str, dict], flops: float, **settings: Any) -> Sweep:
    """Return one stage of the search as a sweep, so that a run is shared by every stage that has it.

    variants: name to the dotted keys of each run
    flops: the budget of each run
    settings: further ones of `Sweep`
    """
    return Sweep(
        name=runs_name(request),
        base=request.base,
        overrides={"eval.points": [1.0]} | request.overrides | {"train.flops": flops, "train.images": None},
        variants=variants,
        metric=VALIDATION_LOSS,
        max_concurrent=request.max_concurrent,
        **settings,
    )


def _units(request: Request) -> float:
    """Return the cost of the search in runs of the smallest budget, if no stage shared a run with another."""
    tuned = len(request.learning_rates) > 1
    pilot = len(request.learning_rates) + (FURTHER_RATES if tuned else 0)
    at_each = LATER_SIZES + (1 if tuned else 0)  # one more with half the learning rate
    later = sum(at_each * request.factor**k for k in range(1, request.budgets))
    runs = len(request.backbones) * (pilot + request.sizes * request.seeds + later)
    return runs + len(alternatives(request)) * request.factor ** (request.budgets - 1)


def alternatives(request: Request) -> dict[str, dict[str, Any]]:
    """Return the schedules and training resolutions to compare, by name as dotted keys; {} for none.

    All are compared at `data.resolution`, which has to be among the resolutions of the dataset.
    """
    if not request.schedules and not request.resolutions:
        return {}
    common = resolution_of(request)
    sides = request.resolutions or (common,)
    schedules = [{"diffusion.schedule": {"name": name}} for name in request.schedules] or [{}]
    return {
        ", ".join([*(str(s["name"]) for s in keys.values()), f"{side} px"]): keys
        | {"data.resolution": side, "eval.eval_resolution": common}
        for keys in schedules
        for side in sides
    }


def _middle(backbone: str, compute: float, cost: CostOf) -> int:
    """Return the first size of the ladder that is as expensive as the best one by the paper."""
    best = PAPER_SIZE * (compute / PAPER_COMPUTE) ** PAPER_EXPONENT
    return next((rung for rung in range(RUNGS) if cost(backbone, rung).flops_per_image >= best), RUNGS - 1)


def _first(backbone: str, resolution: int, prediction: str) -> int:
    """Return the first size of a backbone that can learn. Raises UserError if too few can."""
    first = 0 if prediction == "x0" else _learnable(backbone, resolution)
    if first is None:
        able = [name for name in FAMILIES if _learnable(name, resolution) is not None]
        raise UserError(
            setting="backbones",
            value=backbone,
            expected=f"backbones whose tokens are wider than their patches at {resolution} pixels",
            reason=f"no three sizes of {backbone} have them, and narrower ones cannot carry the noise of a patch",
            fix=f"backbones=[{','.join(able)}], or diffusion.prediction=x0",
        )
    return first


def _learnable(backbone: str, resolution: int) -> int | None:
    """Return the first size that can predict noise or v, None if the ladder has too few of them for a later budget."""
    first = smallest(backbone, resolution)
    return None if first is None or first > RUNGS - LATER_SIZES else first


def _around(middle: int, number: int, first: int = 0) -> tuple[int, ...]:
    """Return `number` rungs around the middle, within the ladder from `first` on."""
    lowest = max(min(middle - number // 2, RUNGS - number), first)
    return tuple(range(lowest, min(lowest + number, RUNGS)))
