"""The denoiser D(z, logsnr) of any trained network, and guidance of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffscale.diffusion.interpolants import per_image
from diffscale.diffusion.preconditioning import Preconditioning
from diffscale.diffusion.predictions import to_x0
from diffscale.kernels.cuda_graph import Record, Recorded

log = logging.getLogger(__name__)


class Denoised(NamedTuple):
    """What one evaluation of a network gives a sampler."""

    x: Tensor  # (B, C, H, W) float32, the estimate of the clean x, unclipped
    state: Tensor | None  # what the network carries to its next evaluation
    share: Tensor | None  # (B, C, H, W), of ln β in the variance of a reverse step; None without a learned variance


Estimate = Callable[..., Denoised]
"""`denoise_with_share`, or what computes the same from the same arguments."""


def denoise(
    diffusion: Preconditioning,
    model: nn.Module,
    z: Tensor,
    logsnr: Tensor,
    label: Tensor | None = None,
    state: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, Tensor | None]:
    """(x̂, state): see `denoise_with_share`."""
    return denoise_with_share(diffusion, model, z, logsnr, label, state, **extra)[:2]


def denoise_with_share(
    diffusion: Preconditioning,
    model: nn.Module,
    z: Tensor,
    logsnr: Tensor,
    label: Tensor | None = None,
    state: Tensor | None = None,
    **extra: Any,
) -> Denoised:
    """The network's estimate of the clean x at noise level logsnr, with what else it gives.

    z (B, C, H, W) = alpha·x + sigma·eps at the scale of `diffusion.scale_images`, as is x̂ (float32); logsnr (B,);
    label (B,) int64 or None; extra: further keyword arguments of the model.
    """
    logsnr = logsnr.float()
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    norm = diffusion.input_norm(alpha, sigma)
    x_in = z if norm is None else z / per_image(norm, z)
    out, state = model(x_in, logsnr, label, state, **extra)
    out, share = diffusion.split_output(out.float())
    alpha_b, sigma_b = per_image(alpha, z), per_image(sigma, z)
    x = to_x0(diffusion.prediction, z, out, alpha_b, sigma_b, diffusion.scaled_sigma_data)
    return Denoised(x, state, share)


class CapturedDenoiser:
    """`denoise_with_share` on a GPU as CUDA graphs, one for each network and shape of its inputs.

    A sampler calls one network with one shape many times, and for a small network the launches take longer than the
    work. Without a GPU, with further keyword arguments, or where a graph cannot be recorded, it calls the function.
    """

    def __init__(self, record: Record | None = None) -> None:
        """record: of kernels/cuda_graph.py, for a device other than a GPU"""
        self.record = record
        self.graphs: dict[Any, Recorded] = {}
        self.failed = False

    def __call__(
        self,
        diffusion: Preconditioning,
        model: nn.Module,
        z: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        state: Tensor | None = None,
        **extra: Any,
    ) -> Denoised:
        """Arguments and result of `denoise_with_share`."""
        if self.failed or extra or (self.record is None and z.device.type != "cuda"):
            return denoise_with_share(diffusion, model, z, logsnr, label, state, **extra)
        missing = label is None, state is None
        inputs = [t for t in (z, logsnr, label, state) if t is not None]
        weights = next(model.parameters()).data_ptr()  # they move with a model that goes to the CPU and back
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        key = (id(model), weights, diffusion, missing, shapes)
        if key not in self.graphs:

            def run(z: Tensor, logsnr: Tensor, *rest: Tensor) -> Denoised:
                left = iter(rest)
                given = (None if without else next(left) for without in missing)
                return denoise_with_share(diffusion, model, z, logsnr, *given)

            try:
                self.graphs[key] = Recorded(run, inputs, self.record)
            except RuntimeError as error:
                log.warning("sampling goes on without CUDA graphs: %s", str(error).partition("\n")[0])
                self.failed = True
                return denoise_with_share(diffusion, model, z, logsnr, label, state)
        x, carried, share = self.graphs[key](*inputs)
        assert x is not None
        return Denoised(x, carried, share)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graphs": {}}


@dataclass(frozen=True)
class Guidance:
    """x̂ = x̂_guide + scale·(x̂ − x̂_guide): 1 is no guidance, 0 is the guide alone.

    The guide is the model without its label (classifier-free, Ho and Salimans 2022), or `model`, a weaker network of
    the same process that gets the label if it has classes (autoguidance, Karras et al. 2024, "Guiding a Diffusion Model
    with a Bad Version of Itself"). It is used for logsnr within `interval`, ends included (Kynkäänniemi et al. 2024). A
    pass whose estimate has no weight is not made.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None  # (lowest, highest) logsnr; None is everywhere
    model: nn.Module | None = None  # autoguidance
    state: Literal["shared", "own"] | None = None  # see `shares_state`; None for a model that carries none
    channels: int | None = None  # the first ones, which are guided alone (DiT's code: 3 of 4 latents); None guides all

    def __post_init__(self) -> None:
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError(f"guidance interval = {self.interval}: (lowest, highest) logsnr")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels = {self.channels}: at least 1")

    def active(self, logsnr: float) -> bool:
        """Return whether the guide's estimate has a weight."""
        inside = self.interval is None or self.interval[0] <= logsnr <= self.interval[1]
        return self.scale != 1 and inside

    def needs_model(self, logsnr: float) -> bool:
        """Return whether the model's own estimate has a weight."""
        return self.scale != 0 or not self.active(logsnr) or self.channels is not None

    @property
    def shares_state(self) -> bool:
        """Whether the pass without labels starts from the state that the labelled pass left, as RIN's authors have it.

        google-research/pix2seq, models/diffusion_utils.py: both passes see the latents of the labelled one.
        """
        return self.state == "shared" and self.model is None

    def mix(self, guide: Tensor, x: Tensor) -> Tensor:
        """x̂ (B, C, H, W) from the estimates of the guide and of the model."""
        mixed = torch.lerp(guide, x, self.scale)
        return mixed if self.channels is None else torch.cat([mixed[:, : self.channels], x[:, self.channels :]], dim=1)


class GuidedDenoiser:
    """`denoise` with guidance for the steps of one sampling run; it keeps the networks' states between its calls.

    estimate: `denoise_with_share`, or a `CapturedDenoiser`
    together: whether classifier-free guidance evaluates the network once on twice the batch instead of twice. By
        default on a GPU, where one large pass takes less time than two small ones.
    share: of ln β in the variance of the step from the last level evaluated; the model's with its label, unguided
        (Peebles and Xie 2023); None without a learned variance
    """

    def __init__(
        self,
        diffusion: Preconditioning,
        model: nn.Module,
        label: Tensor | None,
        guidance: Guidance,
        extra: dict[str, Any],
        estimate: Estimate = denoise_with_share,
        together: bool | None = None,
    ) -> None:
        if guidance.scale != 1 and guidance.model is None and label is None:
            raise ValueError(f"guidance scale = {guidance.scale}: classifier-free guidance needs labels")
        self.diffusion, self.model, self.label, self.guidance = diffusion, model, label, guidance
        self.extra, self.estimate, self.together = extra, estimate, together
        self.state: Tensor | None = None
        self.guide_state: Tensor | None = None
        self.share: Tensor | None = None

    def __call__(self, z: Tensor, logsnr: float) -> Tensor:
        """z (B, C, H, W) → x̂ (B, C, H, W)."""
        levels = torch.full((len(z),), logsnr, dtype=torch.float32, device=z.device)
        guidance, shared = self.guidance, self.guidance.shares_state
        guide_state = self.state if shared else self.guide_state
        if guidance.active(logsnr) and guidance.needs_model(logsnr) and self._in_one_pass(z, guide_state):
            return self._together(z, levels, guide_state)
        x = None
        if guidance.needs_model(logsnr):
            x, self.state, self.share = self.estimate(
                self.diffusion, self.model, z, levels, self.label, self.state, **self.extra
            )
            if not guidance.active(logsnr):
                return x
        guide, label = guidance.model, self.label
        if guide is None:
            guide, label = self.model, None
        elif getattr(guide, "num_classes", None) == 0:
            label = None
        other, guide_state, share = self.estimate(self.diffusion, guide, z, levels, label, guide_state, **self.extra)
        if not shared:
            self.guide_state = guide_state
        elif x is None:
            self.state = guide_state
        if x is None:
            self.share = share
            return other
        return guidance.mix(other, x)

    def _in_one_pass(self, z: Tensor, guide_state: Tensor | None) -> bool:
        wanted = z.device.type == "cuda" if self.together is None else self.together
        both_or_neither = (self.state is None) == (guide_state is None)
        return wanted and both_or_neither and self.guidance.model is None and not self.extra

    def _together(self, z: Tensor, levels: Tensor, guide_state: Tensor | None) -> Tensor:
        assert self.label is not None
        none = torch.full_like(self.label, self.model.num_classes)  # type: ignore[arg-type]  # of a conditional Backbone
        state = None
        if self.state is not None and guide_state is not None:
            state = torch.cat([self.state, guide_state])
        twice = torch.cat([z, z]), torch.cat([levels, levels]), torch.cat([self.label, none])
        both, state, share = self.estimate(self.diffusion, self.model, *twice, state)
        self.share = None if share is None else share.chunk(2)[0]
        if state is not None:
            self.state, self.guide_state = state.chunk(2)
        x, other = both.chunk(2)
        return self.guidance.mix(other, x)
