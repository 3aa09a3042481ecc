"""Numbers that depend on (seed, stream, position) alone."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from diffscale.core.keyed_random import Stream, at_step, normal, philox, stratified_uniform, uniform

# Random123's own known-answer file, tests/kat_vectors, philox4x32-10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_sample_depends_on_its_position_and_on_nothing_else(draw):
    positions = torch.arange(200) + 2**33  # beyond 32 bits, and more numbers than are worked on at a time
    together = draw(7, Stream.NOISE, positions, (3, 16, 16))
    order = torch.randperm(200)
    assert torch.equal(draw(7, Stream.NOISE, positions[order], (3, 16, 16)), together[order])
    assert torch.equal(draw(7, Stream.NOISE, positions[31:32], (3, 16, 16))[0], together[31])


def test_seeds_streams_steps_and_positions_are_independent():
    positions = torch.arange(64)
    draws = [
        normal(seed, stream, positions + shift, (1000,)).flatten()
        for seed in (0, 1, 2**32)
        for stream in (Stream.NOISE, Stream.SAMPLE_CHURN, at_step(Stream.NOISE, 0), at_step(Stream.NOISE, 1))
        for shift in (0, 64, 2**32)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 6 / 64_000**0.5


def test_normal_is_unit_normal_into_its_tails():
    x = normal(3, Stream.NOISE, torch.arange(500), (999,)).flatten().numpy()
    assert stats.kstest(x, "norm").pvalue > 0.01
    assert abs(stats.kurtosis(x)) < 0.02
    assert 4.3 < abs(x).max() < 6.7


def test_uniform_is_uniform_and_never_zero_or_one():
    x = uniform(3, Stream.FLIP, torch.arange(500), (999,)).flatten()
    assert stats.kstest(x.numpy(), "uniform").pvalue > 0.01
    assert x.min() > 0
    assert x.max() < 1
    assert torch.equal(x, ((x * 2**24).round()) / 2**24)  # exact multiples: the same on every device


def test_one_number_for_each_position_needs_no_shape():
    assert uniform(0, Stream.FLIP, torch.arange(5)).shape == (5,)


@pytest.mark.parametrize("batch", [1, 7, 64, 100, 256])
def test_noise_levels_are_spread_evenly_over_every_global_batch(batch):
    u = stratified_uniform(5, torch.arange(3 * batch), batch).reshape(3, batch)
    for row in u.sort(dim=1).values:
        gaps = torch.cat([row, row[:1] + 1]).diff()
        torch.testing.assert_close(gaps, torch.full((batch,), 1 / batch), rtol=0, atol=1e-6)
    assert len(u[:, 0].unique()) == 3  # every batch has its own offset


def test_any_share_of_the_global_batch_gives_the_same_noise_levels():
    whole = stratified_uniform(5, torch.arange(1000, 1256), 128)
    assert torch.equal(stratified_uniform(5, torch.arange(1100, 1117), 128), whole[100:117])


def test_a_workers_part_of_the_batch_is_spread_evenly_too():
    u = stratified_uniform(5, torch.arange(256), 256)
    for part in u.reshape(4, 64):
        gaps = part.sort().values.diff()
        assert gaps.max() < 3 / 64


def test_each_noise_level_alone_is_uniform():
    u = stratified_uniform(9, torch.arange(0, 64 * 4000, 64) + 13, 64)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(ValueError, match="seed = -1"):
        uniform(-1, Stream.FLIP, torch.arange(2))
    with pytest.raises(ValueError, match="global_batch = 0"):
        stratified_uniform(0, torch.arange(2), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree():
    positions = torch.arange(64) + 2**40
    assert torch.equal(uniform(1, 2, positions, (999,)), uniform(1, 2, positions.cuda(), (999,)).cpu())
    difference = (normal(1, 2, positions, (999,)) - normal(1, 2, positions.cuda(), (999,)).cpu()).abs()
    assert difference.max() < 5e-7
    assert (difference > 0).sum() < 10
