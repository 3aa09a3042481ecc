"""torch-fidelity's CLIP and DINOv2, on random weights: nobody's download is needed to see that the features agree."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity import feature_extractor_clip as clip

from diffscale.core.errors import UserError
from diffscale.evaluation.metrics.registry import parse_metric
from diffscale.evaluation.networks import torch_fidelity as fidelity
from diffscale.evaluation.networks.extractor import create_extractor

PIXELS = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (2, 3, 48, 48), np.uint8))
SHAPES = {  # small ones of both kinds: (embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size)
    "clip-vit-b-32": (24, 64, 2, 64, 16),
    "clip-rn50": (24, 64, (1, 1, 1, 1), 16, None),
}


class Whole(nn.Module):
    """As much of OpenAI's module as its loaders look at."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.visual = clip.CLIPVisual(*SHAPES[name]).visual
        self.text_projection = nn.Parameter(torch.zeros(8, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual(x)


def openai_file(name: str, folder: Path) -> Path:
    """TorchScript with half-precision weights, as published."""
    torch.manual_seed(0)
    whole = Whole(name).eval()
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, but it is how the published files were made
        traced = torch.jit.trace(whole, torch.zeros(1, 3, 64, 64), check_trace=False)
        torch.jit.save(traced.half(), folder / "file.pt")
    return folder / "file.pt"


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_clip_has_torch_fidelitys_features_from_its_own_download(name, cache, tmp_path, monkeypatch):
    file = openai_file(name, tmp_path)
    theirs = clip.FeatureExtractorCLIP(name, ["clip"], feature_extractor_weights_path=str(file))
    with torch.inference_mode():
        (expected,) = theirs(PIXELS)

    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(clip.MODEL_METADATA[name], "hash", sha256)
    downloaded = tmp_path / "hub" / "checkpoints" / f"{name}-{sha256}.pt"  # where torch-fidelity keeps it
    downloaded.parent.mkdir(parents=True)
    file.rename(downloaded)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    ours = create_extractor(name)
    assert (ours.dim, ours.size, ours.filter_name) == (24, 64, "tf1_bilinear")
    torch.testing.assert_close(ours(PIXELS)["features"], expected, rtol=1e-4, atol=1e-5)

    downloaded.unlink()  # converted to safetensors by then
    torch.testing.assert_close(create_extractor(name)(PIXELS)["features"], expected, rtol=1e-4, atol=1e-5)


def dinov2_state(width: int = 384, depth: int = 12) -> dict[str, torch.Tensor]:
    """Random weights of ViT-S/14 under Meta's keys, the same on every machine."""
    random = np.random.RandomState(0)
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37 * 37, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.qkv.bias": (3 * width,),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "ls1.gamma": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (4 * width, width),
            "mlp.fc1.bias": (4 * width,),
            "mlp.fc2.weight": (width, 4 * width),
            "mlp.fc2.bias": (width,),
            "ls2.gamma": (width,),
        }.items():
            shapes[f"blocks.{i}.{name}"] = shape
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    scales = {name: name.endswith(("gamma", "norm1.weight", "norm2.weight", "norm.weight")) for name in shapes}
    values = {name: random.normal(scales[name], 0.05, shape) for name, shape in shapes.items()}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}


def test_dinov2_has_the_features_of_metas_code(cache, tmp_path, monkeypatch):
    save_file(dinov2_state(), tmp_path / "dinov2-vit-s-14.safetensors")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(tmp_path))
    extractor = create_extractor("dinov2-vit-s-14")
    assert (extractor.dim, extractor.size, extractor.filter_name) == (384, 224, "tf1_bilinear")
    features = extractor(PIXELS)["features"]
    # dinov2_vits14 of facebookresearch/dinov2 at b8931f7, strictly loaded with these weights, after torch-fidelity's
    # resize and normalisation of these pixels.
    expected = [
        [-1.601120, -1.445429, 1.820920, -0.593845, 1.211846],
        [-1.128977, -1.696969, 1.402726, -0.598359, 0.611882],
    ]
    torch.testing.assert_close(features[:, :5], torch.tensor(expected), rtol=1e-3, atol=1e-3)


def test_the_pinned_files_of_dinov2_are_opened_after_their_checksum_and_without_pickle(cache, tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (folder / "dinov2_vits14_pretrain.pth").write_bytes(b"something else")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened before the checksum"))
    with pytest.raises(UserError, match="SHA-256 b938bf1b"):
        create_extractor("dinov2-vit-s-14")


def test_metas_own_file_is_read(cache, tmp_path, monkeypatch):
    file = tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(dinov2_state(), file)
    architecture, stem, _ = fidelity.DINOV2["dinov2-vit-s-14"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(fidelity.DINOV2, "dinov2-vit-s-14", (architecture, stem, digest))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert create_extractor("dinov2-vit-s-14")(PIXELS)["features"].shape == (2, 384)


@pytest.mark.parametrize("name", ["dinov2-vit-l-14", "clip-vit-l-14"])
def test_no_weights_and_no_network_names_three_ways(name, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as error:
        create_extractor(name)
    assert all(way in error.value.fix for way in ("(1)", "(2)", "(3)"))


@pytest.mark.parametrize("name", ["dinov2-vit-s-14", "clip-vit-b-32", "efficientnet_lite0"])
def test_weights_of_another_network_are_refused_by_name(name, cache, tmp_path, monkeypatch):
    save_file(timm.create_model("resnet10t").state_dict(), tmp_path / f"{name}.safetensors")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(UserError, match="weights of this network"):
        create_extractor(name)


def test_every_name_of_torch_fidelity_is_a_metric():
    assert {"clip-rn50", "clip-vit-l-14-336px", "dinov2-vit-g-14"} < set(fidelity.NAMES)
    assert parse_metric("fd_clip-vit-b-32").network == "clip-vit-b-32"
    assert parse_metric("kid_dinov2-vit-l-14").network == "dinov2-vit-l-14"
