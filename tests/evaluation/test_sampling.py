"""How many samples are drawn in one pass."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from diffscale.config.load import load_experiment
from diffscale.evaluation.sampling import batch_that_fits, given_batch
from diffscale.models import create_model
from diffscale.models.cost import peak_bytes


class Three(nn.Module):
    """x (B, 3, H, W) → 2·x twelve times as wide → its mean: the input is not an operation's result."""

    def forward(self, x: Tensor, logsnr: Tensor, label: Tensor | None = None) -> tuple[Tensor, None]:
        wide = (2 * x).repeat(1, 12, 1, 1)
        return wide.mean(1, keepdim=True), None


def test_the_peak_of_a_pass_is_what_its_operations_hold_at_most():
    """2·x and its copies together: 3 + 36 values for each pixel, 4 bytes each; then 2·x is freed."""
    assert peak_bytes(Three, 16, 3, 0) == 16 * 16 * 4 * (3 + 36)


def test_the_peak_grows_with_the_image_as_activations_do():
    small, large = (peak_bytes(lambda s=s: create_model("unet-tiny", resolution=s), s, 3, 0) for s in (32, 64))
    assert 3 < large / small < 5


@pytest.mark.parametrize(
    ("memory", "per_image", "batch"),
    [(141 << 30, 5 << 20, 1024), (16 << 30, 64 << 20, 64), (16 << 30, 65 << 20, 32), (8 << 30, 9 << 30, 1)],
)
def test_the_largest_batch_of_samples_is_a_power_of_two_that_fits_a_quarter_of_the_memory(memory, per_image, batch):
    assert batch_that_fits(memory, per_image) == batch


def test_where_the_device_is_unknown_the_batch_of_samples_is_64():
    assert given_batch(load_experiment("quickstart-unet", ["eval.batch=auto"]).eval) == 64
    assert given_batch(load_experiment("quickstart-unet", ["eval.batch=16"]).eval) == 16
