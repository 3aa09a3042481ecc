"""The wavelet transforms against PyWavelets, and their inverses."""

from __future__ import annotations

import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffscale.models.wavelet import dwt, idwt

PYWAVELETS = {"haar": ("haar", "periodization", 0), "5/3": ("bior2.2", "reflect", 1)}  # name, mode, border to drop


@pytest.mark.parametrize("wavelet", PYWAVELETS)
@pytest.mark.parametrize("size", [(16, 24), (6, 8), (32, 4)])
def test_the_bands_are_those_of_pywavelets_up_to_the_border(wavelet, size):
    name, mode, border = PYWAVELETS[wavelet]
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    approximation, details = pywt.dwt2(x.numpy(), name, mode)
    kept = slice(border, -border or None)
    expected = torch.cat([torch.from_numpy(band[..., kept, kept]) for band in (approximation, *details)], dim=1)
    assert torch.allclose(dwt(x, wavelet), expected, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["haar", "5/3"]), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_inverse_gives_the_image_back(wavelet, levels, rows, columns, seed):
    x = torch.randn(2, 3, rows * 2**levels, columns * 2**levels, generator=torch.Generator().manual_seed(seed))
    bands = dwt(x, wavelet, levels)
    assert bands.shape == (2, 3 * 4**levels, rows, columns)
    assert (idwt(bands, wavelet, levels) - x).abs().max() <= 1e-5
    assert (idwt(dwt(x.double(), wavelet, levels), wavelet, levels) - x).abs().max() <= 1e-12


@pytest.mark.parametrize("wavelet", ["haar", "5/3"])
def test_the_inverse_is_exact_to_one_millionth_on_images(wavelet):
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (idwt(dwt(x, wavelet), wavelet) - x).abs().max() <= 1e-6


@pytest.mark.parametrize("wavelet", ["haar", "5/3"])
def test_unit_noise_keeps_a_variance_near_one_in_every_band(wavelet):
    noise = torch.randn(16, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    variances = dwt(noise, wavelet).var(dim=(0, 2, 3))
    # 5/3, by its filters' squares: low 1.4375, high 0.75 per axis
    expected = [1.0] * 4 if wavelet == "haar" else [1.4375**2, 1.4375 * 0.75, 1.4375 * 0.75, 0.75**2]
    assert torch.allclose(variances, torch.tensor(expected), rtol=0.05)


def test_a_flat_image_has_no_detail():
    bands = dwt(torch.full((1, 1, 8, 8), 0.7), "5/3")
    assert torch.allclose(bands[:, :1], torch.full((1, 1, 4, 4), 1.4))
    assert bands[:, 1:].abs().max() < 1e-6


def test_what_does_not_fit_is_refused_by_name():
    with pytest.raises(ValueError, match="size = 6 × 8: expected multiples of 4"):
        dwt(torch.zeros(1, 1, 6, 8), "haar", 2)
    with pytest.raises(ValueError, match="channels = 6: expected a multiple of 4"):
        idwt(torch.zeros(1, 6, 4, 4), "haar")
    with pytest.raises(ValueError, match="wavelet = 'db2'"):
        dwt(torch.zeros(1, 1, 4, 4), "db2")  # type: ignore[arg-type]
