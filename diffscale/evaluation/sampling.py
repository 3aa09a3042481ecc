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

    def fields(self, diffusion: Diffusion) -> dict[str, Any]:
        """Return the columns of a record that the sampler determines. nfe counts evaluations for guidance too."""
        return {
            "solver": self.solver_name,
            "nfe": sum(guided_nfe(diffusion, self.solver, self.guidance)),
            "guidance_scale": self.guidance.scale,
            "sampler": self.canonical(),
            "sample_seed": self.seed,
            "sample_batch": self.batch,
        }

    def canonical(self) -> str:
        """Return all settings of the sampler as JSON: the record's `sampler`. The batch changes rounding alone."""
        settings = {
            "solver": {"name": self.solver_name, **asdict(self.solver)},
            "guidance_scale": self.guidance.scale,
            "guidance_interval": self.guidance.interval,
            "autoguidance": self.guidance.model is not None,
            "labels": self.labels,
            "precision": self.precision,
        }
        if self.guidance.channels is not None:  # younger than records
            settings["guidance_channels"] = self.guidance.channels
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def sampling_of_settings(settings: EvalSettings, solver: SolverSettings, n: int, precision: str = "fp32") -> Sampling:
    """Return the sampler of `eval` settings: solver's name, seed, batch (at most n) and guidance."""
    guidance = Guidance(settings.guidance_scale, settings.guidance_interval, channels=settings.guidance_channels)
    batch = max(min(given_batch(settings), n), 1)
    return Sampling(solver, settings.solver.name, settings.seed, batch, guidance, precision=precision)


def given_batch(settings: EvalSettings) -> int:
    """Return `eval.batch`, or what "auto" is where the device and the network are unknown."""
    return USUAL_BATCH if settings.batch == "auto" else settings.batch


def batch_that_fits(memory: int, per_image: int) -> int:
    """Return the images of one pass that `eval.batch: auto` takes: a power of two, at most LARGEST_BATCH.

    memory: bytes of the GPU
    per_image: bytes that a pass holds at most at a time, for each image (models/cost.py)
    """
    fitting = max(int(SHARE_OF_MEMORY * memory / per_image), 1)
    return min(1 << fitting.bit_length() - 1, LARGEST_BATCH)


def draw_labels(policy: str, seed: int, positions: Tensor, class_counts: Sequence[int]) -> Tensor:
    """Return labels (B,) int64 of the samples at these positions under a policy of `Sampling`; UserError if unknown."""
    classes = len(class_counts)
    if policy == "balanced":
        return positions % classes
    if policy == "none":
        return torch.full_like(positions, classes)
    if policy in ("train", "uniform"):
        counts = np.asarray(class_counts if policy == "train" else [1] * classes, np.float64)
        edges = torch.from_numpy(np.cumsum(counts) / counts.sum())
        u = keyed_random.uniform(seed, Stream.SAMPLE_LABEL, positions).double()
        return torch.searchsorted(edges, u, right=True).clamp_max(classes - 1)
    if policy.isdigit() and int(policy) < classes:
        return torch.full_like(positions, int(policy))
    expected = f"train, uniform, balanced, none, or a class below {classes}"
    raise UserError(setting="labels", value=policy, expected=expected)


@dataclass
class ModelSource:
    """Samples of a model: sample i is a function of (seed, i), whoever computes it."""

    model: nn.Module
    diffusion: Diffusion
    sampling: Sampling
    shape: tuple[int, int, int]  # (C,H,W) of an image
    n: int = 0
    class_counts: tuple[int, ...] = ()  # training images of each class; empty for an unconditional model
    device: str = "cpu"
    denoiser: CapturedDenoiser = field(default_factory=CapturedDenoiser, repr=False)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        diffusion: Diffusion,
        sampling: Sampling,
        dataset: Dataset,
        n: int,
        device: torch.device | str = "cpu",
    ) -> ModelSource:
        """Return n samples of a model that was trained on a dataset."""
        shape = (dataset.channels, dataset.resolution, dataset.resolution)
        counts = class_counts(dataset) if getattr(model, "num_classes", 0) else ()
        return cls(model, diffusion, sampling, shape, n, counts, str(device))

    @property
    def batch(self) -> int:
        return self.sampling.batch

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return samples first … last−1: uint8 (B,C,H,W) on the device, and labels (B,) on the CPU."""
        parts = []
        for start in range(first, last, self.batch):
            images, labels = self.draw(torch.arange(start, start + self.batch))
            keep = min(self.batch, last - start)
            parts.append((to_uint8(images[:keep]), labels[:keep].cpu()))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def at(self, rows: np.ndarray) -> Tensor:
        """Return the samples with these indices: uint8 (B,C,H,W) on the CPU."""
        return to_uint8(self.draw(torch.from_numpy(rows))[0]).cpu()

    @torch.inference_mode()
    def draw(self, positions: Tensor, callback: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Return the samples at these positions: float (B,C,H,W) in [−1,1] on the device, and labels (B,)."""
        s, device = self.sampling, torch.device(self.device)
        at = positions.to(device)
        noise = keyed_random.normal(s.seed, Stream.SAMPLE_NOISE, at, self.shape)
        counts = self.class_counts
        labels = draw_labels(s.labels, s.seed, positions, counts) if counts else torch.zeros_like(positions)

        training = self.model.training
        self.model.to(device)
        if training:
            self.model.eval()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
        # A graph must cast the weights that it finds when it is replayed, not keep those of its recording.
        with exact_float32(), torch.autocast(device.type, low, enabled=low is not None, cache_enabled=False):
            images = sample(
                self.diffusion,
                self.model,
                noise,
                solver=s.solver,
                label=labels.to(device) if counts else None,
                guidance=s.guidance,
                noise_fn=keyed_noise(s.seed, at, self.shape),
                callback=callback,
                estimate=self.denoiser,
            )
        if training:
            self.model.train()
        return images.float(), labels


def to_uint8(images: Tensor) -> Tensor:
    """Map [−1,1] to 0 … 255, rounded to nearest; values outside are clipped."""
    return images.add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


def class_counts(dataset: Dataset) -> tuple[int, ...]:
    """Return the number of images of each class."""
    counts = np.zeros(dataset.num_classes, np.int64)
    for i in range(len(dataset.split.shards)):
        counts += np.bincount(dataset.shard(i).labels, minlength=dataset.num_classes)
    return tuple(counts.tolist())
