"""From a `data.path` to a dataset folder: the embedded images, one resolution of several, or the folder itself."""

from __future__ import annotations

import hashlib
import io
import json
from importlib import metadata, resources

import numpy as np
import PIL
import pyarrow as pa
from PIL import Image

import diffscale
from diffscale.core import storage
from diffscale.core.errors import UserError
from diffscale.data.build.decode import Preparation, fit, to_array
from diffscale.data.build.split import is_held_out
from diffscale.data.format import hf_dataset as huggingface
from diffscale.data.format.dataset import available_resolutions
from diffscale.data.format.manifest import FILE, Manifest, Split, read_manifest, rows_hash, write_manifest
from diffscale.data.format.shard import make_batch, write_shard

EMOJI = "builtin:emoji"
EMOJI_RESOLUTION = 64
EMOJI_HELD_OUT = 0.1


def resolve(path: str, resolution: int | None, storage_uri: str) -> str:
    """The dataset that `open_dataset` takes, from the settings `data.path`, `data.resolution` and `storage`.

    `builtin:emoji` is built at that resolution (4 to 64, default 64) under STORAGE/datasets, once. A folder that was
    built at several resolutions gives its subfolder. A Hugging Face dataset (a folder of Arrow or Parquet files) gives
    itself with the resolution noted, and is read as it is. Raises UserError that names what would be valid.
    """
    if path.startswith("builtin:"):
        return _builtin(path, resolution, storage_uri)
    path = storage.check_absolute(path, "data.path")
    if storage.exists(storage.join(path, FILE)):
        found = read_manifest(path).resolution
        if resolution not in (None, found):
            raise UserError(
                setting="data.resolution",
                value=resolution,
                expected=f"{found}, the resolution of {path}",
                fix=f"python -m diffscale.data build SOURCE DATASET --resolution {found} --resolution {resolution}",
            )
        return path
    several = [] if path.endswith((".arrow", ".parquet")) else available_resolutions(path)
    if several:
        wanted = resolution if resolution is not None else several[-1]
        if wanted not in several:
            raise UserError(setting="data.resolution", value=resolution, expected=f"one of {several} in {path}")
        return storage.join(path, str(wanted))
    if huggingface.is_dataset(path):
        return huggingface.address(path, resolution)
    if not storage.exists(path):
        raise UserError(setting="data.path", value=path, expected="a dataset folder, and there is nothing")
    raise UserError(
        setting="data.path",
        value=path,
        expected="a dataset folder with a manifest.json, or Arrow or Parquet files",
        fix=f"python -m diffscale.data build {path} DATASET --resolution {resolution or 64}",
    )


def _builtin(path: str, resolution: int | None, storage_uri: str) -> str:
    side = resolution or EMOJI_RESOLUTION
    if path != EMOJI:
        raise UserError(setting="data.path", value=path, expected=f"{EMOJI}, a folder or a URI")
    if not 4 <= side <= EMOJI_RESOLUTION:
        raise UserError(
            setting="data.resolution",
            value=resolution,
            expected=f"4 to {EMOJI_RESOLUTION} for {EMOJI}",
            fix="for larger images build a dataset of your own: python -m diffscale.data build",
        )
    asset = resources.files("diffscale.data").joinpath("assets/emoji.arrow").read_bytes()
    digest = hashlib.sha256(asset).hexdigest()
    base = storage.check_absolute(storage_uri)
    folder = storage.join(base, "datasets", f"emoji-{side}-{digest[:8]}")
    if not storage.exists(storage.join(folder, FILE)):
        build_emoji(asset, digest, side, folder)
    return folder


def build_emoji(asset: bytes, digest: str, resolution: int, folder: str) -> None:
    """Writes the embedded images as a dataset; the manifest comes last, so the folder is complete or no dataset.

    One emoji in ten is held out, chosen by its code points: the few that the package has twice stay on one side.
    """
    table = pa.ipc.open_file(pa.py_buffer(asset)).read_all()
    class_names = json.loads(table.schema.metadata[b"class_names"])
    preparation = Preparation()
    files = table["image"].to_pylist()
    pixels = np.stack([to_array(fit(Image.open(io.BytesIO(f)).convert("RGB"), resolution, preparation)) for f in files])
    labels, names = table["label"].to_numpy(), np.array(table["name"].to_pylist())
    held = np.array([is_held_out(code, EMOJI_HELD_OUT) for code in table["code_points"].to_pylist()])
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
        source={"path": EMOJI, "sha256": digest, "split": EMOJI_HELD_OUT, "licence": "MIT, Microsoft and LobeHub"},
        made_with=made_with(),
        splits=splits,
    )
    write_manifest(folder, manifest)


def made_with() -> dict[str, str]:
    return {"diffscale": diffscale.__version__, "pyarrow": metadata.version("pyarrow"), "pillow": PIL.__version__}
