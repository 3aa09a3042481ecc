"""Repeats the batches after which a run stopped because they were not finite, and reports what was not finite."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model, open_training_data
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data import Loader
from diffscale.diffusion import training_loss
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.restore import restore
from diffscale.training.fit import fitted
from diffscale.training.initial_weights import start_from, with_initial_weights
from diffscale.training.learner import Batch, Learner
from diffscale.training.numerics import Numerics, settled
from diffscale.training.parallel import World
from diffscale.training.plan import make_plan
from diffscale.training.run import prepare


def replay(experiment: Experiment) -> str:
    """Repeat the batches in this process, from the newest good checkpoint before them. Returns one line per finding.

    Raises UserError if the run did not stop because of losses or gradients that are not finite.
    """
    _, cost = prepare(experiment)
    dataset = open_training_data(experiment)
    experiment = with_initial_weights(settled(experiment, dataset), dataset)
    folder = experiment.run_folder(dataset.content_hash)
    uri = storage.join(folder, "nonfinite.json")
    if not storage.exists(uri):
        raise UserError(
            setting="--replay",
            value=folder,
            expected="a run that stopped because losses or gradients were not finite",
        )
    found = json.loads(storage.read_bytes(uri))
    experiment = fitted(experiment, dataset, World(), folder)
    plan = make_plan(experiment, cost.flops_per_image)
    torch.manual_seed(experiment.train.seed)
    numerics = Numerics.load(folder) or Numerics()
    model = numerics.prepare(build_model(experiment, dataset))
    classes = experiment.num_classes(dataset)
    diffusion = build_diffusion(experiment, dataset)
    learner = Learner(model, diffusion, experiment, numerics=numerics, num_classes=classes, end=plan.end)
    checkpoint = ck.newest_good(folder, until=found["first"])
    if checkpoint is None and experiment.train.init_from is not None:
        start_from(learner, experiment.train.init_from, experiment.train.init_skip)
    if checkpoint is not None:
        restore(learner, checkpoint)
    train, data = experiment.train, experiment.data
    lines = [f"replaying positions {found['first']} to {found['last'] - 1} from {checkpoint or 'the start'}"]
    with Loader(
        dataset,
        seed=train.seed,
        global_batch=train.global_batch,
        start=learner.images_seen,
        stop=found["last"],
        flip=data.flip,
        augment=data.augment,
        order=data.order,
        lanes=data.lanes,
    ) as loader:
        for batch in loader:
            extra = {} if batch.augment_label is None else {"augment_label": batch.augment_label}
            if learner.images_seen >= found["first"]:
                lines += _examine(learner, batch, extra)
            step = learner.step(batch, extra=extra)
            if step.skipped:
                lines.append(f"  step to {step.images_seen}: loss {step.loss}, gradient norm {step.grad_norm}")
    return "\n".join(lines)


def _examine(learner: Learner, batch: Batch, extra: dict[str, Tensor]) -> list[str]:
    """Report samples whose loss is not finite, and the first module whose output is not finite."""
    first: list[str] = []

    def watch(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not first and any(isinstance(t, Tensor) and not bool(t.isfinite().all()) for t in tensors):
                first.append(name)

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in learner.model.named_modules() if n]
    u, noise, label, keep = learner.draw_noise(batch.positions, batch.images.shape[1:], batch.labels)
    with torch.no_grad(), learner.numerics.autocast("cpu"):
        terms = training_loss(
            learner.diffusion, learner.model, batch.images, u=u, noise=noise, label=label, self_cond_keep=keep, **extra
        )
    for hook in hooks:
        hook.remove()
    lines = [
        f"  position {int(p)}: loss {loss}, logsnr {level:.3f}, image between {image.min():.3f} and {image.max():.3f}"
        for p, loss, level, image in zip(
            batch.positions, terms.loss.tolist(), terms.logsnr.tolist(), batch.images, strict=True
        )
        if not math.isfinite(loss)
    ]
    weights = [n for n, p in learner.model.named_parameters() if not bool(p.isfinite().all())]
    return (
        lines
        + [f"  first module whose output is not finite: {name}" for name in first]
        + [f"  weights that are not finite: {', '.join(weights[:5])}"] * bool(weights)
    )
