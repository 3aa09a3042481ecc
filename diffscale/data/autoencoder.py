"""Autoencoders in diffusers' format: images to the posterior of their latents, and latents to images.

`data build --encode` writes with one, sampling and evaluation decode with one. Only safetensors are opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffscale.core import hub
from diffscale.core.errors import UserError, require_package
from diffscale.core.hashing import file_sha256, identify
from diffscale.core.text import one_line
from diffscale.kernels.runtime import exact_float32

KIND = "AutoencoderKL"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
EDM2_SHIFT, EDM2_SCALE = (5.81, 3.25, 0.12, -2.15), (0.5 / 4.17, 0.5 / 4.62, 0.5 / 3.71, 0.5 / 3.28)
"""Normalisation of stabilityai/sd-vae-ft-mse to a standard deviation of 0.5 (NVlabs/edm2, training/encoders.py)."""
LatentScale = Literal["sd", "edm2"]


@dataclass(frozen=True)
class Autoencoder:
    """An AutoencoderKL of diffusers: a local folder with its config and weights.

    name: folder as a person gave it, or owner/name
    folder: of config.json and the weights
    revision: commit of the hub's repository; empty for a local folder
    config: content of config.json
    """

    name: str
    folder: Path
    revision: str
    config: dict[str, Any]

    @classmethod
    def open(cls, place: str, setting: str) -> Autoencoder:
        """Find an autoencoder in a folder (or its folder `vae`), or on the Hugging Face hub: owner/name[@revision].

        Its weights are read later. Raises UserError for a place without one, other weights than safetensors, and a
        repository that is missing, gated or out of reach.

        setting: that named the place, for messages
        """
        require_package("diffusers", setting=setting, value=place, fix='pip install "diffusers>=0.35"')
        named = hub.path_or_id(place)
        if isinstance(named, Path):
            name, folder, revision = place, named, ""
            if not folder.exists():
                raise _no_autoencoder(place, setting, "there is no such folder")
        else:
            name, (folder, revision) = named.repo, _from_hub(place, named, setting)
        found = next((f for f in (folder, folder / "vae") if (f / CONFIG).is_file()), None)
        if found is None:
            raise _no_autoencoder(place, setting, f"it has no {CONFIG}")
        try:
            config = json.loads((found / CONFIG).read_bytes())
            kind = config.get("_class_name")
        except (ValueError, AttributeError):
            raise _no_autoencoder(place, setting, f"its {CONFIG} cannot be read") from None
        if kind != KIND:
            raise _no_autoencoder(place, setting, f"its {CONFIG} is of {one_line(str(kind), 80)}")
        if not (found / WEIGHTS).is_file():
            raise _no_autoencoder(place, setting, f"it has no {WEIGHTS}; pickled weights are not opened")
        return cls(name, found, revision, config)

    @property
    def factor(self) -> int:
        """Pixels of an image's side for each of its latent's."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def image_channels(self) -> int:
        return int(self.config.get("in_channels", 3))

    @property
    def latent_channels(self) -> int:
        return int(self.config.get("latent_channels", 4))

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the config and the weights."""
        return identify(config=self.config, weights=file_sha256(str(self.folder / WEIGHTS)))

    @cached_property
    def network(self) -> nn.Module:
        """The network in float32, without gradients. Raises UserError for weights that do not fit its config."""
        from diffusers import AutoencoderKL  # import cost

        try:
            network = AutoencoderKL.from_pretrained(str(self.folder), use_safetensors=True, local_files_only=True)
        except Exception as error:  # safetensors, diffusers and torch each have their own
            raise UserError(
                setting="autoencoder",
                value=self.name,
                expected="undamaged weights that fit its config.json",
                reason=one_line(str(error), 200),
            ) from None
        return network.float().eval().requires_grad_(False)

    def normalisation(self, scale: LatentScale) -> tuple[list[float], list[float]]:
        """Return shift and scale of each channel, with which latents are trained on: (latent - shift) * scale.

        sd: the factor (and shift) that Stable Diffusion's pipelines take from config.json, 0.18215 for its first ones
        edm2: that of EDM2's authors, for the four channels of stabilityai/sd-vae-ft-mse
        """
        channels = self.latent_channels
        if scale == "sd":
            shift = float(self.config.get("shift_factor") or 0)
            return [shift] * channels, [float(self.config.get("scaling_factor", 1.0))] * channels
        if channels != len(EDM2_SHIFT):
            raise UserError(
                setting="--latent-scale",
                value=scale,
                expected=f"sd for {channels} channels; EDM2's constants are of the four of stabilityai/sd-vae-ft-mse",
            )
        return list(EDM2_SHIFT), list(EDM2_SCALE)

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation (B, C, h, w) float32 of the latents of images uint8 (B, 3, H, W)."""
        with exact_float32():
            posterior = self.network.encode(images.float() / 127.5 - 1).latent_dist  # type: ignore[operator]
        return posterior.mean, posterior.std

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images float32 (B, 3, H, W), about [-1, 1], of unnormalised latents (B, C, h, w)."""
        with exact_float32():
            return self.network.decode(latents.float()).sample  # type: ignore[operator]

    def __getstate__(self) -> dict[str, Any]:
        """Carry the weights to another process, which may not see the folder."""
        return {**self.__dict__, "network": self.network.cpu(), "digest": self.digest}


def _no_autoencoder(place: str, setting: str, reason: str) -> UserError:
    return UserError(
        setting=setting,
        value=place,
        expected=f"an {KIND} of diffusers, a folder or owner/name of the hub, with {CONFIG} and {WEIGHTS}",
        reason=reason,
    )


def _from_hub(place: str, named: hub.HubId, setting: str) -> tuple[Path, str]:
    """Return the folder of config and weights of owner/name[@revision], fetched if needed, and its commit.

    A commit that was fetched before needs no network: a manifest names one, and workers may have none.
    """
    forms = [[f"{folder}{CONFIG}", f"{folder}{WEIGHTS}"] for folder in ("", "vae/")]
    for wanted in forms if named.is_pinned else ():
        if (found := hub.cached(named.repo, str(named.revision), wanted)) is not None:
            return found[0].parent, str(named.revision)
    pinned = hub.pinned(setting, named.repo, named.revision, text=place)
    there = next((wanted for wanted in forms if set(wanted) <= set(pinned.files)), None)
    if there is None:
        what = ", ".join(pinned.files[:8]) or "nothing"
        raise _no_autoencoder(place, setting, f"the repository has {what}; pickled weights are not opened")
    return hub.download(setting, named.repo, pinned.commit, there)[0].parent, pinned.commit


@dataclass(frozen=True)
class Decoder:
    """Latents as a network makes them to images: the autoencoder with the normalisation of the dataset.

    shape: (C, h, w) of a latent
    shift, scale: of each channel, as `Autoencoder.normalisation` returns them
    """

    autoencoder: Autoencoder
    shape: tuple[int, int, int]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        _, height, width = self.shape
        factor = self.autoencoder.factor
        return self.autoencoder.image_channels, height * factor, width * factor

    @property
    def name(self) -> str:
        """The autoencoder's name without its folders, and eight digits of its hash: a record's `decoder`."""
        return f"{self.autoencoder.name.rstrip('/').rpartition('/')[2]}@{self.autoencoder.digest[:8]}"

    @cached_property
    def flops(self) -> int:
        """Counted FLOPs to decode one latent, twice the multiply-adds."""
        from diffusers import AutoencoderKL  # import cost

        with torch.device("meta"):
            network, latent = AutoencoderKL.from_config(self.autoencoder.config), torch.empty(1, *self.shape)
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.decode(latent)
        return counter.get_total_flops()

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W), about [-1, 1], of latents (B, C, h, w), on the latents' device."""
        shift, scale = (torch.tensor(v, device=latents.device)[:, None, None] for v in (self.shift, self.scale))
        self.autoencoder.network.to(latents.device)
        return self.autoencoder.decode(latents / scale + shift)
