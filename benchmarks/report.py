"""`python -m benchmarks.report RUNS... --out DIR [--compare OLD NEW]`: the short entry into diffscale.report."""

from diffscale.cli import run_app
from diffscale.report.command import app

if __name__ == "__main__":
    run_app(app)
