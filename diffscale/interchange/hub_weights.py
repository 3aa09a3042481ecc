"""Weights of a model on Hugging Face's hub, as a local file or folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from diffscale.core.errors import UserError
from diffscale.core.hub import HubId, download, path_or_id, pinned
from diffscale.interchange.containers import WEIGHTS_OF_FOLDER

ENDINGS = (".safetensors", ".pt", ".pth", ".pkl", ".bin")
FOLDERS = ("", "unet/", "transformer/")


class Fetched(NamedTuple):
    """Weights on this machine."""

    path: Path
    source: str  # where they come from: the file's name, or the hub's id with the commit
    licence: str  # as their page says; empty for a local file, or if it says none


def fetch(text: str, family: str) -> Fetched:
    """Return a local file or folder unchanged, or a copy of what an id of the hub names.

    Raises UserError for what neither exists here nor can be read from the hub, before anything is fetched.

    text: path, or owner/name[@revision][:file]
    family: `diffusers` takes a folder with config.json, every other a file
    """
    named = path_or_id(text)
    if isinstance(named, Path):
        if not named.exists():
            expected = "a file or folder that exists, or a model on the hub: owner/name[@revision][:file]"
            raise UserError(setting="FILE", value=text, expected=expected)
        return Fetched(named.resolve(), named.resolve().name, "")
    commit, there, licence = pinned("FILE", named.repo, named.revision, text=text)
    wanted = _wanted(named, there, family == "diffusers")
    copies = download("FILE", named.repo, commit, wanted)
    source = f"{named.repo}@{commit}:{wanted[-1]}"
    return Fetched(copies[0].parent if len(copies) > 1 else copies[0], source, licence)


def _wanted(named: HubId, there: list[str], folder: bool) -> list[str]:
    """Return the files to fetch: weights, for a folder after its configuration."""
    if named.file is not None:
        found = [[named.file]] if named.file in there else []
    elif folder:
        pairs = [[f"{place}config.json", f"{place}{name}"] for place in FOLDERS for name in WEIGHTS_OF_FOLDER]
        found = [pair for pair in pairs if set(pair) <= set(there)][:1]
    else:
        found = [[name] for name in there if name.endswith(ENDINGS)]
    if len(found) != 1:
        weights = [name for name in there if name.endswith(ENDINGS)]
        raise UserError(
            setting="FILE",
            value=named.repo,
            expected="config.json with safetensors" if folder else "one file of weights",
            reason=f"the repository has {', '.join(weights[:8]) or 'none'}",
            fix=f"{named.repo}:{weights[0]}" if weights and not folder else "",
        )
    return found[0]
