"""A sweep: which runs it is made of, which of them go on, and what they teach. Ray is in diffscale/tune.py alone."""
