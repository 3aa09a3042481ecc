"""Datasets on disk: manifest, shards, checksums, caches, and Hugging Face folders read in place."""
