"""`python -m benchmarks.studies.fid_caveats`: how far resize, JPEG quality and sample count move FID on CIFAR-10.

Test images stand for a perfect generator, training images are the reference; one thing is changed at a time. Features
are kept in diffscale's cache, so an interrupted run continues. Writes results/fid_caveats.csv and .png.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import typer
from PIL import Image

from benchmarks.common.machine import made_by
from benchmarks.suites import cifar10
from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.evaluation.metrics.distances import Root, frechet_of_features
from diffscale.evaluation.metrics.intervals import frechet_at_infinity, frechet_interval
from diffscale.evaluation.metrics.statistics import moments_of
from diffscale.evaluation.networks.extractor import create_extractor
from diffscale.report.figures.style import style

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
Change = Callable[[np.ndarray], np.ndarray]
QUALITIES = (95, 90, 75, 50)
COUNTS = (0.0625, 0.125, 0.25, 0.5, 1.0)


def jpeg(quality: int) -> Change:
    def change(image: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=quality)
        return np.asarray(Image.open(buffer).convert("RGB"))

    return change


def halved(resample: Image.Resampling) -> Change:
    """Shrink to 16 pixels, as a dataset build or a careless loader would."""
    return lambda image: np.asarray(Image.fromarray(image).resize((16, 16), resample, reducing_gap=None))


CHANGES: dict[str, Change] = {
    "unchanged": lambda image: image,
    **{f"jpeg {q}": jpeg(q) for q in QUALITIES},
    "16 px lanczos": halved(Image.Resampling.LANCZOS),
    "16 px box": halved(Image.Resampling.BOX),
    "16 px nearest": halved(Image.Resampling.NEAREST),
}


class Features:
    """Features of one network, computed once for each (set, change, resize)."""

    def __init__(self, network: str, n: int) -> None:
        self.network, self.n = network, n
        self._extractors: dict[str, Any] = {}

    def get(self, train: bool, change: str = "unchanged", resize: str = "default") -> np.ndarray:
        name = f"{self.network}-{self.n}-{'train' if train else 'test'}-{change}-{resize}.npy".replace(" ", "_")
        file = cache_dir() / "fid_caveats" / name
        if not file.exists():
            if resize not in self._extractors:
                self._extractors[resize] = create_extractor(self.network, resize=resize)
            images, _ = cifar10.load(train)
            chosen = images[np.random.RandomState(2020).choice(len(images), self.n, replace=False)]
            changed = np.stack([CHANGES[change](image) for image in chosen])
            features = self._extractors[resize](torch.from_numpy(changed).permute(0, 3, 1, 2))["features"].numpy()
            buffer = io.BytesIO()
            np.save(buffer, features)
            storage.write_bytes(str(file), buffer.getvalue())
        return np.load(file, allow_pickle=False)


def caveat_rows(network: str, n: int) -> list[dict[str, Any]]:
    f = Features(network, n)
    root = Root.of(moments_of(f.get(True)))
    base, low, high = frechet_interval(f.get(False), root)
    rows: list[dict[str, Any]] = []

    def add(caveat: str, case: str, value: float, count: int = n, against: float = base) -> None:
        rows.append(
            {
                "network": network,
                "caveat": caveat,
                "case": case,
                "n": count,
                "n_reference": n,
                "fd": value,
                "moved": value - against,
            }
        )

    add("none", "test against train", base)
    rows[-1] |= {"fd_low": low, "fd_high": high}
    for quality in QUALITIES:
        add("lossy", f"JPEG {quality} on one side", frechet_of_features(f.get(False, f"jpeg {quality}"), root))
    clean = Root.of(moments_of(f.get(True, resize="clean")))
    add("resize to the network", "clean-fid on both sides", frechet_of_features(f.get(False, resize="clean"), clean))
    add("resize to the network", "clean-fid on one side", frechet_of_features(f.get(False, resize="clean"), root))
    small = Root.of(moments_of(f.get(True, "16 px lanczos")))
    same = frechet_of_features(f.get(False, "16 px lanczos"), small)
    add("resize of the data", "16 px, LANCZOS on both sides", same, against=same)
    for change in ("16 px box", "16 px nearest"):
        name = f"16 px, {change.split()[-1]} against LANCZOS"
        add("resize of the data", name, frechet_of_features(f.get(False, change), small), against=same)
    for share in COUNTS:
        count = int(n * share)
        add("sample count", f"{count} samples", frechet_of_features(f.get(False)[:count], root), count)
    add("sample count", "extrapolated to infinity", frechet_at_infinity(f.get(False), root)[0])
    return rows


@style()
def plot(table: pd.DataFrame, file: Path) -> None:
    networks = list(table["network"].unique())
    figure, axes = plt.subplots(1, len(networks), figsize=(7.5 * len(networks), 5), squeeze=False, layout="constrained")
    for ax, network in zip(axes[0], networks, strict=True):
        part = table[(table["network"] == network) & (table["caveat"] != "none")].iloc[::-1]
        colours = {c: f"C{i}" for i, c in enumerate(table["caveat"].unique())}
        share = 100 * part["moved"] / table[table["network"] == network]["fd"].iloc[0]
        ax.barh(part["case"], share, color=[colours[c] for c in part["caveat"]])
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlabel("moved by, % of the distance of test to train (symlog)")
        ax.set_title(f"{network}, CIFAR-10, n = {part['n'].max()}")
    figure.savefig(file, dpi=110)


def main(
    inception: Annotated[int, typer.Option(help="images of each set for FID; 0 leaves it out")] = 512,
    light: Annotated[int, typer.Option(help="images of each set for the embedded network; 0 leaves it out")] = 4096,
) -> None:
    rows: list[dict[str, Any]] = []
    for network, n in (("inception", inception), ("efficientnet_lite0", light)):
        rows += caveat_rows(network, n) if n else []
    table = pd.DataFrame([row | made_by() for row in rows])
    RESULTS.mkdir(exist_ok=True)
    table.to_csv(RESULTS / "fid_caveats.csv", index=False, float_format="%.6g")
    plot(table, RESULTS / "fid_caveats.png")
    print(table.to_string())


if __name__ == "__main__":
    typer.run(main)
