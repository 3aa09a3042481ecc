"""`python -m benchmarks.report RUNS... --out DIR [--compare OLD NEW]`: the short entry into diffscale.report."""

from diffscale.core.app import run_app
from diffscale.report.__main__ import app

if __name__ == "__main__":
    run_app(app)
