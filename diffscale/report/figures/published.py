"""Published results, drawn as faint marks for comparison; each entry names its paper."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One system of a paper."""

    system: str
    dataset: str
    resolution: int  # side in pixels
    fid: float  # of 50,000 samples
    nfe: int | None = None  # network evaluations per sample; None if the paper does not report it
    train_flops: float | None = None  # twice the multiply-adds of 3 forward passes per image; None if not reported
    source: str = ""  # first author and year


_ZETTA_MACS = 2e21  # FLOPs

PUBLISHED = [
    Published("EDM", "cifar10", 32, 1.97, nfe=35, source="Karras 2022"),
    Published("EDM (conditional)", "cifar10", 32, 1.79, nfe=35, source="Karras 2022"),
    Published("DDPM", "cifar10", 32, 3.17, nfe=1000, source="Ho 2020"),
    Published("ADM", "imagenet", 64, 2.07, source="Dhariwal 2021"),
    Published("EDM", "imagenet", 64, 1.36, nfe=511, source="Karras 2022"),
    Published("EDM (79 NFE)", "imagenet", 64, 2.22, nfe=79, source="Karras 2022"),
    Published("RIN", "imagenet", 64, 1.23, nfe=1000, source="Jabri 2023"),
    Published("EDM2-S", "imagenet", 64, 1.58, nfe=63, source="Karras 2024"),
    Published("EDM2-XL", "imagenet", 64, 1.33, nfe=63, source="Karras 2024"),
    Published("SiD UViT-L", "imagenet", 128, 3.23, source="Hoogeboom 2023"),
    Published("SiD UNet", "imagenet", 128, 2.88, source="Hoogeboom 2023"),
    Published("RIN", "imagenet", 128, 2.75, source="Jabri 2023"),
    Published("SiD UViT", "imagenet", 256, 2.77, source="Hoogeboom 2023"),
    Published("SiD UViT (guided)", "imagenet", 256, 2.44, source="Hoogeboom 2023"),
    Published("RIN", "imagenet", 256, 3.42, train_flops=0.62 * _ZETTA_MACS, source="Jabri 2023"),
    Published("SiD2", "imagenet", 256, 1.38, source="Hoogeboom 2024"),
    Published("JiT-H/16", "imagenet", 256, 1.86, source="Li 2025"),
    Published("SiD2", "imagenet", 512, 1.48, source="Hoogeboom 2024"),
    Published("JiT-H/32", "imagenet", 512, 1.94, source="Li 2025"),
    Published("EDM2-XXL", "imagenet", 512, 1.81, source="Karras 2024"),
]


def matching(metric: str, dataset: str, resolution: int) -> list[Published]:
    """Return the systems published on a dataset at a resolution; none unless the metric is FID."""
    if metric != "fid":
        return []
    name = _plain(dataset)
    return [p for p in PUBLISHED if p.resolution == resolution and name in _names(p)]


def _names(system: Published) -> set[str]:
    side = str(system.resolution)
    return {_plain(name) for name in (system.dataset, system.dataset + side, f"{system.dataset}{side}x{side}")}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removesuffix("train").replace("imagenet1k", "imagenet")
