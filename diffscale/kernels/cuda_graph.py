"""A function of tensors as a CUDA graph: recorded once, then replayed without Python and in one launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Outputs = tuple[Tensor | None, ...]
Run = Callable[[], Outputs]
Record = Callable[[Run], tuple[Callable[[], None], Outputs]]

WARM_UP = 2  # calls before the recording: libraries choose algorithms and allocate workspaces in them


class Recorded:
    """A function whose work on a GPU is recorded. A call has other values in the same shapes, and returns copies.

    The function sees what its other tensors (weights) hold at each call.
    """

    def __init__(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], record: Record | None = None):
        """Record the function. Raises RuntimeError where its work cannot be recorded.

        function: of tensors; it reads nothing on the host
        inputs: tensors of the shapes, dtypes and strides of later calls
        record: runs a function and returns what runs it again, with its outputs
        """
        self.inputs = [tensor.clone() for tensor in inputs]
        self.replay, self.outputs = (record or record_cuda_graph)(lambda: function(*self.inputs))

    def __call__(self, *inputs: Tensor) -> Outputs:
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.replay()
        return tuple(None if output is None else output.clone() for output in self.outputs)


def record_cuda_graph(run: Run) -> tuple[Callable[[], None], Outputs]:
    """Record the work of a function on the current GPU; return what replays it, and its outputs, which replays fill."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may allocate meanwhile
        outputs = run()
    return graph.replay, outputs
