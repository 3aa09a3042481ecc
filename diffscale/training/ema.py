"""Averages of the weights over training, as functions of images seen: a half-life, and EDM2's power functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diffscale.config.experiment import EmaSettings, Experiment
from diffscale.core.errors import UserError
from diffscale.training.checkpoint.state import local_shard, part_of
from diffscale.training.flat import flat_like
from diffscale.training.parallel import World

Values = np.ndarray | np.float64

HALFLIFE = "halflife"


@dataclass(frozen=True)
class Weights:
    """A network, and the name of the average that it carries: none, halflife, std0.050, ..."""

    model: nn.Module
    ema: str


class Ema:
    """The averages of the settings, each a float32 copy of the (local) parameters; buffers are the model's.

    Of replicated parameters every rank keeps all of an average, or its rows alone (`shared_by`): an update is
    elementwise, so the values are the same.

    Averages are named `halflife` and `std0.050` (a power function's relative width). They are functions of the weights
    after each step and of images seen alone, so a resumed run continues them bit for bit. Each lies in one buffer, and
    so does a copy of the weights that an update needs: two kernels and one for each average, however many parameters.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings, shared_by: World | None = None) -> None:
        """shared_by: the ranks of which each keeps its rows of the averages of replicated parameters"""
        self.settings, self.shared_by = settings, shared_by
        self._whole = {name: local_shard(p).detach() for name, p in model.named_parameters()}
        self.parameters = {name: self.own_rows(p) for name, p in self._whole.items()}
        names = tracked(settings)
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._flat: list[Tensor] = []
        self._weights = list(self.parameters.values())
        if names:
            self._copy, self._views = flat_like(self._weights)
        for name in names:
            flat, views = flat_like(self._weights)
            for view, weight in zip(views, self._weights, strict=True):
                view.copy_(weight)
            self.averages[name] = dict(zip(self.parameters, views, strict=True))
            self._flat.append(flat)
        self._exponents = {profile_name(std): exponent(std) for std in settings.power}

    def shares(self, images_seen: int, images: int) -> list[float]:
        """Return the share of the new weights in each average, for a step of `images` that ended at `images_seen`."""
        return [1 - self.beta(name, images_seen, images) for name in self.averages]

    @torch.no_grad()
    def update(self, shares: Tensor) -> None:
        """Update the averages after a step. shares: float32 (averages,), what `shares` returned, on the device."""
        if self._flat:
            torch._foreach_copy_(self._views, self._weights)
        for average, share in zip(self._flat, shares.unbind(), strict=True):
            average.lerp_(self._copy, share)

    def average(self, name: str) -> dict[str, Tensor]:
        """Return an average of the (local) parameters, by their names. Raises UserError for one that is not tracked."""
        if name not in self.averages:
            raise _not_tracked(name, self.settings)
        return self.averages[name]

    def own_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows that this rank keeps of a replicated tensor, which share its memory: all unless shared."""
        world = self.shared_by
        return tensor if world is None else part_of(tensor, world.rank, world.size)[0]

    @torch.no_grad()
    def copy_to(self, name: str, targets: Mapping[str, Tensor]) -> None:
        """Copy an average into tensors laid out as the (local) parameters, by their names.

        A collective call where averages are shared: the parts arrive one after the other. Raises UserError for an
        average that is not tracked.
        """
        average, world = self.average(name), self.shared_by
        if world is None:
            for key, values in average.items():
                targets[key].copy_(values)
            return
        for rank in range(world.size):
            flat, views = flat_like([part_of(p, rank, world.size)[0] for p in self._whole.values()])
            if rank == world.rank:
                flat.copy_(self._flat[list(self.averages).index(name)])
            if len(flat):  # more ranks than rows
                world.broadcast(flat, rank)
            for key, view in zip(self._whole, views, strict=True):
                part_of(targets[key], rank, world.size)[0].copy_(view)

    def beta(self, name: str, images_seen: int, images: int) -> float:
        """Return the weight of an average's previous value in the update."""
        if name == HALFLIFE:
            return halflife_beta(self.settings, images_seen, images)
        return power_beta(self._exponents[name], images_seen, images)


def tracked(settings: EmaSettings) -> list[str]:
    """Return the names of the averages that training keeps."""
    names = [profile_name(std) for std in settings.power]
    constant = settings.halflife_images is not None or settings.halflife_fraction is not None
    return [HALFLIFE, *names] if constant else names


def check_average(experiment: Experiment) -> None:
    """Raise UserError if the evaluations of a run need weights that its training does not keep."""
    setting = experiment.eval.ema
    try:
        name = ema_name(setting)
    except ValueError as error:
        raise UserError(setting="eval.ema", value=setting, expected=str(error)) from None
    if experiment.eval.n_generated and name not in ("none", *tracked(experiment.train.ema)):
        raise _not_tracked(setting, experiment.train.ema)


