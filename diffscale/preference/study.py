"""A study: the contenders' images side by side, the question, and where its votes are."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffscale.core import image_grids, storage
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify, sha256_of
from diffscale.preference.pairs import NOISE
from diffscale.preference.votes import VoteBook

QUESTIONS = {
    "real": "Which looks more like a real picture?",
    "label": "Which shows this better?",
}
LAYOUTS = ("pair", "grid")
GRID = 16  # images of a grid
REAL = "real images"
Layout = Literal["pair", "grid"]


@dataclass(frozen=True)
class Contender:
    """Images of one recipe, in the order of their seeds.

    name: of the run or folder; never shown to a rater
    images: (N, H, W, C) uint8
    labels: class name of each image; empty without classes
    origin: what the images are a function of: run_id, images_seen, ema and sampler, or a hash of a folder's pixels
    run: folder of the run, if it is one
    """

    name: str
    images: NDArray
    labels: tuple[str, ...] = ()
    origin: str = ""
    run: str = ""


class Study:
    """Contenders compared by one question.

    contenders: two or more; item i of every contender is shown against item i of another
    real: images of the data as one more contender, or None
    question: a key of QUESTIONS
    layout: single images, or grids of 16
    place: storage under which the votes are kept
    """

    def __init__(
        self,
        contenders: Sequence[Contender],
        real: Contender | None = None,
        *,
        question: str = "real",
        layout: str = "pair",
        place: str,
        seed: int = 0,
    ) -> None:
        self.contenders = [*contenders, *([real] if real else [])]
        _check(self.contenders, question, layout)
        self.question, self.layout, self.seed = question, layout, seed
        self.honest = len(self.contenders) - 1 if real else 0
        shown = min(len(c.images) for c in self.contenders)
        self.items = shown if layout == "pair" else shown // GRID
        self.study_id = identify(
            question=question, layout=layout, items=self.items, contenders=[c.origin for c in self.contenders]
        )
        self.folder = storage.join(place, "preference", self.study_id)
        self.book = VoteBook(self.folder)

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.contenders]

    def label(self, item: int) -> str:
        """Return what the rater is told that the images show; empty without classes or of a grid."""
        labels = self.contenders[0].labels
        return labels[item] if labels and self.layout == "pair" else ""

    def picture(self, contender: int, item: int) -> bytes:
        """Return a PNG of one item of a contender, or of random pixels in its place (NOISE), without any metadata."""
        source = self.contenders[max(contender, 0)].images
        rows = source[item : item + 1] if self.layout == "pair" else source[item * GRID : (item + 1) * GRID]
        if contender == NOISE:
            rows = np.random.default_rng([self.seed, item]).integers(0, 256, rows.shape, np.uint8)
        if self.layout == "grid":
            return image_grids.to_png(image_grids.grid(rows))
        buffer = io.BytesIO()
        Image.fromarray(rows[0, ..., 0] if rows.shape[-1] == 1 else rows[0]).save(buffer, "PNG")
        return buffer.getvalue()

    def write(self) -> None:
        """Write `study.json`, which names the contenders."""
        about = {
            "study_id": self.study_id,
            "question": QUESTIONS[self.question],
            "layout": self.layout,
            "items": self.items,
            "contenders": [{"name": c.name, "origin": c.origin, "run": c.run} for c in self.contenders],
        }
        storage.write_bytes(storage.join(self.folder, "study.json"), json.dumps(about, indent=1).encode())


def hash_of_images(images: NDArray) -> str:
    """Return the origin of images whose making is unknown."""
    return sha256_of(str(images.shape).encode() + images.tobytes())[:16]


def _check(contenders: list[Contender], question: str, layout: str) -> None:
    if question not in QUESTIONS:
        raise UserError(setting="--question", value=question, expected=" or ".join(QUESTIONS))
    if layout not in LAYOUTS:
        raise UserError(setting="--layout", value=layout, expected=" or ".join(LAYOUTS))
    if len(contenders) < 2:
        raise UserError(setting="RUN|FOLDER", value=len(contenders), expected="at least two to compare")
    repeated = [c.name for i, c in enumerate(contenders) if c.origin in {other.origin for other in contenders[:i]}]
    if repeated:
        raise UserError(
            setting="RUN|FOLDER", value=repeated[0], expected="each once", reason="its images were given twice"
        )
    least = GRID if layout == "grid" else 1
    few = next((c for c in contenders if len(c.images) < least), None)
    if few is not None:
        raise UserError(setting=few.name, value=f"{len(few.images)} images", expected=f"at least {least}")
    if question == "label":
        _check_labels(contenders)


def _check_labels(contenders: list[Contender]) -> None:
    shown = min(len(c.images) for c in contenders)
    without = next((c.name for c in contenders if not c.labels), None)
    if without is not None:
        raise UserError(
            setting="--question",
            value="label",
            expected="contenders with classes",
            reason=f"{without} has none",
            fix="--question real",
        )
    for contender in contenders[1:]:
        differ = [i for i in range(shown) if contender.labels[i] != contenders[0].labels[i]]
        if differ:
            first = contenders[0]
            raise UserError(
                setting="--question",
                value="label",
                expected="the same class at every position of all contenders",
                reason=f"image {differ[0]} is {first.labels[differ[0]]!r} in {first.name} "
                f"and {contender.labels[differ[0]]!r} in {contender.name}",
            )
