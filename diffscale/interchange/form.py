"""What an export is made from and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.data.autoencoder import Decoder

Files = dict[str, str | dict[str, Tensor]]
"""Text or tensors by the path of a file in the folder."""


@dataclass(frozen=True)
class Trained:
    """One checkpoint of a run with one average of its weights."""

    experiment: Experiment
    model: nn.Module
    shape: dict[str, int]  # resolution, channels, num_classes
    images_seen: int
    ema: str
    run_folder: str
    decoder: Decoder | None = None  # of a network of latents

    @property
    def network(self) -> dict[str, Any]:
        """The keyword arguments that make the network."""
        return {**self.shape, **self.experiment.model.arguments()}


@dataclass(frozen=True)
class Form:
    """An exported folder without its model card."""

    files: Files
    usage: tuple[str, ...]  # Python that loads it and draws images, for the card
    about: str  # what the folder is, a sentence


def exported_code(name: str) -> str:
    """Return the text of a file of `exported/`."""
    return (resources.files("diffscale.interchange") / "exported" / name).read_text(encoding="utf-8")
