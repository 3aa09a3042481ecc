"""Networks by name: published sizes, and tiny ones for a CPU."""
