"""Projections of published networks on 8, 64 and 1,024 GPUs; nothing in them was measured.

The rates of the GPU and of its links are the manufacturer's, times the shares named in the columns as assumed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.scaling.model import Link, bytes_per_step, efficiency
from diffscale.models import PRESETS, create_model
from diffscale.models.cost import count_cost

PEAK = 989e12  # FLOP/s of an H100 SXM in bf16, dense, by its data sheet
MFU = 0.4  # assumed share of it in training
# NVLink 4: 450 GB/s a direction, of which rings reach some 80 %; one 400 Gb/s adapter for each GPU between nodes.
H100 = Link(bandwidth=360e9, latency=5e-6, node=8, bandwidth_between=45e9)
DEVICES = (8, 64, 1024)
GLOBAL_BATCH = 2048
PROJECTED = (
    "edm-cifar10-ddpmpp",
    "adm-imagenet64",
    "edm2-imagenet64-s",
    "edm2-imagenet512-xxl",
    "uvit-imagenet256",
    "rin-imagenet64",
    "dit-s-2",
    "dit-xl-2",
    "jit-b-16",
    "hdit-imagenet128",
)


def projected() -> list[dict[str, Any]]:
    """Return the efficiency of a global batch of 2,048 that the devices share.

    It is relative to the same number of devices without communication. This is strong scaling: the batch of each
    device shrinks with their number.
    """
    rows = []
    for name in PROJECTED:
        settings = PRESETS[name]
        given = {k: v for k, v in settings.items() if k != "name"}
        resolution, channels = given["resolution"], given.get("channels", 3)
        model = lambda s=settings, g=given: create_model(s["name"], **g)  # noqa: E731
        cost = count_cost(model, resolution, channels, given.get("num_classes", 0))
        for devices in DEVICES:
            images = GLOBAL_BATCH / devices
            for parallel in ("ddp", "fsdp2"):
                value = efficiency(
                    cost.parameters, cost.flops_per_image, images, devices, PEAK * MFU, H100, parallel, overlap=0.8
                )
                rows.append(
                    {
                        "preset": name,
                        "devices": devices,
                        "parallel": parallel,
                        "images_per_device": images,
                        "parameters": cost.parameters,
                        "flops_per_image": cost.flops_per_image,
                        "flops_per_step_and_device": cost.flops_per_image * images,
                        "bytes_per_step_and_device": bytes_per_step(cost.parameters, devices, parallel),
                        "efficiency": round(value, 4),
                        "kind": "projected",
                        "assumed_mfu": MFU,
                        "assumed_overlap": 0.8,
                    }
                )
    return rows
