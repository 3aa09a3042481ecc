"""Published networks: parameter counts to the unit and outputs, against the authors' own code.

The expected numbers were made by building the authors' networks (NVlabs/edm, NVlabs/edm2, openai/guided-diffusion,
openai/improved-diffusion, and diffusers' UNet2DModel with the configuration of google/ddpm-*) outside this repository.
"""

from __future__ import annotations

import pytest
import torch

from diffscale.models import PRESETS, create_model
from diffscale.models.presets import CONVOLUTIONAL

COUNTS = {
    "ddpm-cifar10": 35_746_307,
    "ddpm-lsun256": 113_673_219,
    "iddpm-cifar10": 52_546_438,
    "iddpm-imagenet64": 121_063_942,
    "edm-cifar10-ddpmpp": 55_733_891,
    "edm-cifar10-ncsnpp": 56_397_827,
    "edm-ffhq64-ddpmpp": 61_805_571,
    "edm-ffhq64-ncsnpp": 62_761_091,
    "edm-imagenet64-adm": 295_899_267,
    "adm-imagenet64": 295_904_454,
    "adm-imagenet128": 421_529_606,
    "adm-imagenet256": 553_838_086,
    "adm-imagenet512": 558_997_638,
    "adm-imagenet64-to-256": 311_795_910,
    "edm2-imagenet64-xs": 124_710_949,
    "edm2-imagenet64-s": 280_209_381,
    "edm2-imagenet64-m": 497_803_173,
    "edm2-imagenet64-l": 777_492_325,
    "edm2-imagenet64-xl": 1_119_276_837,
    "edm2-imagenet512-xxs": 31_309_029,
    "edm2-imagenet512-xs": 124_713_253,
    "edm2-imagenet512-s": 280_212_837,
    "edm2-imagenet512-m": 497_807_781,
    "edm2-imagenet512-l": 777_498_085,
    "edm2-imagenet512-xl": 1_119_283_749,
    "edm2-imagenet512-xxl": 1_523_164_773,
}
VARIATIONS = [  # the same authors' code with other arguments
    ("edm-cifar10-ddpmpp", {"num_classes": 10}, 55_735_299),
    ("edm-cifar10-ddpmpp", {"augment_dim": 0}, 55_732_739),
    ("edm-cifar10-ddpmpp", {"augment_dim": 0, "num_classes": 10}, 55_734_147),
    ("edm-cifar10-ncsnpp", {"num_classes": 10}, 56_400_643),
    ("edm-cifar10-ncsnpp", {"augment_dim": 0}, 56_395_523),
    ("edm-ffhq64-ddpmpp", {"num_classes": 10}, 61_806_979),
    ("adm-imagenet256", {"num_classes": 0}, 552_814_086),
]


def count(name: str, **settings) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **settings).parameters())


@pytest.mark.parametrize(("name", "expected"), COUNTS.items())
def test_a_published_network_has_exactly_the_published_parameters(name, expected):
    assert count(name) == expected


@pytest.mark.parametrize(("name", "settings", "expected"), VARIATIONS)
def test_an_override_of_a_preset_changes_the_count_as_in_the_authors_code(name, settings, expected):
    assert count(name, **settings) == expected


def test_every_published_unet_is_counted():
    unpublished = {"unet-tiny", "edm2-tiny", "unet-cifar10-small", "unet-cifar10", "edm2-cifar10"}
    assert set(COUNTS) == set(CONVOLUTIONAL) - unpublished


def test_a_preset_is_not_changed_by_overriding_it():
    before = dict(PRESETS["unet-tiny"])
    create_model("unet-tiny", model_channels=16, channels_per_head=16)
    assert PRESETS["unet-tiny"] == before


def pseudo_random(model: torch.nn.Module) -> torch.nn.Module:
    """Element j of parameter k becomes √3·(2·|frac(43758.5453·sin(12.9898j + 78.233k + 1))| − 1)/√fan_in."""
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            j = torch.arange(parameter.numel(), dtype=torch.float64)
            value = 2 * torch.frac(torch.sin(j * 12.9898 + k * 78.233 + 1) * 43758.5453).abs() - 1
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_((3**0.5 * value * fan_in**-0.5).reshape(parameter.shape))
    return model.eval()


SMALL_SONG = {"resolution": 16, "num_classes": 10, "augment_dim": 0, "model_channels": 32, "stem_channels": 32}
SMALL_SONG |= {"channel_mult": (2, 2), "num_blocks": 1, "attn_resolutions": (8,), "dropout": 0.0}
SMALL = {"resolution": 16, "num_classes": 10, "model_channels": 64, "channel_mult": (1, 2), "num_blocks": 1}
SMALL |= {"attn_resolutions": (8,), "dropout": 0.0}
OUTPUTS = {  # mean, standard deviation and three elements of what the authors' network gives for the same weights
    "edm-cifar10-ddpmpp": (SMALL_SONG, (0.6075456, 1.4236492, 0.511176, 1.7784705, -1.0875853)),
    "edm-cifar10-ncsnpp": (SMALL_SONG, (-0.8058546, 0.4292369, -0.475345, -0.7621462, -0.8723848)),
    "edm-imagenet64-adm": (SMALL, (-1.2165993, 1.2393359, -1.5016577, 0.3232786, -1.9249178)),
    "edm2-imagenet64-xs": (SMALL, (0.0515523, 0.1884961, 0.0192408, -0.0932415, 0.3404253)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_with_the_same_weights_the_output_is_that_of_the_authors_network(name):
    settings, expected = OUTPUTS[name]
    model = pseudo_random(create_model(name, **settings))
    if "ncsnpp" in name:
        model.embed_noise.frequencies = torch.arange(32) / 32
    if "edm2" in name:
        model.fourier.frequencies = model.fourier.phases = torch.arange(64) / 64
    x = torch.sin(torch.arange(2 * 3 * 16 * 16, dtype=torch.float64) * 0.37).reshape(2, 3, 16, 16).float()
    with torch.no_grad():
        y, _ = model(x, torch.tensor([-3.0, 2.0]), torch.tensor([1, 9]))
    found = torch.stack([y.mean(), y.std(), y[0, 0, 0, 0], y[-1, -1, -1, -1], y[1, 1, 5, 3]])
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
