"""How a run computes: precision, memory format, convolution algorithm, compilation, exactness.

What the settings leave to "auto" follows from the kind of device, the network and the installed libraries, never from
a timing: the same command computes the same results on a busy machine. The choices are part of the run's identity
(`settled`) and are stored in numerics.json in the run's folder, which a resumed run obeys.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import platform
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from diffscale.config.experiment import Experiment
from diffscale.config.factory import build_model
from diffscale.core import storage
from diffscale.core.device import device_name
from diffscale.core.errors import UserError
from diffscale.data import Dataset
from diffscale.distributed.connect import gpus
from diffscale.kernels import compile as native
from diffscale.kernels import group_norm as norm_act
from diffscale.kernels import winograd
from diffscale.kernels.runtime import allow_tf32, exact_on_gpu, why_not_compiled
from diffscale.models import MODELS
from diffscale.models.accelerate import accelerate, winograd_layers
from diffscale.models.edm2 import MPWeight
from diffscale.models.layers import Backbone
from diffscale.training.compile_rules import compiled_from
from diffscale.training.optimizer import is_muon
from diffscale.training.parallel import World

log = logging.getLogger(__name__)

FILE = "numerics.json"
_WITHOUT_BF16 = {"K80", "P4", "P100", "T4", "V100"}  # Ray's names of GPUs older than Ampere

Precision = Literal["bf16", "fp16", "tf32", "fp32"]
ReducePrecision = Literal["bf16", "fp32"]


class Requested(Protocol):
    """The settings that choose the numerics; `experiment.train` has these fields."""

    @property
    def precision(self) -> Precision | Literal["auto"]: ...
    @property
    def channels_last(self) -> bool | Literal["auto"]: ...
    @property
    def compile(self) -> bool | Literal["auto"]: ...
    @property
    def winograd(self) -> bool | Literal["auto"]: ...
    @property
    def exact(self) -> bool: ...
    @property
    def reduce_precision(self) -> ReducePrecision: ...


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The numeric choices of one run, stored in its folder as numerics.json."""

    precision: Precision = "fp32"  # of matrix products; weights stay float32
    channels_last: bool = False  # memory order of images and convolution weights
    compile: bool = False  # torch.compile of each block
    winograd: bool = False  # 3 × 3 convolutions on a CPU with fewer multiplications (kernels/winograd.py)
    exact: bool = True  # on a GPU the same steps give the same weights (kernels/runtime.py)
    reduce_precision: ReducePrecision = "fp32"  # in which several workers send and sum their gradients

    @classmethod
    def load(cls, run_folder: str) -> Numerics | None:
        """Return the stored choices of a run, or None if nothing is stored. Raises UserError for an invalid file."""
        stored = _read(run_folder)
        return None if stored is None else stored.numerics

    def save(self, run_folder: str, machine: dict[str, Any], *, bit_identical: bool = True) -> None:
        """Store the choices in a run's folder.

        machine: `machine_facts` of the launch
        bit_identical: whether all launches so far had the same facts
        """
        content = {"numerics": dataclasses.asdict(self), "bit_identical": bit_identical, **machine}
        storage.write_bytes(storage.join(run_folder, FILE), json.dumps(content).encode())

    def autocast(self, device: torch.device | str, sharded: bool = False) -> AbstractContextManager[Any]:
        """Return the context of a forward pass on a device.

        sharded: the weights are FSDP2's. They are gathered anew for each pass, and a second pass that takes autocast's
            cached casts of the first one, as with self-conditioning, sends its gradients past FSDP2: they arrive a step
            late or never. So nothing is cached.
        """
        if self.precision in ("fp32", "tf32"):
            return nullcontext()
        low = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(torch.device(device).type, dtype=low, cache_enabled=not sharded)

    @property
    def products(self) -> torch.dtype:
        """Return the dtype of matrix products. With fp16 it is bf16: Muon, which takes it too, needs the range."""
        return torch.float32 if self.precision in ("fp32", "tf32") else torch.bfloat16

    @property
    def reduced_in(self) -> torch.dtype:
        """Return the dtype in which gradients are summed over workers."""
        return torch.bfloat16 if self.reduce_precision == "bf16" else torch.float32

    def prepare(self, model: nn.Module, *, to_shard: bool = False) -> nn.Module:
        """Set up a model, in place, to compute with these choices, and return it.

        TF32 and exactness are chosen for the whole process: the model prepared last decides.

        to_shard: whether FSDP2 will shard the model. Its weights then stay contiguous, as FSDP2 needs them, and only
            the images carry the memory order. Blocks are compiled before they are sharded.
        """
        device = next(model.parameters()).device
        allow_tf32(self.precision == "tf32")
        if device.type == "cuda":
            exact_on_gpu(self.exact)
        if not to_shard:
            model.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        accelerate(model, winograd=self.winograd)
        if self.compile:
            for kernel in self._kernels(device):
                native.available(kernel)  # compiled before torch.compile traces the call
            compile_blocks(model)
        return model

    def _kernels(self, device: torch.device) -> list[str]:
        """Return the C++ sources that a model on a device may call."""
        if device.type != "cpu":
            return []
        products = winograd.BFLOAT16 if self.precision == "bf16" else winograd.FLOAT32
        return [norm_act.KERNEL, products.name] if self.winograd else [norm_act.KERNEL]

    def order(self, images: Tensor) -> Tensor:
        """Return images (B, C, H, W) in the chosen memory order."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images.contiguous()


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block of a backbone, in place, or the whole of another network.

    Equal blocks are compiled once, so 28 blocks take the time of one. Between two compiled blocks the gradients of the
    later one are complete, so their sum over the workers begins while the backward pass goes on.

    backend: of torch.compile
    """
    from torch._dynamo import config  # import cost

    blocks = model.blocks_for_fsdp() if isinstance(model, Backbone) else [model]
    # All blocks share one limit, and each shape of a UNet's is a compilation, in training, in sampling and by batch.
    config.recompile_limit = max(config.recompile_limit, 8 * len(blocks))
    for block in blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)


