"""Benchmarks of diffscale: run from the repository's root, not part of the wheel."""
