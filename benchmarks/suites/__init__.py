"""Suites: the runs that a benchmark is made of, and the peers beside them."""
