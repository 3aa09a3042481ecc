"""What the benchmarks share: paired timings, contenders, tables of results."""
