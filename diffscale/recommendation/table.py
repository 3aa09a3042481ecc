"""What the command prints: the plan with its cost before, the recommendation and what came true after."""

from __future__ import annotations

from diffscale.recommendation.plan import Plan
from diffscale.recommendation.request import Request
from diffscale.records.recommendation import Recommendation


def describe_plan(request: Request, plan: Plan) -> str:
    """Return the stages of the search and what they cost at most."""
    lines = [
        f"compute    {request.flops:.3g} FLOPs: at most {plan.most:.3g} ({request.share:.0%}) for the search",
        f"pilot      {len(request.learning_rates)} or more learning rates x {len(request.backbones)} backbones at "
        f"{plan.budgets[0]:.3g} FLOPs",
    ]
    for name, rungs in plan.rungs.items():
        parameters = ", ".join(f"{plan.cost(name, rung).parameters:,}" for rung in rungs)
        lines.append(f"{name:10} begins with networks of {parameters} parameters, {request.seeds} seeds each")
    later = ", ".join(f"{flops:.3g}" for flops in plan.budgets[1:])
    lines.append(f"then       3 sizes of each at {later} FLOPs, around the best one so far")
    return "\n".join(lines)


def describe_recommendation(found: Recommendation, folder: str) -> str:
    """Return the recipe, its predictions and, where it was trained, what came true."""
    r, o = found.recipe, found.outcome
    lines = [
        "",
        f"recipe     {r.backbone} of {r.parameters:,} parameters, {r.images:,} images ({r.epochs:.3g} epochs), "
        f"{r.flops:.3g} FLOPs",
        f"search     {found.search_flops:.3g} FLOPs, {found.search_flops / found.flops:.1%} of the compute",
        f"val loss   {r.val_loss}" + ("" if o is None else f"; came out as {o.val_loss:.4g}"),
    ]
    if r.distance is not None:
        came = "" if o is None else f"; came out as {o.distance:.4g}"
        lines.append(f"distance   {found.metric} {r.distance}{came}")
    if found.alternatives:
        values = ", ".join(
            f"{name} {'diverged' if v is None else f'{v:.4g}'}" for name, v in found.alternatives.items()
        )
        lines.append(
            f"choice     {found.chosen} by {found.metric} ({values}); the predictions are for the settings given"
        )
    if o is not None and o.guidance is not None:
        g = o.guidance
        lines.append(
            f"sampling   {g}, the best of {', '.join(g.heldout)} on held-out images: {found.metric} {g.distance:.4g}, "
            f"{g.nfe} network evaluations and {g.sampling_flops:.3g} FLOPs an image"
        )
    price = "" if r.cost is None else f", {r.cost:.4g} at the stated price"
    lines.append(f"time       {r.device_seconds / 3600:.3g} device-hours{price}")
    lines += [f"why        {line}" for line in r.why] + [f"caveat     {line}" for line in r.caveats]
    lines.append(f"train it   diffscale train {folder}/recipe.yaml")
    lines.append(f"report     diffscale report {folder}")
    return "\n".join(lines)
