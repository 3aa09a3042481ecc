"""Runs a recommendation: the search, the recipe, and with `go` the recipe's training. What is done is not repeated."""

from __future__ import annotations

import math
from itertools import product

import yaml

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, open_training_data
from diffscale.config.load import load_tree, merge, parse_overrides, validate
from diffscale.core import storage
from diffscale.evaluation.metrics.registry import recorded_name
from diffscale.models.families import FAMILIES
from diffscale.recommendation.plan import Plan, alternatives, resolution_of, run_settings, runs_name, warmup_images
from diffscale.recommendation.recipe import choose_recipe
from diffscale.recommendation.request import Request
from diffscale.recommendation.search import search
from diffscale.records.recommendation import (
    FILE,
    Outcome,
    Recipe,
    Recommendation,
    SamplingChoice,
    read_recommendations,
    write_recommendation,
)
from diffscale.records.schema import Record, rank
from diffscale.records.store import RECORDS_FILE, read_records, write_records_file
from diffscale.sweep.space import nest
from diffscale.training.evaluate_runs import EvaluateOptions, evaluate_run, guidance_settings
from diffscale.training.load import solver_settings
from diffscale.training.numerics import settled
from diffscale.training.own_records import is_own, own_sampling
from diffscale.training.record_columns import dataset_name
from diffscale.training.run import RunResult, count, train

PRESET = "recipe.yaml"


def folder_of(request: Request) -> str:
    """Return the folder of a recommendation: the same for the same request, however many runs train at a time."""
    place = run_settings(request, request.backbones[0], 0).storage
    return storage.join(storage.check_absolute(place), "recommendations", runs_name(request))


def recommend(request: Request, plan: Plan, handle_signals: bool = False) -> Recommendation:
    """Finish the search and write the recommendation and the recipe's preset into the folder of the request.

    handle_signals: SIGTERM and SIGINT end the running trials at a checkpoint and raise Stopped (main thread only).
    """
    folder = folder_of(request)
    text = yaml.safe_dump(request.model_dump(mode="json"), sort_keys=False)
    storage.write_bytes(storage.join(folder, "request.yaml"), text.encode())
    searched, tried, spent = search(request, plan, handle_signals)
    first = run_settings(request, request.backbones[0], 0)
    dataset = open_training_data(first)
    recipe = choose_recipe(searched, plan, request.flops - spent, dataset, first.train.price_per_device_hour)
    metric = recorded_name(first.eval.metrics[0], first.eval.resize)
    found = Recommendation(
        name=request.name,
        dataset=dataset_name(first.data.path),
        dataset_hash=dataset.content_hash,
        resolution=dataset.resolution,
        metric=metric,
        flops=request.flops,
        share=request.share,
        search_flops=spent,
        budgets=plan.budgets,
        searched=tuple(searched),
        alternatives=tried,
        chosen=min(
            (name for name, value in tried.items() if value is not None),
            key=lambda n: rank(metric, tried[n] or 0.0),
            default="",
        ),
        recipe=recipe,
    )
    outcome = outcome_of(recipe_settings(request, found))
    if outcome is not None:
        outcome = outcome.model_copy(update={"guidance": _stored_choice(request, outcome.run_id)})
    found = found.model_copy(update={"outcome": outcome})
    _store(request, found)
    return found


def is_complete(request: Request, found: Recommendation) -> bool:
    """Return whether the recipe was trained, and its sampling chosen where the request has several."""
    return found.outcome is not None and (found.outcome.guidance is not None or not _samplings(request))


def go(request: Request, found: Recommendation) -> tuple[Recommendation, RunResult]:
    """Train the recipe with what the search left. Return the recommendation with its outcome, once it is finished."""
    experiment = recipe_settings(request, found)
    result = train(experiment, handle_signals=True)
    if result.finished:
        outcome = outcome_of(experiment)
        if outcome is not None and _samplings(request):
            choice = _best_sampling(request, experiment, result.run_folder)
            outcome = outcome.model_copy(update={"guidance": choice})
        found = found.model_copy(update={"outcome": outcome})
        _store(request, found)
    return found, result


def _samplings(request: Request) -> dict[str, tuple[str, str]]:
    """Return the (solver, guidance) to choose from by name; "" is that of the settings. {} if there is no choice."""
    pairs = product(request.solvers or ("",), request.guidance or ("",))
    return {name: pair for pair in pairs if (name := " ".join(filter(None, pair)))}


def _best_sampling(request: Request, experiment: Experiment, run_folder: str) -> SamplingChoice | None:
    """Evaluate the recipe's run with each solver and guidance. Return the best on held-out images, None without any."""
    metric = recorded_name(experiment.eval.metrics[0], experiment.eval.resize)
    rows: dict[str, Record] = {}
    samplings = _samplings(request)
    for name, (solver, guidance) in samplings.items():
        options = EvaluateOptions(solvers=(solver,) if solver else (), guidances=(guidance,) if guidance else ())
        rows[name] = next(row for row in evaluate_run(run_folder, [], options) if row.metric == metric)
    known = {name: row for name, row in rows.items() if row.value_heldout is not None}
    if not known:
        return None
    best = min(known, key=lambda name: rank(metric, known[name].value_heldout or 0.0))
    solver, guidance = samplings[best]
    return SamplingChoice(
        solver=solver,
        guidance=guidance,
        heldout={name: row.value_heldout for name, row in rows.items()},
        distance=rows[best].value,
        nfe=rows[best].nfe,
        sampling_flops=rows[best].sampling_flops,
    )


