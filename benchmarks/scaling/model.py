"""Scaling cost from two counts, bytes moved and FLOPs computed per step: a model simple enough to check by hand.

A step on one device takes compute = FLOPs / rate; communication takes bytes / bandwidth + latency · hops, of which
what overlaps the backward pass (two thirds of compute) costs nothing. Ring collectives over n devices move
2(n−1)/n of the gradients' bytes (all-reduce), (n−1)/n of the parameters' or gradients' (all-gather, reduce-scatter).
"""

from __future__ import annotations

from typing import NamedTuple

BACKWARD_SHARE = 2 / 3


class Link(NamedTuple):
    """bandwidth: bytes/s that one device sends in a ring; latency: seconds of one hop; node: devices that share it."""

    bandwidth: float
    latency: float
    node: int
    bandwidth_between: float  # bytes/s for each device, between nodes


def bytes_per_step(parameters: int, devices: int, parallel: str) -> float:
    """Return the bytes that each device sends in a step.

    parallel: "ddp", one all-reduce of float32 gradients, or "fsdp2", parameters in bf16 gathered for the forward and
    again for the backward pass and float32 gradients scattered
    """
    share = (devices - 1) / devices
    return 2 * share * 4 * parameters if parallel == "ddp" else share * (2 * 2 + 4) * parameters


def efficiency(
    parameters: int,
    flops_per_image: float,
    images_per_device: float,
    devices: int,
    rate: float,
    link: Link,
    parallel: str = "ddp",
    overlap: float = 1.0,
) -> float:
    """Throughput of n devices over n times that of one, with equally many images on each (weak scaling), 0 to 1.

    rate: FLOP/s that a device reaches in training. overlap: share of the backward pass that communication can use.
    """
    if devices == 1:
        return 1.0
    compute = flops_per_image * images_per_device / rate
    bandwidth = link.bandwidth if devices <= link.node else min(link.bandwidth, link.bandwidth_between)
    hops = 2 * (devices - 1) if parallel == "ddp" else 3 * (devices - 1)
    communication = bytes_per_step(parameters, devices, parallel) / bandwidth + hops * link.latency
    exposed = max(0.0, communication - overlap * BACKWARD_SHARE * compute)
    return compute / (compute + exposed)
