"""`train.profile`: a torch profile of ten steps and a snapshot of memory, in RUN/profile.

`trace.json` opens in Perfetto (ui.perfetto.dev) and chrome://tracing, `memory.pickle` of a GPU on
pytorch.org/memory_viz; diffscale reads neither.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from diffscale.core import storage

SKIPPED, WARM_UP, PROFILED = 8, 2, 10  # steps of a launch: the first ones compile, record graphs and fill caches
ROWS = 40  # operations in each table


class StepProfile:
    """The profile of steps 11 to 20 of a launch on one rank. `step` is called after each."""

    def __init__(self, run_folder: str, device: torch.device) -> None:
        self.folder, self.device = storage.join(run_folder, "profile"), device
        cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *cuda],
            schedule=schedule(wait=0, skip_first=SKIPPED, warmup=WARM_UP, active=PROFILED, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
            record_shapes=True,
        )

    def __enter__(self) -> StepProfile:
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history()
        self._profile.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._profile.stop()
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(None)

    def step(self) -> None:
        """Count one step."""
        self._profile.step()

    def _write(self, done: profile) -> None:
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        totals = done.key_averages()
        tables = {
            "operations.txt": totals.table(sort_by=f"self_{kind}_time_total", row_limit=ROWS),
            "memory.txt": totals.table(sort_by=f"self_{kind}_memory_usage", row_limit=ROWS),
        }
        with tempfile.TemporaryDirectory(prefix="diffscale-profile-") as place:
            for name, text in tables.items():
                Path(place, name).write_text(text)
            done.export_chrome_trace(f"{place}/trace.json")
            if kind == "cuda":
                torch.cuda.memory._dump_snapshot(f"{place}/memory.pickle")
            for file in sorted(Path(place).iterdir()):
                storage.write_bytes(storage.join(self.folder, file.name), file.read_bytes())
