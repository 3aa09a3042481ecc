"""Training steps of two versions of diffscale, in turns: `python -m benchmarks.throughput.two_trees BEFORE AFTER`.

BEFORE and AFTER are folders with a `diffscale` package each (git worktrees). Each side is a process with one thread
that measures its own CPU time, so other work on the machine disturbs little. Prints one JSON line per network: images
per CPU second of each side, the median ratio of the pairs (above 1: AFTER is faster) and its bootstrap 95 % interval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np

CASES = [
    ("unet-tiny", 16),
    ("unet-cifar10-small", 8),
    ("uvit-tiny", 16),
    ("rin-tiny", 16),
    ("dit-tiny", 16),
]  # preset, batch
STEPS, PAIRS = 2, 20

SIDE = """
import sys, time, torch
from diffscale.models import create_model
from diffscale.training.numerics import Numerics
try:
    from diffscale.kernels.runtime import keep_freed_memory
except ImportError:
    from diffscale.kernels.heap import keep_freed_memory
name, batch = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
keep_freed_memory()
model, convolves = create_model(name, resolution=32), not name.startswith("rin")
numerics = Numerics("fp32", convolves, winograd=convolves)
numerics.prepare(model).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
x, logsnr = numerics.order(torch.randn(batch, 3, 32, 32)), torch.linspace(-4, 4, batch)
def step():
    (model(x, logsnr)[0] - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
step(), step()
for line in sys.stdin:
    started = time.process_time()
    for _ in range(int(line)): step()
    print(time.process_time() - started, flush=True)
"""


def main(before: str, after: str) -> None:
    """Race the two trees on every network of CASES."""
    for name, batch in CASES:
        sides = {tree: _start(tree, name, batch) for tree in (before, after)}
        seconds: dict[str, list[float]] = {before: [], after: []}
        for pair in range(PAIRS):
            for tree in (before, after) if pair % 2 else (after, before):
                given, answers = sides[tree].stdin, sides[tree].stdout
                assert given is not None
                assert answers is not None
                given.write(f"{STEPS}\n")
                given.flush()
                seconds[tree].append(float(answers.readline()))
        for process in sides.values():
            process.communicate()
        ratios = np.array(seconds[before]) / np.array(seconds[after])
        draws = np.random.default_rng(0).integers(0, PAIRS, (10_000, PAIRS))
        low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
        rates = [batch * STEPS / float(np.median(seconds[tree])) for tree in (before, after)]
        row = {"network": name, "batch": batch, "pairs": PAIRS, "before": rates[0], "after": rates[1]}
        print(json.dumps(row | {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}), flush=True)


def _start(tree: str, name: str, batch: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SIDE, name, str(batch)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=tree, stdin=pipe, stdout=pipe, text=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
