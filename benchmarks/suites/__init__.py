"""Suites: the runs of a benchmark, and their peers."""
