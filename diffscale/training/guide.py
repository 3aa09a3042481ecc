"""The network that guides sampling, `eval.guide`: another run's checkpoint (Karras et al. 2024, autoguidance).

It is a weaker network of the same process, or one without labels as EDM2's authors guide with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from diffscale.config.experiment import EvalSettings, Experiment
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.data import Dataset
from diffscale.evaluation import Sampling
from diffscale.training.checkpoint import layout as ck
from diffscale.training.checkpoint.tensors import CheckpointDamaged
from diffscale.training.ema import ema_name
from diffscale.training.load import is_run, list_targets

SAME = ("prediction", "interpolant", "input_scale", "input_range", "input_std", "sigma_data", "variance")
"""Settings `diffusion.*` that decide how an output becomes an estimate of the image: both networks share them."""


@dataclass(frozen=True)
class Guide:
    """A loaded guide and the multiply-adds of one of its passes."""

    model: nn.Module
    forward_macs: float

    def guiding(self, sampling: Sampling) -> Sampling:
        """Return the sampler with this network as its guide."""
        return replace(sampling, guidance=replace(sampling.guidance, model=self.model), guide_macs=self.forward_macs)


def with_guide(experiment: Experiment) -> Experiment:
    """Return the experiment with one checkpoint as its guide, and the hash of it and its average.

    Raises UserError for a place without checkpoints and a damaged one.
    """
    settings = experiment.eval
    if settings.guide is None:
        return experiment
    place = storage.resolve(settings.guide, "eval.guide", written=False)
    if not is_run(place):
        raise UserError(setting="eval.guide", value=place, expected="a run's folder or a checkpoint of one")
    (checkpoint,) = list_targets(place)
    try:
        state = ck.read_state(checkpoint)
        ema = _average(settings, checkpoint)
        weights = identify(run=state["record"]["run_id"], images=int(state["images_seen"]), ema=ema)
    except (CheckpointDamaged, KeyError, TypeError, ValueError) as error:
        raise UserError(
            setting="eval.guide", value=checkpoint, expected="an undamaged checkpoint", reason=str(error)
        ) from None
    found = {"guide": checkpoint, "guide_weights": weights}
    return experiment.model_copy(update={"eval": settings.model_copy(update=found)})


def check_guide(experiment: Experiment, dataset: Dataset) -> None:
    """Raise UserError for a guide of another process, or for other images or classes, than the experiment's.

    experiment: as `with_guide` returns it
    """
    if (checkpoint := experiment.eval.guide) is None:
        return
    ours, theirs = experiment.diffusion, ck.read_experiment(checkpoint).diffusion
    for name in SAME:
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine != other:
            raise _unfit(checkpoint, f"diffusion.{name} = {mine}, as the network that it guides", f"it has {other}")
    shape = ck.read_state(checkpoint)["data"]
    for name, mine in (("resolution", dataset.resolution), ("channels", dataset.channels)):
        if shape[name] != mine:
            raise _unfit(checkpoint, f"a network for {name} {mine}", f"it has {shape[name]}")
    classes = experiment.num_classes(dataset)
    if shape["num_classes"] not in (0, classes):
        raise _unfit(checkpoint, f"a network of {classes} classes, or of none", f"it has {shape['num_classes']}")


def load_guide(experiment: Experiment, dataset: Dataset) -> Guide | None:
    """Return the guide of an experiment, None without one. Raises UserError as `check_guide`, and for missing weights.

    experiment: as `with_guide` returns it
    """
    settings = experiment.eval
    if settings.guide is None:
        return None
    check_guide(experiment, dataset)
    _, model, _, columns = ck.load_for_sampling(settings.guide, _average(settings, settings.guide))
    return Guide(model.requires_grad_(False), float(columns["forward_macs"]))


def _average(settings: EvalSettings, checkpoint: str) -> str:
    """Return the name of the average of the guide's weights: `eval.guide_ema`, or that of its own evaluations."""
    return ema_name(settings.guide_ema or ck.read_experiment(checkpoint).eval.ema)


def _unfit(checkpoint: str, expected: str, reason: str) -> UserError:
    return UserError(setting="eval.guide", value=checkpoint, expected=expected, reason=reason)
