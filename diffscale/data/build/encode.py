"""Encodes a built dataset of pixels as latents: the second half of `data build --encode`.

    SOURCE -> DATASET/256, the pixels, as any build -> DATASET/32, the latents, row for row and shard for shard

Both stay: the pixels are the reference that samples are compared with, and one folder of several resolutions is what
`eval.eval_resolution` already reads. A shard is the unit of resumption.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffscale.core import storage
from diffscale.core.cache import cache_dir, file_lock
from diffscale.core.errors import UserError
from diffscale.core.hashing import identify
from diffscale.core.progress import Work, working
from diffscale.data.autoencoder import Autoencoder, LatentScale
from diffscale.data.format.dataset import Dataset
from diffscale.data.format.manifest import (
    FILE,
    Encoding,
    Manifest,
    Shard,
    Split,
    SplitName,
    channel_statistics,
    made_with,
    read_manifest,
    rows_hash,
    write_manifest,
)
from diffscale.data.format.shard import make_batch, write_shard

NOTE = ".encoding.json"  # end of the names of files that only an unfinished folder has
BATCH = {"cpu": 4, "cuda": 64}  # images in one pass


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode.

    autoencoder: as `Autoencoder.open` returns it
    scale: normalisation of the latents
    mirror: also store the latent of each mirrored image, so that `data.flip` can mirror before the encoder
    """

    autoencoder: Autoencoder
    scale: LatentScale = "sd"
    mirror: bool = False

    def check(self, resolutions: tuple[int, ...], channels: int) -> int:
        """Return the side of a latent. Raises UserError for images that the autoencoder cannot take.

        resolutions: sides of the images in pixels
        channels: of the images
        """
        network = self.autoencoder
        if len(resolutions) != 1 or resolutions[0] % network.factor:
            raise UserError(
                setting="--resolution",
                value=list(resolutions),
                expected=f"one resolution, a multiple of {network.factor}",
                reason=f"{network.name} makes one latent of {network.factor} x {network.factor} pixels",
            )
        if channels != network.image_channels:
            raise UserError(
                setting="--channels",
                value=channels,
                expected=f"{network.image_channels}, the channels that {network.name} encodes",
            )
        network.normalisation(self.scale)
        return resolutions[0] // network.factor


def encode(pixels: str, target: str, options: EncodeOptions) -> str:
    """Write the latents of every image of a dataset as another one and return its folder.

    The same call continues after an interruption and encodes no finished shard again.

    pixels: folder of the dataset of images
    target: folder of the latents

    Raises UserError for images that the autoencoder cannot take and a target that holds another dataset.
    """
    images = read_manifest(pixels)
    side = options.check((images.resolution,), images.channels)
    network, (shift, scale) = options.autoencoder, options.autoencoder.normalisation(options.scale)
    encoding = Encoding(
        autoencoder=network.name,
        revision=network.revision,
        digest=network.digest,
        scale=options.scale,
        shift=shift,
        factors=scale,
        mirrored=options.mirror,
        image_resolution=images.resolution,
        images=images.content_hash,
    )
    hashes = {name: split.content_hash for name, split in images.splits.items() if split.rows}
    identity = identify(encoding=encoding.model_dump(), splits=hashes)
    with file_lock(cache_dir() / "locks" / identify(target=target)):
        if _is_complete(target, identity):
            return target
        device = "cuda" if torch.cuda.is_available() else "cpu"
        splits: dict[SplitName, Split] = {}
        with working("encoding", sum(split.rows for split in images.splits.values())) as work:
            for name in hashes:
                dataset = Dataset.open(pixels, name)
                shards = [
                    _encode_shard(dataset, s, target, encoding, network, device, work)
                    for s in range(len(dataset.split.shards))
                ]
                splits[name] = _split(shards, side, network.latent_channels)
        manifest = Manifest(
            layout="latents",
            dtype="float32",
            resolution=side,
            channels=network.latent_channels,
            class_names=images.class_names,
            content_hash=splits["train"].content_hash,
            lossy=images.lossy,
            lossy_images=images.lossy_images,
            rejected=images.rejected,
            resize=images.resize,
            source={**images.source, "plan": identity},
            made_with={**made_with(), "torch": torch.__version__, "device": device},
            encoding=encoding,
            splits=splits,
        )
        write_manifest(target, manifest)
        for note in storage.list_files(target, NOTE):
            storage.delete(note)
    return target


