"""Building a dataset from images."""
