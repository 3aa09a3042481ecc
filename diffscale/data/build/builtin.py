"""The embedded images as a dataset folder, built on first use."""

from __future__ import annotations

import hashlib
import io
import json
from importlib import resources

import numpy as np
import pyarrow as pa
from PIL import Image

from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build.decode import Preparation, fit, to_array
from diffscale.data.build.few_emoji import KINDS, few_emoji
from diffscale.data.build.tasks import is_held_out
from diffscale.data.format.manifest import FILE, Manifest, Split, made_with, rows_hash, write_manifest
from diffscale.data.format.shard import make_batch, write_shard

EMOJI, FEW_EMOJI = "builtin:emoji", "builtin:few-emoji"
BUILTIN = (EMOJI, FEW_EMOJI)
RESOLUTION = 64  # of the embedded images, in pixels
HELD_OUT = 0.1  # share of emoji in the held-out split


def builtin_dataset(path: str, resolution: int | None, storage_uri: str) -> str:
    """Return the dataset folder of one of `BUILTIN`, building it if needed.

    builtin:emoji: all embedded images; the class is the Unicode group
    builtin:few-emoji: simple ones of five kinds (`few_emoji.py`), of which a tiny network draws something in a minute
    resolution: 4 to 64 pixels; None is 64
    storage_uri: absolute path or URI; the folder is STORAGE/datasets/NAME-RESOLUTION-HASH
    """
    side = resolution or RESOLUTION
    if not 4 <= side <= RESOLUTION:
        raise UserError(
            setting="data.resolution",
            value=resolution,
            expected=f"4 to {RESOLUTION} for {path}",
            fix="for larger images build your own dataset: python -m diffscale.data build",
        )
    asset = resources.files("diffscale.data").joinpath("assets/emoji.arrow").read_bytes()
    digest = hashlib.sha256(asset).hexdigest()
    name = path.removeprefix("builtin:")
    content = hashlib.sha256(f"{digest} {KINDS}".encode()).hexdigest() if path == FEW_EMOJI else digest
    folder = storage.join(storage_uri, "datasets", f"{name}-{side}-{content[:8]}")
    if not storage.exists(storage.join(folder, FILE)):
        _build(path, asset, digest, side, folder)
    return folder


def _build(path: str, asset: bytes, digest: str, resolution: int, folder: str) -> None:
    """Write embedded images as a dataset; the manifest comes last, so a folder with a manifest is complete.

    One emoji in ten is held out, chosen by its code points: the package has some emoji under two names, and both
    must be in the same split.
    """
    table = pa.ipc.open_file(pa.py_buffer(asset)).read_all()
    class_names = json.loads(table.schema.metadata[b"class_names"])
    if path == FEW_EMOJI:
        table, class_names = few_emoji(table), list(KINDS)
    preparation = Preparation()
    files = table["image"].to_pylist()
    pixels = np.stack([to_array(fit(Image.open(io.BytesIO(f)).convert("RGB"), resolution, preparation)) for f in files])
    labels, names = table["label"].to_numpy(), np.array(table["name"].to_pylist())
    held = np.array([is_held_out(code, HELD_OUT) for code in table["code_points"].to_pylist()])
    splits = {}
    for name, chosen in (("train", ~held), ("heldout", held)):
        batch = make_batch(pixels[chosen], labels[chosen], names[chosen].tolist())
        shard = write_shard(folder, f"{name}-00000.arrow", batch)
        values = pixels[chosen].reshape(-1, 3).astype(np.float64)
        splits[name] = Split(
            rows=shard.rows,
            content_hash=rows_hash("uint8", resolution, 3, [shard]),
            shards=[shard],
            mean=values.mean(0).tolist(),
            std=values.std(0).tolist(),
        )
    manifest = Manifest(
        layout="pixels",
        dtype="uint8",
        resolution=resolution,
        channels=3,
        class_names=class_names,
        content_hash=splits["train"].content_hash,
        lossy=False,
        resize=preparation.recorded(),
        source={"path": path, "sha256": digest, "split": HELD_OUT, "licence": "MIT, Microsoft and LobeHub"},
        made_with=made_with(),
        splits=splits,
    )
    write_manifest(folder, manifest)
