"""Where images come from, one interface for all: a model's samples, a dataset, a folder. Reference and samples are
then treated alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffscale.core import keyed_random
from diffscale.core.errors import UserError
from diffscale.core.keyed_random import Stream
from diffscale.diffusion import Diffusion, Guidance, guided_nfe, keyed_noise, sample
from diffscale.diffusion.solver_settings import SolverSettings
from diffscale.evaluation.metrics.statistics import UNREADABLE
from diffscale.kernels.float32 import exact_float32

if TYPE_CHECKING:
    from diffscale.data import Dataset

NO_GUIDANCE = Guidance()
IMAGE_SUFFIXES = (".png", ".webp", ".bmp", ".jpg", ".jpeg")
LOSSY_SUFFIXES = (".jpg", ".jpeg")
MOST_PIXELS = 64_000_000


class Source(Protocol):
    """n images, found by index. `images(first, last)` → uint8 (B,C,H,W) on the CPU and int64 labels (B,)."""

    @property
    def n(self) -> int: ...

    @property
    def batch(self) -> int:
        """Ranges begin at multiples of it."""

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Sampling:
    """What makes sample i what it is, besides the model: part of every record.

    labels: "train" draws classes as often as the training set has them, "uniform" alike, "balanced" is i mod
    classes, "none" drops them, a number is that class. batch: images in one pass; samples are identical to the bit
    only for the same batch.
    """

    solver: SolverSettings
    solver_name: str
    seed: int = 0
    batch: int = 64
    guidance: Guidance = NO_GUIDANCE
    labels: str = "train"
    precision: str = "fp32"

    def fields(self, diffusion: Diffusion) -> dict[str, Any]:
        """The columns of a record that the sampler determines. nfe counts the evaluations for guidance too."""
        return {
            "solver": self.solver_name, "nfe": sum(guided_nfe(diffusion, self.solver, self.guidance)),
            "guidance_scale": self.guidance.scale, "sampler": self.canonical(), "sample_seed": self.seed,
        }  # fmt: skip

    def canonical(self) -> str:
        """All settings of the sampler as JSON: the record's `sampler`. The batch changes rounding alone."""
        settings = {
            "solver": {"name": self.solver_name, **asdict(self.solver)}, "guidance_scale": self.guidance.scale,
            "guidance_interval": self.guidance.interval, "autoguidance": self.guidance.model is not None,
            "labels": self.labels, "precision": self.precision,
        }  # fmt: skip
        return json.dumps(settings, sort_keys=True, separators=(",", ":"))


def draw_labels(policy: str, seed: int, positions: Tensor, class_counts: Sequence[int]) -> Tensor:
    """Labels (B,) int64 of the samples at these positions under a policy of `Sampling`; UserError for another."""
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
    """Samples of a model: sample i is a function of (seed, i), whoever computes it.

    shape: (C,H,W) of an image. class_counts: images of each class in training data; empty for an unconditional model.
    """

    model: nn.Module
    diffusion: Diffusion
    sampling: Sampling
    shape: tuple[int, int, int]
    n: int = 0
    class_counts: tuple[int, ...] = ()
    device: str = "cpu"

    @property
    def batch(self) -> int:
        return self.sampling.batch

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(first, last, self.batch):
            images, labels = self.draw(torch.arange(start, start + self.batch))
            keep = min(self.batch, last - start)
            parts.append((to_uint8(images[:keep]).cpu(), labels[:keep].cpu()))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @torch.inference_mode()
    def draw(self, positions: Tensor, callback: Callable | None = None) -> tuple[Tensor, Tensor]:
        """The samples at these positions: float (B,C,H,W) in [−1,1] on the device, labels (B,)."""
        s, device = self.sampling, torch.device(self.device)
        at = positions.to(device)
        noise = keyed_random.normal(s.seed, Stream.SAMPLE_NOISE, at, self.shape)
        counts = self.class_counts
        labels = draw_labels(s.labels, s.seed, positions, counts) if counts else torch.zeros_like(positions)

        training = self.model.training
        self.model.to(device).eval()
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
        with exact_float32(), torch.autocast(device.type, low, enabled=low is not None):
            images = sample(
                self.diffusion,
                self.model,
                noise,
                solver=s.solver,
                label=labels.to(device) if counts else None,
                guidance=s.guidance,
                noise_fn=keyed_noise(s.seed, at, self.shape),
                callback=callback,
            )
        self.model.train(training)
        return images.float(), labels