def _stored_choice(request: Request, run_id: str) -> SamplingChoice | None:
    """Return the choice that an earlier call made for the recipe's run, unless this request has others to try."""
    folder, samplings = folder_of(request), list(_samplings(request))
    stored = read_recommendations([folder]) if storage.exists(storage.join(folder, FILE)) else []
    for outcome in (found.outcome for found in stored if found.outcome is not None):
        choice = outcome.guidance
        if choice is not None and outcome.run_id == run_id and samplings in ([], list(choice.heldout)):
            return choice
    return None


def _store(request: Request, found: Recommendation) -> None:
    """Write the recommendation, the preset, and the records of its runs, which a report of the folder reads."""
    folder = folder_of(request)
    runs = storage.join(folder.rpartition("/recommendations/")[0], "runs")
    ids = {point.run_id for part in found.searched for point in part.points}
    ids |= {found.outcome.run_id} if found.outcome else set()
    records = [row for row in read_records([runs]) if row.run_id in ids]
    storage.write_bytes(storage.join(folder, PRESET), preset_of(request, found).encode())
    write_records_file(storage.join(folder, RECORDS_FILE), records)
    write_recommendation(folder, found)


def preset_of(request: Request, found: Recommendation) -> str:
    """Return the recipe as a preset: its settings with the chosen sampling, and comments with reasons and costs."""
    experiment = with_sampling(recipe_settings(request, found), found)
    choice = None if found.outcome is None else found.outcome.guidance
    if choice is None:
        dataset = open_training_data(experiment)
        diffusion, sampling = build_diffusion(experiment, dataset), own_sampling(experiment, "fp32")
        nfe = sampling.fields(diffusion)["nfe"]
        cost = sampling.flops(diffusion, count(experiment, dataset).forward_macs)
        chosen = "as in the settings"
    else:
        nfe, cost = choice.nfe, choice.sampling_flops
        chosen = f"the best of {', '.join(choice.heldout)} on held-out images"
    guidance = f"guidance {experiment.eval.guidance_scale:g}"
    lines = [
        f"Recommended for {found.dataset} at {request.flops:.3g} FLOPs; {found.recipe.flops:.3g} are left for it.",
        f"Sampling with {experiment.eval.solver.name} and {guidance}, {chosen}: "
        f"{nfe} network evaluations, {cost:.3g} FLOPs an image.",
        *found.recipe.why,
        *found.recipe.caveats,
    ]
    settings = experiment.model_dump(mode="json", exclude={"storage"})
    return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(settings, sort_keys=False)


def with_sampling(experiment: Experiment, found: Recommendation) -> Experiment:
    """Return the settings with the chosen sampler and guidance, if one was chosen."""
    choice = None if found.outcome is None else found.outcome.guidance
    if choice is None:
        return experiment
    tree = merge(experiment.model_dump(mode="json"), parse_overrides(guidance_settings(choice.guidance)))
    return validate(merge(tree, {"eval": {"solver": solver_settings(choice.solver)}}) if choice.solver else tree)


def recipe_settings(request: Request, found: Recommendation) -> Experiment:
    """Return the settings of the recipe's run. It continues the search's run with these settings, if there is one."""
    recipe: Recipe = found.recipe
    part = next(p for p in found.searched if p.backbone == recipe.backbone)
    changes = alternatives(request).get(found.chosen, {})
    usual = run_settings(request, recipe.backbone, recipe.rung).optim.warmup_images
    settings = (
        request.overrides
        | changes
        | {
            "name": runs_name(request),
            "model": FAMILIES[recipe.backbone](recipe.rung, changes.get("data.resolution", resolution_of(request))),
            "optim.lr": recipe.learning_rate or part.learning_rate,
            "optim.warmup_images": warmup_images(usual, recipe.images),
            "train.images": None,
            "train.flops": recipe.flops,
        }
    )
    return validate(merge(load_tree(request.base), nest(settings)))


def outcome_of(experiment: Experiment) -> Outcome | None:
    """Return what a run of the recipe gave at its end; None before."""
    dataset = open_training_data(experiment)
    folder = settled(experiment, dataset).run_folder(dataset.content_hash)
    rows = read_records([folder]) if storage.exists(folder) else []
    metric = recorded_name(experiment.eval.metrics[0], experiment.eval.resize)
    flops = experiment.train.flops or math.inf
    ends = [r for r in rows if r.metric == metric and r.train_flops >= flops * (1 - 1e-9) and is_own(r, experiment)]
    if not ends:
        return None
    end = min(ends, key=lambda r: r.train_flops)
    return Outcome(
        run_id=end.run_id,
        images=end.images_seen,
        flops=end.train_flops,
        device_seconds=end.device_seconds,
        val_loss=math.nan if end.val_loss is None else end.val_loss,
        distance=end.value,
        distance_low=end.value_low,
        distance_high=end.value_high,
    )
