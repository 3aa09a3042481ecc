"""Writes a run's network as a folder for others: plain safetensors with a configuration, or a pipeline of diffusers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffscale.config.factory import open_decoder, open_training_data
from diffscale.core import hub
from diffscale.core.errors import UserError
from diffscale.core.progress import working
from diffscale.data.autoencoder import Decoder
from diffscale.interchange.diffusers_form import diffusers_form
from diffscale.interchange.families import OPEN
from diffscale.interchange.form import Files, Form, Trained
from diffscale.interchange.import_run import origin
from diffscale.interchange.model_card import model_card
from diffscale.interchange.safetensors_form import safetensors_form
from diffscale.training.checkpoint import layout as ck
from diffscale.training.load import is_run, list_targets, settings_of_run

FORMS: dict[str, Callable[[Trained], Form]] = {"diffusers": diffusers_form, "safetensors": safetensors_form}


def export_run(
    target: str,
    out: Path,
    to: str,
    ema: str = "",
    checkpoint: str = "last",
    licence: str = "",
    push: str = "",
    private: bool = False,
) -> Path:
    """Write a run's network into a new folder, upload it if requested, and return the folder.

    Raises UserError before anything is written, for a folder that is not empty, an unknown form, what is no run, and
    an upload that would be refused or that the licence of imported weights does not allow.

    target: a run's folder or a checkpoint
    to: diffusers or safetensors
    ema: average of the weights; empty for that of eval.ema
    checkpoint: last, or images seen
    licence: of the weights, for the model card; empty says that none is stated
    push: OWNER/NAME of a model on the hub, which gets the folder's files in one commit
    private: whether a model that the upload makes is private
    """
    if to not in FORMS:
        raise UserError(setting="--to", value=to, expected=" or ".join(FORMS))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(setting="OUT", value=str(out), expected="a folder that is new or empty")
    if not is_run(target):
        raise UserError(setting="RUN", value=target, expected="a run's folder or a checkpoint of one")
    uri = list_targets(target, checkpoint)[-1]
    about, experiment, state = origin(uri), settings_of_run(uri), ck.read_state(uri)
    shape = {name: int(state["data"][name]) for name in ("resolution", "channels", "num_classes")}
    decoder = None
    if state["record"]["train_resolution"] != shape["resolution"]:  # the images of latents have another side
        decoder = open_decoder(experiment, open_training_data(experiment))
    if push:
        _check_push(push, about, decoder, private)
    average = ema or experiment.eval.ema
    with working(f"reading {uri}", unit=""):
        _, model, images, columns = ck.load_for_sampling(uri, average)
    trained = Trained(experiment, model, shape, images, ck.ema_name(average), ck.run_of(uri), decoder)
    form = FORMS[to](trained)
    card = model_card(trained, columns, form, to, about, licence)
    with working(f"writing {out}", unit=""):
        _write(out, form.files | {"README.md": card})
    if push:
        with working(f"uploading {out}", unit=""):
            hub.upload("--push", push, out, f"{experiment.name} after {images:,} images, from diffscale", private)
    return out


def _check_push(repo: str, about: dict[str, Any] | None, decoder: Decoder | None, private: bool) -> None:
    """Raise UserError for an upload that the hub would refuse, or that the licence of others' weights forbids."""
    if about is not None and not about["may_be_passed_on"] and not private:
        raise _not_passed_on(repo, f"they come from {about['file']} with the licence {about['licence']}")
    if decoder is not None and decoder.autoencoder.revision and not private:
        name, commit = decoder.autoencoder.name, decoder.autoencoder.revision
        licence = hub.pinned("data.decoder", name, commit).licence
        if licence not in OPEN:
            raise _not_passed_on(repo, f"the autoencoder {name} has the licence {licence or 'that its page states'}")
    hub.check_upload("--push", repo, private)


def _not_passed_on(repo: str, reason: str) -> UserError:
    return UserError(
        setting="--push",
        value=repo,
        expected="weights whose licence lets everyone pass them on, or a private model",
        reason=reason,
        fix="--private keeps the model to you and those whom you let in",
    )


def _write(out: Path, files: Files) -> None:
    """Write the files into a new folder next to its place and rename it, so that it is whole or absent."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                save_file({key: _own(tensor) for key, tensor in content.items()}, path, {"format": "pt"})
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(setting="OUT", value=str(out), expected="a place to write to", reason=str(error)) from None


def _own(tensor: Tensor) -> Tensor:
    """Return the tensor in memory of its own, in the usual order."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)