def to_uint8(images: Tensor) -> Tensor:
    """[−1,1] → 0..255, rounded to nearest; values outside are clipped."""
    return images.add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8)


@dataclass
class DatasetSource:
    """Images of an Arrow dataset at these rows (int64)."""

    dataset: Dataset
    rows: np.ndarray
    batch: int = 256

    @property
    def n(self) -> int:
        return len(self.rows)

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        images, labels = self.dataset.gather(self.rows[first:last])
        return images.permute(0, 3, 1, 2), labels


@dataclass
class FileSource:
    """Images of a folder, or of an .npz with `arr_0` (N,H,W,3) uint8 as ADM writes. One size for all."""

    files: list[Path]
    array: np.ndarray | None = None
    batch: int = 256
    lossy: bool = False

    @classmethod
    def open(cls, place: Path) -> FileSource:
        """Raises UserError when there are no images."""
        if place.suffix == ".npz":
            try:
                with np.load(place, allow_pickle=False) as file:
                    array = np.asarray(file["arr_0"])
                if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or not len(array):
                    raise ValueError(f"arr_0 is {array.dtype} {array.shape}")
            except UNREADABLE as error:
                expected = f"an .npz with arr_0 (N,H,W,3) uint8 ({type(error).__name__}: {error})"
                raise UserError(setting="FOLDER", value=str(place), expected=expected) from None
            return cls([], array)
        files = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            expected = f"a folder with images ({', '.join(IMAGE_SUFFIXES)})"
            raise UserError(setting="FOLDER", value=str(place), expected=expected)
        return cls(files, lossy=any(f.suffix.lower() in LOSSY_SUFFIXES for f in files))

    @property
    def n(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    @cached_property
    def content_hash(self) -> str:
        """Of the files' bytes, or of the array's."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        if self.array is not None:
            digest.update(np.ascontiguousarray(self.array).tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def resolution(self) -> int:
        """Side in pixels of the first image (the longer one)."""
        return max(self.images(0, 1)[0].shape[-2:])

    def source(self, rows: np.ndarray) -> FileSource:
        """The images at these rows, in that order."""
        array = None if self.array is None else self.array[rows]
        return FileSource([self.files[i] for i in rows] if self.files else [], array, self.batch, self.lossy)

    def images(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        if self.array is not None:
            pixels = self.array[first:last]
        else:
            opened = [_read_image(f) for f in self.files[first:last]]
            sizes = {p.shape for p in opened}
            if len(sizes) > 1:
                expected = f"images of one size, found {sorted(s[:2] for s in sizes)[:3]}"
                raise UserError(setting="FOLDER", value=str(self.files[0].parent), expected=expected)
            pixels = np.stack(opened)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.zeros(len(pixels), dtype=torch.long)


def source_of(images: Dataset | FileSource, rows: np.ndarray) -> DatasetSource | FileSource:
    """The images at these rows of a dataset, folder or array, in that order."""
    return images.source(rows) if isinstance(images, FileSource) else DatasetSource(images, rows)


def _read_image(file: Path) -> np.ndarray:
    """RGB (H,W,3) uint8. Raises UserError that names a file which is damaged or implausibly large."""
    try:
        with Image.open(file) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except (*UNREADABLE, SyntaxError, Image.DecompressionBombError) as error:
        expected = f"a readable image of at most {MOST_PIXELS:,} pixels ({type(error).__name__})"
        raise UserError(setting="FOLDER", value=str(file), expected=expected) from None


def class_counts(dataset: Dataset) -> tuple[int, ...]:
    """Images of each class."""
    counts = np.zeros(dataset.num_classes, np.int64)
    for i in range(len(dataset.split.shards)):
        counts += np.bincount(dataset.shard(i).labels, minlength=dataset.num_classes)
    return tuple(counts.tolist())
