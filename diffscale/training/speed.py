"""Training speed of a network on one core of this machine, before a run: how much a time limit can buy."""

from __future__ import annotations

import time

import torch

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_diffusion, build_model
from diffscale.data import Dataset, Loader
from diffscale.models.cost import count_cost
from diffscale.training.learner import Learner
from diffscale.training.numerics import choose_numerics
from diffscale.training.parallel import World

WARM_UP, STEPS = 2, 5


def core_flops_per_second(experiment: Experiment, dataset: Dataset) -> float:
    """Measure the training FLOP/s of one CPU core with the experiment's network, in seven steps.

    The fastest step counts, so other programs on the machine disturb it little. The result describes this moment: it
    may choose a budget, never how a run computes.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_model(experiment, dataset)
    chosen = choose_numerics(model, "cpu", experiment.train)
    diffusion = build_diffusion(experiment, dataset)
    learner = Learner(chosen.prepare(model), diffusion, experiment, World(), chosen, experiment.num_classes(dataset))
    seconds, batch = [], experiment.train.global_batch
    with Loader(dataset, seed=0, global_batch=batch, stop=batch * (WARM_UP + STEPS)) as loader:
        for images in loader:
            started = time.perf_counter()
            learner.step(images)
            seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    shape = dataset.resolution, dataset.channels, experiment.num_classes(dataset)
    cost = count_cost(lambda: build_model(experiment, dataset), *shape)
    return cost.flops_per_image * batch / min(seconds[WARM_UP:])
