"""Faults, kills, soak and audit."""
