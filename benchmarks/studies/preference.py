"""`python -m benchmarks.studies.preference OUT`: committed sample grids of CIFAR-10 as folders for `diffscale compare`.

The checkpoints behind benchmarks/results/cifar10-gpu are not in the repository, their grids of 64 samples are. Each is
cut into its 64 images: the four backbones at 5e14 FLOPs, both peers at their best width and 1e14 FLOPs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from diffscale.core.image_grids import GAP

GRIDS = Path(__file__).parents[1] / "results" / "cifar10-gpu" / "samples"
RUNS = {
    "dit": "cifar10-dit",
    "uvit": "cifar10-uvit",
    "unet": "cifar10-unet",
    "rin": "cifar10-rin",
    "diffusers": "cifar10-diffusers-128",
    "ddp": "cifar10-denoising-diffusion-pytorch-64",
}
SIDE, COLUMNS = 32, 8


def main(out: Annotated[Path, typer.Argument(help="folder for the folders of images")]) -> None:
    """Cut the grids into images."""
    for name, run in RUNS.items():
        newest = max(GRIDS.glob(f"{run}-*/*.png"))
        sheet = Image.open(newest).convert("RGB")
        (out / name).mkdir(parents=True, exist_ok=True)
        for i in range(COLUMNS**2):
            x, y = (GAP + place * (SIDE + GAP) for place in (i % COLUMNS, i // COLUMNS))
            sheet.crop((x, y, x + SIDE, y + SIDE)).save(out / name / f"{i:03d}.png")


if __name__ == "__main__":
    typer.run(main)
