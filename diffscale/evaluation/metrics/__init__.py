"""Distances, scores and intervals of features."""
