"""A picture of some images of a dataset."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from diffscale.data.format.dataset import open_dataset
from diffscale.data.format.manifest import SplitName
from diffscale.data.format.open import resolve
from diffscale.data.loading.order import permutation


def write_grid(folder: str, split: SplitName, images: int, target: str) -> str:
    """Writes `images` rows, drawn without replacement and always the same ones, as a PNG; returns its path.

    Latents are shown by their first three channels, stretched to their own range.
    """
    dataset = open_dataset(resolve(folder, None, folder), split)
    count = min(images, dataset.n)
    rows = permutation(dataset.n, 0).forward(np.arange(count))
    pixels = dataset.gather(np.sort(rows))[0].numpy()
    if dataset.is_latent:
        values = pixels[:, :3].astype(np.float32).transpose(0, 2, 3, 1)
        low, high = values.min(), values.max()
        pixels = ((values - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    if pixels.shape[3] != 3:
        pixels = np.repeat(pixels[..., :1], 3, axis=3)
    across = math.ceil(math.sqrt(count))
    side = dataset.resolution + 2
    page = np.full((math.ceil(count / across) * side, across * side, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // across * side, i % across * side
        page[top : top + side - 2, left : left + side - 2] = image
    Image.fromarray(page).save(target)
    return target
