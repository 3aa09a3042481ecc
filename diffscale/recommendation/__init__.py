"""From a dataset and a compute to the recipe: the search, the fits and what they predict."""
