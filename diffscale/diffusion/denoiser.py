"""The denoiser D(z, logsnr) of any trained network, and guidance of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffscale.diffusion.interpolants import per_image
from diffscale.diffusion.predictions import to_x0
from diffscale.diffusion.process import Diffusion
from diffscale.kernels.cuda_graph import Record, Recorded

log = logging.getLogger(__name__)

Estimate = Callable[..., tuple[Tensor, Tensor | None]]
"""`denoise`, or what computes the same from the same arguments."""


def denoise(
    diffusion: Diffusion,
    model: nn.Module,
    z: Tensor,
    logsnr: Tensor,
    label: Tensor | None = None,
    state: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, Tensor | None]:
    """(x̂, state): the network's estimate of the clean x at noise level logsnr, unclipped, and the state it carries on.

    z (B, C, H, W) = alpha·x + sigma·eps at the scale of `diffusion.scale_images`, as is x̂ (float32); logsnr (B,);
    label (B,) int64 or None; extra: further keyword arguments of the model.
    """
    logsnr = logsnr.float()
    alpha, sigma = diffusion.alpha_sigma(logsnr)
    norm = diffusion.input_norm(alpha, sigma)
    x_in = z if norm is None else z / per_image(norm, z)
    out, state = model(x_in, logsnr, label, state, **extra)
    alpha_b, sigma_b = per_image(alpha, z), per_image(sigma, z)
    return to_x0(diffusion.prediction, z, out.float(), alpha_b, sigma_b, diffusion.scaled_sigma_data), state


class CapturedDenoiser:
    """`denoise` on a GPU as CUDA graphs, one for each network and shape of its inputs.

    A sampler calls one network with one shape many times, and for a small network the launches take longer than the
    work. Without a GPU, with further keyword arguments, or where a graph cannot be recorded, it is `denoise` itself.
    """

    def __init__(self, record: Record | None = None) -> None:
        """record: of kernels/cuda_graph.py, for a device other than a GPU"""
        self.record = record
        self.graphs: dict[Any, Recorded] = {}
        self.failed = False

    def __call__(
        self,
        diffusion: Diffusion,
        model: nn.Module,
        z: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        state: Tensor | None = None,
        **extra: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and result of `denoise`."""
        if self.failed or extra or (self.record is None and z.device.type != "cuda"):
            return denoise(diffusion, model, z, logsnr, label, state, **extra)
        missing = label is None, state is None
        inputs = [t for t in (z, logsnr, label, state) if t is not None]
        weights = next(model.parameters()).data_ptr()  # they move with a model that goes to the CPU and back
        shapes = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
        key = (id(model), weights, diffusion, missing, shapes)
        if key not in self.graphs:

            def run(z: Tensor, logsnr: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor | None]:
                left = iter(rest)
                return denoise(diffusion, model, z, logsnr, *(None if without else next(left) for without in missing))

            try:
                self.graphs[key] = Recorded(run, inputs, self.record)
            except RuntimeError as error:
                log.warning("sampling goes on without CUDA graphs: %s", str(error).partition("\n")[0])
                self.failed = True
                return denoise(diffusion, model, z, logsnr, label, state)
        x, carried = self.graphs[key](*inputs)
        assert x is not None
        return x, carried

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graphs": {}}


@dataclass(frozen=True)
class Guidance:
    """x̂ = x̂_guide + scale·(x̂ − x̂_guide): 1 is no guidance, 0 is the guide alone.

    The guide is the model without its label (classifier-free, Ho and Salimans 2022), or `model`, a weaker network of
    the same process and with the same label (autoguidance, Karras et al. 2024, "Guiding a Diffusion Model with a Bad
    Version of Itself"). It is used for logsnr within `interval`, ends included (Kynkäänniemi et al. 2024). A pass whose
    estimate has no weight is not made.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None  # (lowest, highest) logsnr; None is everywhere
    model: nn.Module | None = None  # autoguidance
    state: Literal["shared", "own"] | None = None  # see `shares_state`; None for a model that carries none

    def __post_init__(self) -> None:
        if self.interval is not None and not self.interval[0] < self.interval[1]:
            raise ValueError(f"guidance interval = {self.interval}: (lowest, highest) logsnr")

    def active(self, logsnr: float) -> bool:
        """Return whether the guide's estimate has a weight."""
        inside = self.interval is None or self.interval[0] <= logsnr <= self.interval[1]
        return self.scale != 1 and inside

    def needs_model(self, logsnr: float) -> bool:
        """Return whether the model's own estimate has a weight."""
        return self.scale != 0 or not self.active(logsnr)

    @property
    def shares_state(self) -> bool:
        """Whether the pass without labels starts from the state that the labelled pass left, as RIN's authors have it.

        google-research/pix2seq, models/diffusion_utils.py: both passes see the latents of the labelled one.
        """
        return self.state == "shared" and self.model is None


class GuidedDenoiser:
    """`denoise` with guidance for the steps of one sampling run; it keeps the networks' states between its calls.

    estimate: `denoise`, or a `CapturedDenoiser`
    together: whether classifier-free guidance evaluates the network once on twice the batch instead of twice. By
        default on a GPU, where one large pass takes less time than two small ones.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        model: nn.Module,
        label: Tensor | None,
        guidance: Guidance,
        extra: dict[str, Any],
        estimate: Estimate = denoise,
        together: bool | None = None,
    ) -> None:
        if guidance.scale != 1 and guidance.model is None and label is None:
            raise ValueError(f"guidance scale = {guidance.scale}: classifier-free guidance needs labels")
        self.diffusion, self.model, self.label, self.guidance = diffusion, model, label, guidance
        self.extra, self.estimate, self.together = extra, estimate, together
        self.state: Tensor | None = None
        self.guide_state: Tensor | None = None

    def __call__(self, z: Tensor, logsnr: float) -> Tensor:
        """z (B, C, H, W) → x̂ (B, C, H, W)."""
        levels = torch.full((len(z),), logsnr, dtype=torch.float32, device=z.device)
        guidance, shared = self.guidance, self.guidance.shares_state
        guide_state = self.state if shared else self.guide_state
        if guidance.active(logsnr) and guidance.needs_model(logsnr) and self._in_one_pass(z, guide_state):
            return self._together(z, levels, guide_state)
        x = None
        if guidance.needs_model(logsnr):
            x, self.state = self.estimate(self.diffusion, self.model, z, levels, self.label, self.state, **self.extra)
            if not guidance.active(logsnr):
                return x
        guide, label = guidance.model, self.label
        if guide is None:
            guide, label = self.model, None
        other, guide_state = self.estimate(self.diffusion, guide, z, levels, label, guide_state, **self.extra)
        if not shared:
            self.guide_state = guide_state
        elif x is None:
            self.state = guide_state
        return other if x is None else torch.lerp(other, x, guidance.scale)

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
        both, state = self.estimate(self.diffusion, self.model, *twice, state)
        if state is not None:
            self.state, self.guide_state = state.chunk(2)
        x, other = both.chunk(2)
        return torch.lerp(other, x, self.guidance.scale)
