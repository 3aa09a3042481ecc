from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from diffscale.evaluation.networks.resize import resize, upsample


def pixels(side: int, seed: int = 0, channels: int = 3) -> torch.Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (2, channels, side, side), dtype=np.uint8))


@pytest.mark.parametrize("side", [16, 32, 299, 512])
def test_tf1_bilinear_is_torch_fidelitys(side):
    x = pixels(side).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(x, size=(299, 299), align_corners=False)
    torch.testing.assert_close(resize(x, 299, "tf1_bilinear"), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [32, 512])
@pytest.mark.parametrize(
    ("name", "filter"),
    [("clean_bicubic", Image.Resampling.BICUBIC), ("antialiased_bilinear", Image.Resampling.BILINEAR)],
)
def test_antialiased_filters_are_pillows_in_float(side, name, filter):
    x = pixels(side)
    ours = resize(x.float(), 128, name)
    plane = Image.fromarray(x[1, 2].numpy().astype(np.float32), mode="F")
    theirs = np.asarray(plane.resize((128, 128), filter))
    if name == "clean_bicubic":
        theirs = theirs.clip(0, 255)  # as clean-fid does
    np.testing.assert_allclose(ours[1, 2], theirs, atol=1e-3)


def test_without_antialiasing_the_result_is_another():
    x = pixels(512).float()
    difference = (resize(x, 128, "tf1_bilinear") - resize(x, 128, "antialiased_bilinear")).abs().mean()
    assert difference > 20


def test_samples_are_upsampled_as_pillow_does_with_lanczos():
    for channels in (1, 3):
        x = pixels(16, channels=channels)
        image = x[0].permute(1, 2, 0).numpy()
        theirs = Image.fromarray(image.squeeze()).resize((32, 32), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(upsample(x, 32)[0].permute(1, 2, 0).numpy().squeeze(), np.asarray(theirs))
    assert upsample(x, 16) is x
    with pytest.raises(ValueError, match="below"):
        upsample(x, 8)


def test_an_unknown_filter_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        resize(pixels(16).float(), 32, "nearest")
