"""Code that exported folders hold. Nothing in diffscale imports it; it needs diffusers."""
