"""Generate, extract features, compare: distances between the samples of a run and its data that can be trusted."""
