"""Studies that are no suite: caveats of FID, noise and resolution, scaling."""
