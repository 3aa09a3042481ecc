"""Published statistics of reference sets (`--reference cifar10`): where they come from and what they compare with.

They hold mean and covariance of features, of which FID and sFID alone are made. Publishers computed them with their
own ports of the 2015 Inception network, so values next to ours may differ in the second decimal.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import sha256_of
from diffscale.core.text import nearest, one_line
from diffscale.evaluation.metrics.statistics import load_moments
from diffscale.evaluation.networks.weights import OFFLINE

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs"
OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
LARGEST = 2 << 30  # bytes of a download: OpenAI's files hold images too


@dataclass(frozen=True)
class Published:
    """One published reference.

    url: of the .npz, whose last part is the file's name
    side: of the images in pixels
    n: images that the statistics are of
    crop: how the images were prepared
    port: of the Inception network
    """

    url: str
    side: int
    n: int
    crop: str
    port: str

    @property
    def file(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def caveat(self) -> str:
        """A note for every value that is compared with it."""
        return f"reference {self.file}: {self.n:,} images, {self.crop}; statistics of {self.port}'s port of Inception"


def _nvidia(file: str, side: int, n: int, crop: str) -> Published:
    return Published(f"{NVIDIA}/{file}", side, n, crop, "NVIDIA")


def _openai(file: str, side: int) -> Published:
    return Published(f"{OPENAI}/{side}/{file}", side, 1_281_167, "ADM's crop", "OpenAI")


PUBLISHED: dict[str, Published] = {
    "cifar10": _nvidia("cifar10-32x32.npz", 32, 50_000, "uncropped"),
    "ffhq64": _nvidia("ffhq-64x64.npz", 64, 70_000, "resized to 64 pixels"),
    "afhqv2-64": _nvidia("afhqv2-64x64.npz", 64, 15_803, "resized to 64 pixels"),
    "imagenet64": _nvidia("imagenet-64x64.npz", 64, 1_281_167, "centre crop"),
    "imagenet64-adm": _openai("VIRTUAL_imagenet64_labeled.npz", 64),
    "imagenet128-adm": _openai("VIRTUAL_imagenet128_labeled.npz", 128),
    "imagenet256-adm": _openai("VIRTUAL_imagenet256_labeled.npz", 256),
    "imagenet512-adm": _openai("VIRTUAL_imagenet512.npz", 512),
}
"""EDM's references (NVlabs/edm, README) and ADM's (openai/guided-diffusion, evaluations/README)."""


def statistics_name(reference: str) -> str:
    """Return the name of the file that a reference stands for, as records have it."""
    return PUBLISHED[reference].file if reference in PUBLISHED else reference.rstrip("/").rpartition("/")[2]


def published_of(file: Path) -> Published | None:
    """Return the published reference of a file's name, None for any other statistics."""
    return next((known for known in PUBLISHED.values() if known.file == file.name), None)


def statistics_file(reference: str) -> Path:
    """Return the local .npz of a published name or a path; a published one is fetched once.

    Its SHA-256 is noted then, and a file that has changed since is refused. Raises UserError for an unknown name, no
    network, and a file that is no .npz of statistics.
    """
    if reference not in PUBLISHED:
        if not reference.endswith(".npz"):
            raise UserError(
                setting="reference",
                value=reference,
                expected=f"an .npz of statistics, or a published one: {nearest(reference, PUBLISHED)}",
            )
        path = Path(reference).resolve()
        load_moments(path)
        return path
    known = PUBLISHED[reference]
    path = cache_dir() / "references" / "published" / known.file
    note = path.with_suffix(".sha256")
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            storage.write_bytes(str(path), _fetched(reference, known))
        digest = sha256_of(path.read_bytes())
        if not note.exists():
            load_moments(path)  # before it is trusted
            note.write_text(digest)
    if note.read_text() != digest:
        raise UserError(
            setting="reference",
            value=str(path),
            expected=f"the file with the SHA-256 {note.read_text()[:16]}...",
            reason=f"it has {digest[:16]}... now",
            fix=f"remove it and {note.name} to fetch it again",
        )
    return path


def _fetched(name: str, known: Published) -> bytes:
    target = cache_dir() / "references" / "published" / known.file
    problem = f"${OFFLINE} is set"
    if not os.environ.get(OFFLINE):
        try:
            with urlopen(known.url, timeout=60) as answer:
                data = answer.read(LARGEST + 1)
            if len(data) <= LARGEST:
                return data
            problem = f"it has more than {LARGEST >> 30} GiB"
        except (URLError, OSError, ValueError) as error:
            problem = one_line(str(error), 120)
    raise UserError(
        setting="reference",
        value=name,
        expected=f"{known.file}",
        reason=f"{known.url} could not be fetched ({problem})",
        fix=f"fetch it elsewhere and put it at {target}, or name the file: {known.file}",
    )


def refuse_other_protocol(file: Path, side: int, resize: str, networks: Mapping[str, str]) -> None:
    """Raise UserError for an evaluation whose value a published reference does not compare with.

    side: in pixels at which images are compared
    resize: from there to the network's input
    networks: of each metric, by its name
    """
    known = published_of(file)
    if known is None:
        return
    if side != known.side:
        raise UserError(
            setting="eval.eval_resolution",
            value=side,
            expected=f"{known.side}, the images of {known.file}",
            reason="a distance between images of different size is no FID",
        )
    if resize not in ("default", "tf1"):
        raise UserError(
            setting="eval.resize",
            value=resize,
            expected="default, TensorFlow's resizing, with which the statistics were made",
            reason=f"{known.file} compares with no other",
        )
    for metric, network in networks.items():
        if network != "inception":
            raise UserError(
                setting="eval.metrics",
                value=metric,
                expected="fid, and of OpenAI's files sfid",
                reason=f"{known.file} holds mean and covariance of Inception's features",
            )