def _not_tracked(name: str, settings: EmaSettings) -> UserError:
    return UserError(
        setting="eval.ema",
        value=name,
        expected="one of: " + ", ".join(["none", *tracked(settings)]),
        reason="train.ema tracks no other average, so there would be no such weights to evaluate",
        fix="name a tracked one, or track it: train.ema.power=[0.05], train.ema.halflife_fraction=0.05",
    )


def halflife_beta(settings: EmaSettings, images_seen: int, images: int) -> float:
    """Return ½^(images / half-life).

    The half-life is a share of `images_seen`, and at most `halflife_images` if set: an early average is short enough
    to forget the random initial weights, a later one has a constant half-life. Without `ramp` it is constant.
    """
    if settings.halflife_images is not None:
        share = settings.halflife_fraction or settings.ramp
        limit = math.inf if share is None else share * images_seen
        halflife = min(limit, settings.halflife_images)
    else:
        halflife = (settings.halflife_fraction or 0) * images_seen
    return 0.5 ** (images / halflife)


def power_beta(gamma: float, images_seen: int, images: int) -> float:
    """Return (1 − Δt/t)^(γ+1) with t counted after the step; the first is 0 (Karras et al. 2023, eq. 127)."""
    return (1 - images / images_seen) ** (gamma + 1)


def exponent(std: float) -> float:
    """Return γ of the power function whose profile has the relative width `std`, 0 < std < 0.289 (Karras et al. 2023,
    eq. 126): the largest real root of γ³ + 7γ² + (16 − s)γ + (12 − s), s = std⁻². 0.05 → 16.972199, 0.10 → 6.937204.

    Raises ValueError outside the range.
    """
    if not 0 < std < math.sqrt(1 / 12):
        raise ValueError(f"ema width = {std}: above 0 and below {math.sqrt(1 / 12):.3f}")
    s = std**-2.0
    roots = np.roots([1.0, 7.0, 16.0 - s, 12.0 - s])
    return float(np.max(roots[np.abs(roots.imag) < 1e-6].real))


def profile_name(std: float) -> str:
    """Return the name of the average with a relative width."""
    return f"std{std:.3f}"


def ema_name(setting: str) -> str:
    """Return the name of the weights of a setting `eval.ema`: none, halflife, or a width such as 0.05 or std0.050.

    Raises ValueError for anything else.
    """
    if setting in ("none", HALFLIFE):
        return setting
    try:
        std = float(setting.removeprefix("std"))
        exponent(std)
    except ValueError:
        raise ValueError(f"ema = {setting!r}: none, halflife, or a relative width such as 0.05") from None
    return profile_name(std)


def reconstruct(stored: list[tuple[float, int]], wanted: tuple[float, int]) -> np.ndarray:
    """Return the weights (n,) of n stored averages whose sum best approximates another one (Karras et al. 2023, C.2).

    stored: (relative width, images seen) of each, none later than `wanted`'s images seen. Least squares between the
    averaging profiles in float64; the weights sum to 1. A stored average itself comes back exactly.
    Raises ValueError if nothing is stored or a stored average is later.
    """
    if not stored or any(t > wanted[1] for _, t in stored):
        raise ValueError(f"post-hoc EMA at {wanted[1]} images needs averages stored at or before it, here {stored}")
    if wanted in stored:
        return np.eye(len(stored))[stored.index(wanted)]
    g = np.array([exponent(std) for std, _ in stored])
    t = np.array([float(time) for _, time in stored])
    a = _inner(g[:, None], t[:, None], g[None, :], t[None, :])
    b = _inner(g, t, np.float64(exponent(wanted[0])), np.float64(wanted[1]))
    x = np.linalg.lstsq(a, b, rcond=None)[0]
    return x / x.sum()


def profile_error(stored: list[tuple[float, int]], wanted: tuple[float, int], weights: np.ndarray) -> float:
    """Return the relative L2 error of the weighted sum of the stored profiles against the wanted one."""
    g = np.array([exponent(std) for std, _ in stored])
    t = np.array([float(time) for _, time in stored])
    g_w, t_w = np.float64(exponent(wanted[0])), np.float64(wanted[1])
    norm = float(_inner(g_w, t_w, g_w, t_w))
    square = weights @ _inner(g[:, None], t[:, None], g[None, :], t[None, :]) @ weights
    square += norm - 2 * weights @ _inner(g, t, g_w, t_w)
    return math.sqrt(max(float(square), 0.0) / norm)


def _inner(g_a: Values, t_a: Values, g_b: Values, t_b: Values) -> np.ndarray:
    """Return ∫ of the product of two profiles: (γa+1)(γb+1)·r^e / ((γa+γb+1)·max(ta, tb)), r = ta/tb."""
    ratio = t_a / t_b
    power = np.where(t_a < t_b, g_b, -g_a)
    return (g_a + 1) * (g_b + 1) * ratio**power / ((g_a + g_b + 1) * np.maximum(t_a, t_b))