def choose_numerics(
    model: nn.Module, device_type: str, requested: Requested, bf16: bool | None = None, gpu: str = ""
) -> Numerics:
    """Replace every "auto" of `requested` according to the rule.

    model: on any device, the meta device too; it is not changed
    device_type: cpu or cuda
    bf16: whether the device multiplies bf16; None for this machine's device
    gpu: name of the GPU; empty for any
    """
    if bf16 is None:
        bf16 = multiplies_bf16(device_type)
    precision = requested.precision
    if precision == "auto":
        precision = "bf16" if bf16 else "fp32"
    convolves = any(is_spatial_convolution(module) for module in model.modules())
    use_winograd = requested.winograd
    if use_winograd == "auto":
        layers = next(winograd_layers(model), None)
        open_to_it = requested.channels_last == "auto" and layers is not None
        use_winograd = open_to_it and winograd_available(precision, device_type)
    channels_last = requested.channels_last
    if channels_last == "auto":
        # Channels-last pays on a GPU's tensor cores; on a CPU only where group norm has a kernel for it.
        fast = native.available(norm_act.KERNEL) if device_type == "cpu" else precision != "fp32"
        channels_last = convolves and fast
    compiled = requested.compile
    if compiled == "auto":
        compiled = device_type == "cuda" and _pays_to_compile(model, gpu)
    return Numerics(precision, channels_last, compiled, use_winograd, requested.exact, requested.reduce_precision)


def _pays_to_compile(model: nn.Module, gpu: str) -> bool:
    backbone = next((name for name, kind in MODELS.items() if isinstance(model, kind)), "")
    least, size = compiled_from(gpu, backbone), sum(parameter.numel() for parameter in model.parameters())
    return least is not None and size >= least and importlib.util.find_spec("triton") is not None


def is_spatial_convolution(module: nn.Module) -> bool:
    """Return whether a module convolves with overlapping windows; a patch embedding is a linear layer."""
    if isinstance(module, MPWeight):
        return module.padding > 0
    return isinstance(module, nn.Conv2d) and any(k > s for k, s in zip(module.kernel_size, module.stride, strict=True))


def winograd_available(precision: str, device_type: str) -> bool:
    """Return whether this machine can compile and run Winograd's kernels for a precision."""
    kernels = {"fp32": winograd.FLOAT32, "bf16": winograd.BFLOAT16}.get(precision)
    return device_type == "cpu" and kernels is not None and kernels.available


def refuse_missing_winograd(precision: str, device: torch.device) -> None:
    """Raise UserError unless this machine has Winograd's kernels for a precision."""
    if not winograd_available(precision, device.type):
        raise UserError(
            setting="train.winograd",
            value=True,
            expected="false or auto on this machine",
            reason=f"Winograd's kernels need a CPU and a C++ compiler; this is {device_name(device)} with "
            f"train.precision={precision}",
            fix="train.winograd=auto",
        )


def multiplies_bf16(device_type: str) -> bool:
    """Return whether this machine's processor, or its first GPU, has instructions for bf16 products.

    A processor without them emulates bf16 at a fiftieth of its float32 speed.
    """
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if platform.machine() in ("aarch64", "arm64"):
        features = Path("/proc/cpuinfo")
        return features.exists() and " bf16" in features.read_text(errors="replace")
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---- one run


