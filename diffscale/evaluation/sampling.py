"""Samples of a model as a source of images: what determines sample i, and drawing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffscale.core import keyed_random
from diffscale.core.errors import UserError
from diffscale.core.keyed_random import Stream
from diffscale.diffusion import CapturedDenoiser, Diffusion, Guidance, guided_nfe, keyed_noise, sample
from diffscale.diffusion.solver_settings import SolverSettings
from diffscale.kernels.runtime import exact_float32

if TYPE_CHECKING:
    from diffscale.config.experiment import EvalSettings
    from diffscale.data import Dataset

NO_GUIDANCE = Guidance()
USUAL_BATCH, LARGEST_BATCH = 64, 1024  # of `eval.batch: auto`: without a GPU, and on any
SHARE_OF_MEMORY = 0.25  # of a GPU's, for the tensors of one pass: next to them are networks, moments and averages


@dataclass(frozen=True)
class Sampling:
    """Everything that determines sample i besides the model: part of every record.

    labels: "train" draws classes as often as the training set has them, "uniform" draws all alike, "balanced" is i
        mod classes, "none" drops them, a number is that class.
    batch: images in one pass; samples are identical to the bit only for the same batch.
    """

    solver: SolverSettings
    solver_name: str
    seed: int = 0
    batch: int = 64
    guidance: Guidance = NO_GUIDANCE
    labels: str = "train"
    precision: str = "fp32"

    @property
    def effective_guidance(self) -> Guidance:
        """The guidance of the passes: none where the model without its label would guide itself."""
        return NO_GUIDANCE if self.labels == "none" and self.guidance.model is None else self.guidance

    def fields(self, diffusion: Diffusion) -> dict[str, Any]:
        """Return the columns of a record that the sampler determines. nfe counts evaluations for guidance too."""
        return {
            "solver": self.solver_name,
            "nfe": sum(guided_nfe(diffusion, self.solver, self.effective_guidance)),
            "guidance_scale": self.guidance.scale,
            "sampler": self.canonical(),
            "sample_seed": self.seed,
            "sample_batch": self.batch,
        }

    def canonical(self) -> str:
        """Return all settings of the sampler as JSON: the record's `sampler`. The batch changes rounding alone.

        `guidance_state` is among them only where it has an effect.
        """
        guided = self.guidance.scale != 1 and self.guidance.model is None and self.guidance.state is not None
        settings = {
            "solver": {"name": self.solver_name, **asdict(self.solver)},
            "guidance_scale": self.guidance.scale,
            "guidance_interval": self.guidance.interval,
            "autoguidance": self.guidance.model is not None,
            "labels": self.labels,
            "precision": self.precision,
            **({"guidance_state": self.guidance.state} if guided else {}),
        }
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def sampling_of_settings(
    settings: EvalSettings, solver: SolverSettings, n: int, precision: str = "fp32", *, carries_state: bool = False
) -> Sampling:
    """Return the sampler of `eval` settings: solver's name, seed, batch (at most n) and guidance.

    carries_state: whether the network takes over latents, so that `eval.guidance_state` has an effect
    """
    state = settings.guidance_state if carries_state else None
    guidance = Guidance(settings.guidance_scale, settings.guidance_interval, state=state)
    batch = max(min(given_batch(settings), n), 1)
