"""The request that a command line states: dataset, compute, and settings of the search or of its runs."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError

from diffscale.config.load import explain
from diffscale.core.device import matmul_rate
from diffscale.core.errors import UserError
from diffscale.distributed.connect import gpus
from diffscale.recommendation.request import Request

ABOUT_RUNS = ("storage", "data", "model", "diffusion", "optim", "train", "eval")


def make_request(
    dataset: str,
    settings: dict[str, Any],
    *,
    flops: float | None = None,
    hours: float | None = None,
    devices: int | None = None,
    mfu: float = 0.3,
    device_flops: float | None = None,
    price: float | None = None,
) -> Request:
    """Return the request. Raises UserError for a compute that is stated twice or not at all, and for wrong settings.

    settings: tree of the keys of a Request and of the runs' sections
    flops: the compute, or else hours of `devices` at `mfu` times `device_flops`
    price: of a device-hour
    """
    compute = _compute(flops, hours, devices, mfu, device_flops)
    of_runs = {key: value for key, value in settings.items() if key in ABOUT_RUNS}
    of_search = {key: value for key, value in settings.items() if key not in ABOUT_RUNS}
    for key in ("flops", "overrides"):
        if key in of_search:
            raise UserError(
                setting=key, value=of_search[key], expected="nothing here", fix="--flops states the compute"
            )
    dotted = _dotted(of_runs) | {"data.path": dataset}
    for key in ("train.flops", "train.images", "train.device_seconds", "model", "optim.lr"):
        given = next((k for k in dotted if k == key or k.startswith(f"{key}.")), None)
        if given is not None:
            fix = (
                "backbones=[unet,dit]"
                if key == "model"
                else "learning_rates=[1e-3]"
                if key == "optim.lr"
                else "--flops"
            )
            raise UserError(setting=given, value=dotted[given], expected="nothing: the search decides it", fix=fix)
    if price is not None:
        dotted["train.price_per_device_hour"] = price
    tree = of_search | {"flops": compute, "overrides": dotted}
    try:
        return Request.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Request, tree) from None


def _compute(
    flops: float | None, hours: float | None, devices: int | None, mfu: float, device_flops: float | None
) -> float:
    if flops is not None and hours is not None:
        raise UserError(
            setting="--hours",
            value=hours,
            expected="--flops or --hours, not both",
            reason="they state the compute twice",
        )
    if flops is None and hours is None:
        raise UserError(setting="--flops", value=None, expected="the compute: --flops C, or --hours H --devices N")
    if flops is not None:
        if devices is not None:
            raise UserError(setting="--devices", value=devices, expected="--hours with it, in place of --flops")
        return flops
    assert hours is not None
    for name, value, most in (("--hours", hours, 1e6), ("--mfu", mfu, 1.0), ("--devices", devices or 1, 1e6)):
        if not 0 < value <= most:
            raise UserError(setting=name, value=value, expected=f"above 0, at most {most:g}")
    found = len(gpus())
    if device_flops is None and devices is not None and devices > max(found, 1):
        raise UserError(
            setting="--devices",
            value=devices,
            expected=f"at most {max(found, 1)}, those of this machine, or --device-flops of the devices elsewhere",
            fix="--device-flops 989e12 for an H200 in bf16",
        )
    rate = device_flops or matmul_rate(torch.device("cuda" if found else "cpu"), "bf16" if found else "fp32")
    return hours * 3600 * (devices or max(found, 1)) * mfu * rate


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