def settled(experiment: Experiment, dataset: Dataset) -> Experiment:
    """Return the experiment with every "auto" of its numerics replaced, so that its run_id says how it computes.

    Runs begun when "auto" was measured at the start keep "auto": their folder holds what was chosen.
    """
    train = experiment.train
    if "auto" not in (train.precision, train.compile, train.channels_last, train.winograd):
        return experiment
    if storage.exists(storage.join(experiment.run_folder(dataset.content_hash), FILE)):
        return experiment
    bf16 = None
    found = gpus() if uses_gpu(experiment) else None
    if found is not None:
        bf16 = _WITHOUT_BF16.isdisjoint(word for name in found for word in re.split("[ -]", name))
    with torch.device("meta"):
        model = build_model(experiment, dataset)
    chosen = choose_numerics(model, "cpu" if found is None else "cuda", train, bf16, found[0] if found else "")
    return experiment.model_copy(update={"train": train.model_copy(update=dataclasses.asdict(chosen))})


def uses_gpu(experiment: Experiment) -> bool:
    """Return whether the workers use GPUs: train.gpu, where "auto" means that the cluster has one."""
    wanted = experiment.train.gpu
    return bool(gpus()) if wanted == "auto" else bool(wanted)


def settle_numerics(experiment: Experiment, run_folder: str, dataset: Dataset, world: World) -> tuple[Numerics, bool]:
    """Return a run's numerics and whether its results are bit-identical to an uninterrupted run's.

    The stored numerics.json decides, else the settings, which are stored now. A run resumed on another kind of device,
    or without the compiled kernels it began with, continues but is not bit-identical. Raises UserError for Winograd's
    convolutions where this machine has none.
    """
    stored = _read(run_folder)
    chosen = stored.numerics if stored is not None else _of_settings(settled(experiment, dataset))
    now = machine_facts(experiment, world, chosen.products)
    if stored is not None:
        changed = [key for key, value in now.items() if stored.machine.get(key, value) != value]
        if changed:
            before = ", ".join(f"{key} {stored.machine[key]}" for key in changed)
            after = ", ".join(f"{key} {now[key]}" for key in changed)
            log.warning("resumed with %s after starting with %s: results will not be bit-identical", after, before)
            stored.numerics.save(run_folder, now, bit_identical=False)
        return stored.numerics, stored.bit_identical and not changed
    if chosen.winograd:
        refuse_missing_winograd(chosen.precision, world.device)
    repeatable = chosen.exact or world.device.type == "cpu"
    chosen.save(run_folder, now, bit_identical=repeatable)
    return chosen, repeatable


def _of_settings(experiment: Experiment) -> Numerics:
    return Numerics(*(getattr(experiment.train, field.name) for field in dataclasses.fields(Numerics)))


def usable(numerics: Numerics, world: World) -> Numerics:
    """Return a run's numerics without compilation if a worker cannot compile, which is said once. A collective call."""
    if not numerics.compile:
        return numerics
    reason = next(filter(None, world.gather(why_not_compiled(world.device.type))), "")
    if not reason:
        return numerics
    if world.rank == 0:
        log.warning("the run is not compiled, and not bit-identical to one that is: %s", reason)
    return dataclasses.replace(numerics, compile=False)


def machine_facts(experiment: Experiment, world: World, products: torch.dtype) -> dict[str, Any]:
    """Return what a run's results depend on to the bit besides its numerics.

    device: name of the device
    kernels: whether the compiled kernel of group norm is available
    update: "device" where a step rounds otherwise than in files without the key, which are of earlier versions: on CUDA
        the learning rate is float32, sharded weights have the fused optimizer, and three workers or more sum other
        buckets; else "host"
    muon: dtype of Muon's products, where the run has it; bf16 in files of earlier versions

    products: dtype of the run's matrix products
    """
    sharded = experiment.train.sharded and world.size > 1
    facts = {
        "device": device_name(world.device),
        "kernels": native.available(norm_act.KERNEL),
        "update": "device" if world.device.type == "cuda" or sharded or world.size > 2 else "host",
    }
    return facts | ({"muon": str(products)} if is_muon(experiment.optim.name) else {})


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The content of numerics.json."""

    numerics: Numerics
    bit_identical: bool
    machine: dict[str, Any]  # `machine_facts`; kernels is missing in files of earlier versions


def _read(run_folder: str) -> _Stored | None:
    uri = storage.join(run_folder, FILE)
    if not run_folder or not storage.exists(uri):
        return None
    try:
        content = json.loads(storage.read_bytes(uri))
        keys = "device", "kernels", "update", "muon"
        earlier = {"update": "host", "muon": str(torch.bfloat16)}
        machine = earlier | {key: content[key] for key in keys if key in content}
        return _Stored(Numerics(**content["numerics"]), bool(content.get("bit_identical", True)), machine)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            setting="RUN", value=uri, expected="the numerics that training wrote", reason=str(error)
        ) from None
