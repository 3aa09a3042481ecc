"""What a run would be and cost, without starting anything."""

from __future__ import annotations

from diffscale.config.experiment import Experiment
from diffscale.core.device import memory_estimate, money
from diffscale.train import prepare
from diffscale.training.checkpoint.layout import save_settings
from diffscale.training.plan import make_plan
from diffscale.training.setting_up import settled


def describe(experiment: Experiment) -> str:
    """Resolved settings, then parameters, FLOPs, memory and the budget. Raises UserError for what cannot work."""
    dataset, cost = prepare(experiment)
    experiment = settled(experiment, dataset)
    train, plan = experiment.train, make_plan(experiment, cost.flops_per_image)
    workers = train.workers if isinstance(train.workers, int) else train.workers[1]
    averages = len(train.ema.power) + (train.ema.halflife_images or train.ema.halflife_fraction is not None)
    micro = train.micro_batch or -(-train.global_batch // workers)
    memory = memory_estimate(cost, int(averages), dataset.resolution, dataset.channels, micro)
    lines = [
        save_settings(experiment).decode().rstrip(),
        "",
        f"# run          {experiment.run_folder(dataset.content_hash)}",
        f"# data         {dataset.n:,} images, {dataset.num_classes} classes, {dataset.resolution} pixels",
        f"# parameters   {cost.parameters:,}",
        f"# forward      {cost.forward_macs / 1e9:.4g} GMAC = {2 * cost.forward_macs / 1e9:.4g} GFLOP per image",
        f"# training     {cost.flops_per_image / 1e9:.4g} GFLOP per image",
        f"# memory       {memory / 2**30:.3g} GiB per worker for weights, gradients, optimizer and averages; "
        "activations come on top",
    ]
    if plan.end is not None:
        total = plan.end * cost.flops_per_image
        lines.append(f"# budget       {plan.end:,} images = {plan.end / dataset.n:.3g} epochs = {total:.4g} FLOPs")
        lines.append(f"# evaluations  at {', '.join(f'{p:,}' for p in plan.points) or 'no point'} images")
    if plan.device_seconds is not None:
        price = money(plan.device_seconds, train.price_per_device_hour)
        lines.append(f"# budget       {plan.device_seconds:,.0f} device-seconds" + (f" = {price:.2f}" if price else ""))
    return "\n".join(lines)
