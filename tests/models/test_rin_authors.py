"""RIN against its authors' TensorFlow code: outputs, gradients and guided samples for the same weights.

`rin_authors.safetensors` holds small random weights under our names and what github.com/google-research/pix2seq at
commit eabd4e98f65f7627a0e727d11a4b9cbba916283d computes with them: `architectures/tape.py: ImageTapeDenoiser` (two
blocks, three classes, 8 pixels; under `conv/` with a depthwise convolution of side 3) and `models/diffusion_utils.py:
Scheduler`. A script outside this repository wrote it on 2026-11-29 with TensorFlow and tf_keras 2.21, float32 on a CPU:

    TF_USE_LEGACY_KERAS=1 python make_rin_fixture.py PIX2SEQ OUT

It sets every variable to N(0, 1/fan_in) (vectors to N(0, 0.3²), gains around 1), copies it to our layout (kernels
transposed, keys before values, the sinusoid's halves swapped) and stores the gradients of sum(prediction · cotangent).
tensorflow_addons has no version for this TensorFlow: Keras's group normalisation of the same epsilon stands in.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffscale.diffusion import SOLVERS, Guidance, create_diffusion, sample
from diffscale.models.rin import RIN

SIZES = {"resolution": 8, "num_classes": 3, "patch_size": 4, "interface_width": 16, "latents": 5, "latent_width": 8}
SIZES |= {"latent_mlp_ratio": 2, "num_blocks": 2, "layers": 1, "latent_heads": 2, "rw_heads": 2}


@pytest.fixture(scope="module")
def authors() -> dict[str, Tensor]:
    return load_file(Path(__file__).parent / "rin_authors.safetensors")


def network(authors: dict[str, Tensor], kind: str = "", **settings: int) -> RIN:
    model = RIN(**SIZES, **settings).eval()  # type: ignore[arg-type]
    prefix = f"{kind}weights/"
    model.load_state_dict({name.removeprefix(prefix): x for name, x in authors.items() if name.startswith(prefix)})
    return model


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.norm())


@pytest.mark.parametrize(("kind", "settings"), [("", {}), ("conv/", {"tile_conv": 3})], ids=["plain", "convolution"])
def test_outputs_and_gradients_are_those_of_the_authors_code(
    authors: dict[str, Tensor], kind: str, settings: dict[str, int]
) -> None:
    model = network(authors, kind, **settings)
    x, state = authors["x"].clone().requires_grad_(), authors["state"].clone().requires_grad_()
    prediction, latents = model(x, torch.logit(authors["gamma"].double()).float(), authors["label"], state)
    assert distance(prediction, authors[f"{kind}prediction"]) < 3e-6
    assert latents is not None
    assert distance(latents, authors[f"{kind}latents"]) < 3e-6
    (prediction * authors["cotangent"]).sum().backward()
    assert x.grad is not None
    assert state.grad is not None
    assert distance(x.grad, authors[f"{kind}dx"]) < 3e-6
    assert distance(state.grad, authors[f"{kind}dstate"]) < 3e-6
    for name, parameter in model.named_parameters():
        expected = authors[f"{kind}gradients/{name}"]
        assert parameter.grad is not None
        # A key's bias moves all logits of a query alike, so its gradient is rounding.
        assert float((parameter.grad - expected).norm()) < 1e-5 * max(float(expected.norm()), 1.0), name


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_samples_are_those_of_the_authors_code_with_and_without_guidance(
    authors: dict[str, Tensor], scale: float
) -> None:
    """8 steps of DDIM on their cosine schedule. With guidance both passes see the labelled pass's latents."""
    diffusion = create_diffusion(
        schedule={"name": "offset_cosine_gamma"}, prediction="eps", weighting={"name": "uniform_eps"}
    )
    found = sample(
        diffusion,
        network(authors),
        authors["x"],
        solver=SOLVERS["ddim"](steps=8, grid="offset_cosine", clip="static"),
        label=torch.tensor([1, 2]),
        guidance=Guidance(scale, state="shared"),
    )
    assert distance(found, authors[f"ddim/{scale}"]) < 2e-5
