"""A picture of some images of a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffscale.core.image_grids import grid, to_png
from diffscale.data.format.manifest import SplitName
from diffscale.data.format.open import open_dataset, resolve
from diffscale.data.loading.order import permutation


def write_grid(folder: str, split: SplitName, images: int, target: str) -> str:
    """Write `images` rows, drawn without replacement and always the same ones, as a PNG; return its path.

    Latents are shown by their first three channels, stretched to their own range.
    """
    dataset = open_dataset(resolve(folder, None, folder), split)
    rows = permutation(dataset.n, 0).forward(np.arange(min(images, dataset.n)))
    pixels = dataset.gather(np.sort(rows))[0].numpy()
    if dataset.is_latent:
        values = pixels[:, :3].astype(np.float32).transpose(0, 2, 3, 1)
        low, high = values.min(), values.max()
        pixels = ((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    if pixels.shape[3] != 3:
        pixels = pixels[..., :1]
    Path(target).write_bytes(to_png(grid(pixels)))
    return target
