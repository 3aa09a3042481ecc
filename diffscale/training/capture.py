"""Records the kernels of a step once and launches them together afterwards (CUDA graphs).

A small network needs less time to compute than its host needs to launch its thousand kernels. A recorded step is two
launches, and computes what the kernels computed one by one: the same kernels on the same memory. So the first steps of
a run, which are launched one by one until every library has set itself up, and the recorded ones are the same
computation, and a run is the same with and without recording.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from diffscale.config.experiment import Experiment
from diffscale.training.parallel import World

log = logging.getLogger(__name__)

WARM_UP = 3  # calls before a recording, in which libraries choose algorithms and allocate workspaces

Function = Callable[..., None]


class Recorder(Protocol):
    """What records functions: `CudaGraphs`, or in tests something that repeats them."""

    def stream(self) -> Any:
        """Return the context in which functions run, recorded or not."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call a function without computing anything, and return what computes it."""


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A stream of its own, also before the recording: autograd remembers the stream of a weight's first use."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # The loader's thread allocates meanwhile, which is an error in the default mode.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Capture:
    """Recorded functions, or plain ones without a recorder or after a recording has failed.

    A function takes options, which are hashable, and tensors by name. It changes nothing but tensors that exist before
    its first call, reads nothing from the device, and returns nothing.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        self._calls: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, tuple[dict[str, Tensor], Callable[[], None]]] = {}

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Context of all calls of a step."""
        if self._recorder is None:
            yield
        else:
            with self._recorder.stream():
                yield

    def call(self, function: Function, *options: Hashable, **tensors: Tensor) -> None:
        """Call a function; from its fourth call with these options and shapes on, replay its recording."""
        if self._recorder is None:
            function(*options, **tensors)
            return
        shapes = tuple((name, t.shape, t.stride(), t.dtype) for name, t in sorted(tensors.items()))
        key = (function.__name__, options, shapes)
        if key not in self._replays and self._calls[key] >= WARM_UP:
            self._record(key, function, options, tensors)
        if key not in self._replays:
            self._calls[key] += 1
            function(*options, **tensors)
            return
        inputs, replay = self._replays[key]
        for name, tensor in tensors.items():
            inputs[name].copy_(tensor, non_blocking=True)
        replay()

    def _record(
        self, key: Hashable, function: Function, options: tuple[Hashable, ...], given: dict[str, Tensor]
    ) -> None:
        """Record a function on copies of its inputs. If that fails, nothing is recorded from now on."""
        assert self._recorder is not None
        inputs = {name: tensor.clone() for name, tensor in given.items()}
        try:
            self._replays[key] = inputs, self._recorder.record(lambda: function(*options, **inputs))
        except Exception as error:
            log.warning("a step is launched kernel by kernel, because it could not be recorded: %s", error)
            self._recorder = None


def recorder_for(experiment: Experiment, world: World) -> Recorder | None:
    """Return what records the steps of a run (`train.graph`), or None if they are launched kernel by kernel.

    "auto" records on one GPU. Blocks that are recomputed save the generator's state, which a recording cannot do.
    """
    train = experiment.train
    if world.device.type != "cuda" or train.graph is False or train.sharded:
        return None
    if train.graph == "auto" and (world.size > 1 or train.activation_checkpointing):
        return None
    return CudaGraphs(world.device)
