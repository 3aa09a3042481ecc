"""Weights of other projects in, and models out: `diffscale import` and `diffscale export`."""
