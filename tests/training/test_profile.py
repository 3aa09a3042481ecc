"""`train.profile` writes ten steps as torch sees them, and changes no weight."""

from __future__ import annotations

import json
from pathlib import Path

from diffscale.data import Dataset

from .small import final_state
from .test_trainer import launch, short


def test_ten_steps_are_profiled_and_the_weights_are_the_same(shared_storage: Path, dataset: Dataset) -> None:
    e = short(shared_storage, "profiled", train={"profile": True})
    _, profiled = launch(e, dataset)
    trace = json.loads(Path(profiled, "profile", "trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 10
    assert "convolution" in Path(profiled, "profile", "operations.txt").read_text()
    assert "CPU Mem" in Path(profiled, "profile", "memory.txt").read_text()
    _, plain = launch(short(shared_storage, "not-profiled"), dataset)
    assert not Path(plain, "profile").exists()
    assert final_state(plain) == final_state(profiled)
