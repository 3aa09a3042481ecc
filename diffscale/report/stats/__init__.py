"""Statistics over records: facets, aggregates, frontiers, fits, verdicts."""