def _is_complete(target: str, identity: str) -> bool:
    """Return whether the same latents are there; claim the folder if they are not. Raises UserError for other ones."""
    claim = storage.join(target, f"plan{NOTE}")
    complete = storage.exists(storage.join(target, FILE))
    if complete:
        found = read_manifest(target).source.get("plan")
    else:
        found = storage.read_bytes(claim).decode() if storage.exists(claim) else identity
        storage.write_bytes(claim, found.encode())
    if found != identity:
        raise UserError(
            setting="DATASET",
            value=target,
            expected="a new folder, or the latents of the same images by the same autoencoder and options",
            reason="this one holds others",
            fix="choose another folder, or remove this one",
        )
    return complete


def _encode_shard(
    dataset: Dataset,
    s: int,
    target: str,
    encoding: Encoding,
    network: Autoencoder,
    device: str,
    work: Work,
) -> dict[str, Any]:
    """Write the s-th shard unless a note says that it is written; return the note: its entry and sums over latents."""
    entry = dataset.split.shards[s]
    note = storage.join(target, entry.file.removesuffix(".arrow") + NOTE)
    if storage.exists(note):
        work.advance(entry.rows)
        return json.loads(storage.read_bytes(note))
    start, parts = int(dataset.starts[s]), []
    sums, squares = np.zeros(network.latent_channels), np.zeros(network.latent_channels)
    network.network.to(device)
    for first in range(0, entry.rows, BATCH[device]):
        rows = np.arange(first, min(first + BATCH[device], entry.rows))
        pixels = dataset.gather(start + rows)[0].permute(0, 3, 1, 2).to(device)
        mean, std = network.encode(pixels)
        stored = [_stored(mean, std, encoding)]
        if encoding.mirrored:
            stored.append(_stored(*network.encode(pixels.flip(3)), encoding))
        parts.append(np.concatenate(stored, axis=1))
        means, stds = np.split(stored[0].astype(np.float64), 2, axis=1)
        sums += means.sum((0, 2, 3))
        squares += (means**2 + stds**2).sum((0, 2, 3))  # of a latent drawn from its posterior
        work.advance(len(rows))
    shard = dataset.shard(s)
    written = write_shard(target, entry.file, make_batch(np.concatenate(parts), shard.labels, shard.names.to_pylist()))
    found = {"shard": written.model_dump(), "sums": sums.tolist(), "squares": squares.tolist()}
    storage.write_bytes(note, json.dumps(found).encode())
    return found


def _stored(mean: Tensor, std: Tensor, encoding: Encoding) -> np.ndarray:
    """Return mean and standard deviation as they are stored: normalised, one after the other, float32 (B, 2C, h, w)."""
    shifts, scales = (torch.tensor(v, device=mean.device)[:, None, None] for v in (encoding.shift, encoding.factors))
    return torch.cat([(mean - shifts) * scales, std * scales], dim=1).cpu().numpy()


def _split(notes: list[dict[str, Any]], side: int, channels: int) -> Split:
    shards = [Shard.model_validate(note["shard"]) for note in notes]
    rows = sum(shard.rows for shard in shards)
    sums, squares = (np.sum([note[name] for note in notes], axis=0) for name in ("sums", "squares"))
    mean, std = channel_statistics(sums, squares, rows * side**2)
    return Split(
        rows=rows, content_hash=rows_hash("float32", side, channels, shards), mean=mean, std=std, shards=shards
    )
