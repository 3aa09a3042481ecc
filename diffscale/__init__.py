"""diffscale: which backbone, noise schedule and resolution give the best images for your compute?"""

__version__ = "0.1.0"
