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
from diffscale.diffusion.denoiser import denoise_with_share
from diffscale.diffusion.solver_settings import SolverSettings
from diffscale.kernels.runtime import exact_float32

if TYPE_CHECKING:
    from diffscale.config.experiment import EvalSettings
    from diffscale.data import Dataset
    from diffscale.data.autoencoder import Decoder

NO_GUIDANCE = Guidance()
POLICIES = ("train", "uniform", "balanced", "none")
USUAL_BATCH, LARGEST_BATCH = 64, 1024  # of `eval.batch: auto`: without a GPU, and on any
DECODED_TOGETHER = 8  # latents: an autoencoder holds a hundred times the memory of its image
SHARE_OF_MEMORY = 0.25  # of a GPU's, for the tensors of one pass: next to them are networks, moments and averages


@dataclass(frozen=True)
class Sampling:
    """Everything that determines sample i besides the model: part of every record.

    labels: "train" draws classes as often as the training set has them, "uniform" draws all alike that it has,
        "balanced" takes these in turn, "none" drops them, a number is that class.
    batch: images in one pass; samples are identical to the bit only for the same batch.
    """

    solver: SolverSettings
    solver_name: str
    seed: int = 0
    batch: int = 64
    guidance: Guidance = NO_GUIDANCE
    labels: str = "train"
    precision: str = "fp32"
    guide: str = ""  # hash of the network that guides, which is `guidance.model` once it is loaded
    guide_macs: float | None = None  # multiply-adds of one of its passes; None: as many as the model's

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

    def flops(self, diffusion: Diffusion, forward_macs: float) -> float:
        """Return the FLOPs of the networks for one sample. forward_macs: of one pass of the model."""
        own, guide = guided_nfe(diffusion, self.solver, self.effective_guidance)
        return 2 * (own * forward_macs + guide * (forward_macs if self.guide_macs is None else self.guide_macs))

    def canonical(self) -> str:
        """Return all settings of the sampler as JSON: the record's `sampler`. The batch changes rounding alone.

        `guidance_state` is among them only where it has an effect.
        """
        alone = self.guidance.model is None and not self.guide
        guided = self.guidance.scale != 1 and alone and self.guidance.state is not None
        settings = {
            "solver": {"name": self.solver_name, **asdict(self.solver)},
            "guidance_scale": self.guidance.scale,
            "guidance_interval": self.guidance.interval,
            "autoguidance": self.guidance.model is not None or bool(self.guide),
            "labels": self.labels,
            "precision": self.precision,
            **({"guidance_state": self.guidance.state} if guided else {}),
        }
        if self.guidance.channels is not None:  # younger than records
            settings["guidance_channels"] = self.guidance.channels
        if self.guide:
            settings["guide"] = self.guide
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of sampling; None computes in float32."""


def sampling_precision(trained: str) -> str:
    """Return the precision in which samples of a run are drawn: bf16 where it trained in bf16, else fp32."""
    return "bf16" if trained == "bf16" else "fp32"


def sampling_of_settings(
    settings: EvalSettings, solver: SolverSettings, n: int, precision: str = "fp32", *, carries_state: bool = False
) -> Sampling:
    """Return the sampler of `eval` settings: solver's name, seed, batch (at most n) and guidance.

    carries_state: whether the network takes over latents, so that `eval.guidance_state` has an effect
    """
    state = settings.guidance_state if carries_state else None
    channels = settings.guidance_channels
    guidance = Guidance(settings.guidance_scale, settings.guidance_interval, state=state, channels=channels)
    batch = max(min(given_batch(settings), n), 1)
    guide = (settings.guide and settings.guide_weights) or ""
    return Sampling(solver, settings.solver.name, settings.seed, batch, guidance, precision=precision, guide=guide)


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
    classes, known = len(class_counts), np.flatnonzero(class_counts)  # a class without images was never trained
    if policy == "balanced":
        return torch.from_numpy(known)[positions % len(known)]
    if policy == "none":
        return torch.full_like(positions, classes)
    if policy in ("train", "uniform"):
        counts = np.asarray(class_counts, np.float64) if policy == "train" else np.sign(class_counts).astype(np.float64)
        if not counts.sum() > 0:
            raise ValueError("no class has an image: the training set gives no proportions to draw from")
        edges = torch.from_numpy(np.cumsum(counts) / counts.sum())
        u = keyed_random.uniform(seed, Stream.SAMPLE_LABEL, positions).double()
        return torch.searchsorted(edges, u, right=True).clamp_max(classes - 1)
    if policy.isdecimal() and int(policy) in known:
        return torch.full_like(positions, int(policy))
    expected = f"train, uniform, balanced, none, or a class below {classes} that has training images"
    raise UserError(setting="labels", value=policy, expected=expected)


def check_sampling(sampling: Sampling, class_counts: Sequence[int]) -> None:
    """Raise UserError for a precision, labels or guidance that sampling would ignore or fail on.

    class_counts: training images of each class; empty for a model without classes.
    """
    if sampling.precision not in PRECISIONS:
        raise UserError(setting="precision", value=sampling.precision, expected=" or ".join(PRECISIONS))
    if class_counts:
        draw_labels(sampling.labels, sampling.seed, torch.zeros(1, dtype=torch.long), class_counts)
        return
    if sampling.labels not in POLICIES:
        raise UserError(
            setting="labels",
            value=sampling.labels,
            expected="train",
            reason="the model was trained without classes",
        )
    if sampling.guidance.scale != 1 and sampling.guidance.model is None and not sampling.guide:
        raise UserError(
            setting="eval.guidance_scale",
            value=sampling.guidance.scale,
            expected="1, no guidance",
            reason="classifier-free guidance needs a model with classes",
        )


@dataclass
class ModelSource:
    """Samples of a model: sample i is a function of (seed, i), whoever computes it."""

    model: nn.Module
    diffusion: Diffusion
    sampling: Sampling
    shape: tuple[int, int, int]  # (C,H,W) of what the model makes: an image or a latent
    n: int = 0
    class_counts: tuple[int, ...] = ()  # training images of each class; empty for an unconditional model
    device: str = "cpu"
    decoder: Decoder | None = None  # of a model of latents
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
        decoder: Decoder | None = None,
    ) -> ModelSource:
        """Return n samples of a model that was trained on a dataset, or on its latents if there is a decoder.

        Raises UserError for labels or guidance that the model cannot take, so that no record names what had no effect.
        """
        shape = (dataset.channels, dataset.resolution, dataset.resolution) if decoder is None else decoder.shape
        counts = dataset.class_counts if getattr(model, "num_classes", 0) else ()
        check_sampling(sampling, counts)
        return cls(model, diffusion, sampling, shape, n, counts, str(device), decoder)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C,H,W) of an image."""
        return self.shape if self.decoder is None else self.decoder.image_shape

    def decoded(self, x: Tensor) -> Tensor:
        """Return images (B,C,H,W), about [−1,1], of what the model makes."""
        if self.decoder is None:
            return x
        return torch.cat([self.decoder.decode(part) for part in x.split(DECODED_TOGETHER)])

    @property
    def batch(self) -> int:
        return self.sampling.batch

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the weights (FSDP2): all ranks then draw at the same time, or wait."""
        return hasattr(self.model, "set_requires_gradient_sync")

    def batches(self, first: int, last: int) -> int:
        """Return how many batches samples first … last−1 are drawn in."""
        return -(-(last - first) // self.batch)

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return samples first … last−1: uint8 (B,C,H,W) on the device, and labels (B,) on the CPU."""
        return self.samples(first, last)[:2]

    def samples(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return samples first … last−1: uint8 (B,C,H,W) on the device, labels (B,), and which are finite (B,) bool.

        Labels and the latter are on the CPU. A sample of a network that diverged holds nan, which has no shade: those
        pixels are black.
        """
        parts = []
        for start in range(first, last, self.batch):
            images, labels = self.draw(torch.arange(start, start + self.batch))
            keep = min(self.batch, last - start)
            images = self.decoded(images[:keep])
            finite = images.isfinite().flatten(1).all(1)
            parts.append((to_uint8(images), labels[:keep].cpu(), finite))
        images, labels, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        return images, labels, finite.cpu()

    def at(self, rows: np.ndarray) -> Tensor:
        """Return the samples with these indices: uint8 (B,C,H,W) on the CPU."""
        return to_uint8(self.decoded(self.draw(torch.from_numpy(rows))[0])).cpu()

    @torch.inference_mode()
    def draw(self, positions: Tensor, callback: Callable | None = None) -> tuple[Tensor, Tensor]:
        """Return what the model makes at these positions: float (B,C,H,W), images in [−1,1], and labels (B,)."""
        s, device = self.sampling, torch.device(self.device)
        at = positions.to(device)
        noise = keyed_random.normal(s.seed, Stream.SAMPLE_NOISE, at, self.shape)
        counts = self.class_counts
        labels = draw_labels(s.labels, s.seed, positions, counts) if counts else torch.zeros_like(positions)

        training = self.model.training
        if not self.sharded:
            self.model.to(device)
        if s.guidance.model is not None:
            s.guidance.model.to(device)
        if training:
            self.model.eval()
        low = PRECISIONS[s.precision]
        # A graph must cast the weights that it finds when it is replayed, not keep those of its recording.
        # FSDP2 gathers weights into buffers that other passes use outside of inference mode.
        autocast = torch.autocast(device.type, low, enabled=low is not None, cache_enabled=False)
        with torch.inference_mode(not self.sharded), exact_float32(), autocast:
            images = sample(
                self.diffusion,
                self.model,
                noise,
                solver=s.solver,
                label=labels.to(device) if counts else None,
                guidance=s.effective_guidance,
                noise_fn=keyed_noise(s.seed, at, self.shape),
                callback=callback,
                estimate=denoise_with_share if self.sharded else self.denoiser,
            )
        if training:
            self.model.train()
        return images.float(), labels


def to_uint8(images: Tensor) -> Tensor:
    """Map [−1,1] to 0 … 255, rounded to nearest; values outside are clipped, and nan is 0."""
    return images.add(1).mul(127.5).round_().clamp_(0, 255).nan_to_num_(0).to(torch.uint8)
