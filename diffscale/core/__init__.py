"""What every other folder uses: errors, storage, caches, hashes, text, keyed random numbers, provenance."""
