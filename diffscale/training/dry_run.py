"""Describes a run and its costs without starting anything."""

from __future__ import annotations

from diffscale.config import recipes
from diffscale.config.experiment import Experiment
from diffscale.core.device import money
from diffscale.preflight.memory import estimate
from diffscale.training.checkpoint.layout import save_settings
from diffscale.training.initial_weights import with_initial_weights
from diffscale.training.numerics import settled
from diffscale.training.plan import make_plan
from diffscale.training.run import prepare


def describe(experiment: Experiment, preset_or_file: str | None = None) -> str:
    """Return the resolved settings, parameters, FLOPs, memory and budget. Raises UserError as `prepare` does.

    preset_or_file: where the settings come from; its recipe is described if it is one
    """
    dataset, cost = prepare(experiment)
    experiment = with_initial_weights(settled(experiment, dataset), dataset)
    train, plan = experiment.train, make_plan(experiment, cost.flops_per_image)
    lines = [
        save_settings(experiment).decode().rstrip(),
        "",
        f"# run          {experiment.run_folder(dataset.content_hash)}",
        f"# data         {dataset.n:,} images, {dataset.num_classes} classes, {dataset.resolution} pixels",
        f"# parameters   {cost.parameters:,}",
        f"# forward      {cost.forward_macs / 1e9:.4g} GMAC = {2 * cost.forward_macs / 1e9:.4g} GFLOP per image",
        f"# training     {cost.flops_per_image / 1e9:.4g} GFLOP per image",
        f"# memory       {estimate(experiment, dataset).text()}",
    ]
    if plan.end is not None:
        total = plan.end * cost.flops_per_image
        lines.append(f"# budget       {plan.end:,} images = {plan.end / dataset.n:.3g} epochs = {total:.4g} FLOPs")
        lines.append(f"# evaluations  at {', '.join(f'{p:,}' for p in plan.points) or 'no point'} images")
    if plan.device_seconds is not None:
        price = money(plan.device_seconds, train.price_per_device_hour)
        lines.append(f"# budget       {plan.device_seconds:,.0f} device-seconds" + (f" = {price:.2f}" if price else ""))
    if preset_or_file is not None:
        flops = None if plan.end is None else plan.end * cost.flops_per_image
        lines += [f"# {line}" for line in recipes.describe(preset_or_file, experiment, flops)]
    return "\n".join(lines)
