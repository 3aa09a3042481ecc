"""Sweeps: the trials, which of them continue, and which settings mattered."""
