"""Distances, scores and intervals from features."""
