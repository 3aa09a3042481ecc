"""Denoising by recorded work: on a GPU a CUDA graph, here a recorder that repeats it into the same tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffscale.diffusion import SOLVERS, CapturedDenoiser, Guidance, create_diffusion, keyed_noise, sample
from diffscale.diffusion.denoiser import Denoised, GuidedDenoiser, denoise_with_share
from diffscale.kernels.cuda_graph import Outputs, Run
from diffscale.models import create_model

DIFFUSION = create_diffusion()


def record(run: Run) -> tuple[Callable[[], None], Outputs]:
    """Keep a CUDA graph's rules: inputs are read, and outputs written, at the addresses of the recording."""
    outputs = run()

    def replay() -> None:
        for kept, new in zip(outputs, run(), strict=True):
            if kept is not None:
                kept.copy_(new)

    return replay, outputs


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=3).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def drawn(model: torch.nn.Module, guidance: Guidance, **options: object) -> Tensor:
    positions = torch.arange(4)
    noise = keyed_noise(0, positions, (3, 32, 32))(0)
    label = torch.tensor([0, 1, 2, 3])
    solver = SOLVERS["dpmpp_2m"](steps=4)
    return sample(DIFFUSION, model, noise, solver=solver, label=label, guidance=guidance, **options)


@pytest.mark.parametrize(("name", "graphs"), [("dit-mini", 1), ("rin-tiny", 2)])
def test_recorded_denoising_gives_the_same_samples_also_after_the_weights_change(name, graphs):
    """A network that carries state is recorded without it, for the first step, and with it."""
    model, captured = network(name), CapturedDenoiser(record)
    for _ in range(2):
        plain, recorded = drawn(model, Guidance()), drawn(model, Guidance(), estimate=captured)
        assert torch.equal(plain, recorded)
        for parameter in model.parameters():
            parameter *= 0.9
    assert len(captured.graphs) == graphs


def test_what_cannot_be_recorded_is_computed_eagerly_and_said_once(caplog: pytest.LogCaptureFixture):
    def refuse(run: Run) -> tuple[Callable[[], None], Outputs]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = network("dit-mini")
    with caplog.at_level(logging.WARNING):
        got = drawn(model, Guidance(), estimate=CapturedDenoiser(refuse))
    assert torch.equal(got, drawn(model, Guidance()))
    assert [r.getMessage() for r in caplog.records] == [
        "sampling goes on without CUDA graphs: operation not permitted when stream is capturing"
    ]


def test_without_a_gpu_nothing_is_recorded():
    captured = CapturedDenoiser()
    drawn(network("dit-mini"), Guidance(), estimate=captured)
    assert captured.graphs == {}


@pytest.mark.parametrize("name", ["dit-mini", "rin-tiny"])
@pytest.mark.parametrize("interval", [None, (-4.0, 2.0)])
@pytest.mark.parametrize("state", ["own", "shared"])
def test_guidance_in_one_pass_is_that_of_two(name, interval, state):
    """An interval that begins later leaves a network with state in only one of its two passes: that step takes two."""
    model, label = network(name), torch.tensor([0, 1, 2, 3])
    passes: list[int] = []

    def counted(*arguments: object, **extra: object) -> Denoised:
        passes.append(len(arguments[2]))  # type: ignore[arg-type]
        return denoise_with_share(*arguments, **extra)  # type: ignore[arg-type]

    guidance = Guidance(2.0, interval, state=state)
    guided = [GuidedDenoiser(DIFFUSION, model, label, guidance, {}, counted, t) for t in (False, True)]
    z = keyed_noise(0, torch.arange(4), (3, 32, 32))(0)
    for logsnr in (-8.0, -3.0, 1.0, 4.0):
        two, one = (g(z, logsnr) for g in guided)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert 8 in passes
