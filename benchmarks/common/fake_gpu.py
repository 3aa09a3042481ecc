"""A GPU that is not there: counts what PyTorch would launch on an H200, on any Linux machine with a C compiler.

FakeTensorMode computes shapes without data, and a CUDA runtime that does nothing (fake_cuda_runtime.c, preloaded) says
that one H200 is there. Dispatch, autocast, the choice of attention kernels and Inductor's code for CUDA are then those
of the real device. Counts are exact for the installed torch; nothing is executed, so there are no times.

    subprocess.run([sys.executable, "-m", ...], env=environment())      # in whose process torch sees the H200
    with fake_tensors() as mode: to_fake(model, mode); ...
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffscale.core.cache import cache_dir
from diffscale.core.hashing import sha256_of

DEVICE = torch.device("cuda:0")
MARK = "DIFFSCALE_FAKE_GPU"
SOURCE = Path(__file__).with_name("fake_cuda_runtime.c")

# Operations that launch nothing, besides views.
_FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "lift_fresh",
    "is_same_size",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "set_",
    "resize_",
    "is_pinned",
    "_pin_memory",
    "record_stream",
}


# ---- the process


def unavailable() -> str:
    """Return why this machine cannot pretend to have a GPU; empty if it can."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        return "needs Linux and gcc"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "" if _headers() is not None else "needs triton, for CUDA's headers"


def environment() -> dict[str, str]:
    """Build the libraries once and return the environment of a process in which torch sees one H200."""
    headers = _headers()
    assert headers is not None, unavailable()
    declared = re.findall(r"\b(cu[A-Z]\w+)\s*\(", (headers / "cuda.h").read_text(errors="replace"))
    names = sorted({name + version for name in declared for version in ("", "_v2", "_v3")})
    driver = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names)
    key = sha256_of(SOURCE.read_bytes() + driver.encode() + str(headers).encode())[:16]
    folder = cache_dir() / f"fake-gpu-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    runtime, cuda = folder / "libfake_cuda_runtime.so", folder / "libcuda.so.1"
    if not runtime.exists():
        _compile(SOURCE.read_text(), runtime, f"-I{headers}")
    if not cuda.exists():
        _compile(driver, cuda)
    return {
        **os.environ,
        MARK: "1",
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def _headers() -> Path | None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    return folder if (folder / "cuda_runtime_api.h").exists() else None


def _compile(source: str, target: Path, *flags: str) -> None:
    scratch = target.with_suffix(f".{os.getpid()}")
    command = ["gcc", "-shared", "-fPIC", "-w", "-O1", *flags, "-x", "c", "-", "-o", str(scratch)]
    subprocess.run(command, input=source.encode(), check=True, timeout=120)
    scratch.replace(target)


# ---- within it


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Context in which tensors made on `DEVICE` have a shape and no data. Only in a process of `environment`."""
    assert os.environ.get(MARK), "start this process with fake_gpu.environment()"
    import torch.amp.autocast_mode as autocast  # import cost
    import torch.cuda.amp.common as amp  # import cost

    for module in (autocast, amp):
        if hasattr(module, "amp_definitely_not_available"):
            module.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def to_fake(model: nn.Module, mode: FakeTensorMode, channels_last: bool = False) -> nn.Module:
    """Replace a model's parameters and buffers by fake ones on `DEVICE`, in place. Build it on the meta device."""

    def fake(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to("meta")
        if channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return FakeTensor(mode, tensor, DEVICE)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel, by phase, and host reads: copies that wait for the device.

    An operation on a list of tensors counts once. The phase of an operation is `backward` within autograd, otherwise
    what `phases` says of the innermost function that it knows, up to the first one of diffscale.

    counts: launches by (phase, operation)
    casts: copies to another dtype, by phase
    reads: host reads by place, "training/learner.py:182"
    flops: of matrix products, convolutions and attention, by the dtype of their first input
    """

    def __init__(self, phases: dict[str, str], default: str = "forward") -> None:
        """Begin counting on entry.

        phases: part of a function's place ("core/keyed_random", "learner.py:_finish") → name of the phase
        default: phase of all other functions of diffscale
        """
        super().__init__()
        self.phases, self.default = phases, default
        self.counts: Counter[tuple[str, str]] = Counter()
        self.casts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.flops: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            if args[0].device.type == "cuda":
                self.reads[f"item in {self._place()}"] += 1
            return 1
        if name.startswith("_fused_adam"):  # it returns nothing, and with a tensor as learning rate has no fake version
            self._count(name, args, kwargs or {}, None)
            return None
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if (
            name in _FREE
            or view
            or func._schema.name.startswith("prim")
            or all(t.device.type != "cuda" for t in tensors)
        ):
            return out
        self._count(name, args, kwargs or {}, out)
        if func._overloadpacket in flop_registry:
            self.flops[args[0].dtype] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        phase = self._phase()
        self.counts[phase, name] += 1
        if name not in ("_to_copy", "copy_"):
            if name in ("nonzero", "masked_select", "unique_dim", "_unique2"):
                self.reads[f"{name} in {self._place()}"] += 1
            return
        source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if source.device.type != target.device.type:
            if waits:
                self.reads[f"{source.device.type} to {target.device.type} in {self._place()}"] += 1
        elif source.dtype != target.dtype and name == "_to_copy":
            self.casts[phase] += 1

    def total(self, phase: str | None = None) -> int:
        """Return the launches of a phase, or of all."""
        return sum(count for (where, _), count in self.counts.items() if phase in (None, where))

    def attention(self) -> dict[str, int]:
        """Return the calls of each kernel of attention in forward passes; "unfused" are products and a softmax."""
        calls: Counter[str] = Counter()
        for (phase, name), n in self.counts.items():
            if phase != "backward" and name.startswith("_scaled_dot_product"):
                calls[name.split("_")[4]] += n
            elif phase != "backward" and name in ("_softmax", "_safe_softmax"):
                calls["unfused"] += n
        return dict(calls)

    def _phase(self) -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            place = f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
            if "torch/autograd/graph.py" in place:
                break
            for part, phase in self.phases.items():
                if part in place:
                    return phase
            if "/diffscale/" in place:
                return self.default
            frame = frame.f_back
        return "backward"  # autograd's own thread, whose stack is empty

    def _place(self) -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if "/diffscale/" in file:
                return f"{file.rpartition('/diffscale/')[2]}:{frame.f_lineno}"
            frame = frame.f_back
        return "torch"
