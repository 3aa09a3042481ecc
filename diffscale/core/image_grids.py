"""Sheets of images: labelled grids, denoising strips, comparisons of runs at the same seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels
CAPTION = 12  # pixels
LEAST_CELL = 64  # pixels; a class name of twelve letters fits below


def grid(images: NDArray, captions: Sequence[str] = (), columns: int | None = None) -> Image.Image:
    """Lay out images row by row, each above its caption.

    Small images are enlarged by whole factors without smoothing, so that pixels stay pixels.

    images: (N,H,W,C) uint8, C 1 or 3.
    columns: None for a nearly square sheet.
    """
    n = len(images)
    columns = min(columns or int(np.ceil(np.sqrt(n))), n)
    rows = -(-n // columns)
    factor = max(1, -(-LEAST_CELL // images.shape[2])) if any(captions) else 1
    height, width = images.shape[1] * factor, images.shape[2] * factor
    caption = CAPTION if any(captions) else 0
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + caption + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=9)
    for i, image in enumerate(images):
        x = GAP + (i % columns) * (width + GAP)
        y = GAP + (i // columns) * (height + caption + GAP)
        sheet.paste(_cell(image, width, height), (x, y))
        if caption and i < len(captions):
            draw.text((x, y + height), _shorten(draw, font, captions[i], width), fill="black", font=font)
    return sheet


def strips(frames: NDArray, captions: Sequence[str] = ()) -> Image.Image:
    """Lay out denoising trajectories, one row for each sample, noise on the left.

    frames: (T,N,H,W,C) uint8: T steps of N samples.
    captions: one for each of the T columns (its logsnr), written under the last row.
    """
    steps, n = frames.shape[:2]
    flat = frames.swapaxes(0, 1).reshape(steps * n, *frames.shape[2:])
    words = [""] * (steps * (n - 1)) + list(captions) if captions else []
    return grid(flat, words, columns=steps)


def comparison(runs: Sequence[tuple[str, NDArray]]) -> Image.Image:
    """Lay out one row for each run, named on the left; column j is sample j, from the same seed in every run.

    runs: (name, images (N,H,W,C) uint8). Smaller images are enlarged to the largest resolution.
    """
    side = max(max(images.shape[1] for _, images in runs), LEAST_CELL)
    n = min(len(images) for _, images in runs)
    font = ImageFont.load_default(size=11)
    margin = max(int(font.getlength(name)) for name, _ in runs) + 3 * GAP
    sheet = Image.new("RGB", (margin + n * (side + GAP), len(runs) * (side + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, images) in enumerate(runs):
        y = GAP + row * (side + GAP)
        draw.text((GAP, y + side // 2 - 6), name, fill="black", font=font)
        for column in range(n):
            sheet.paste(_cell(images[column], side, side), (margin + column * (side + GAP), y))
    return sheet


def pairs(left: NDArray, right: NDArray, captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Lay out pairs of images (N,H,W,C) uint8 side by side, each pair above its caption."""
    return grid(np.concatenate([left, right], axis=2), captions, columns=columns)


def to_png(picture: Image.Image) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _cell(image: NDArray, width: int, height: int) -> Image.Image:
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    return Image.fromarray(pixels).convert("RGB").resize((width, height), Image.Resampling.NEAREST)


def _shorten(draw: ImageDraw.ImageDraw, font, text: str, width: int) -> str:
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text
