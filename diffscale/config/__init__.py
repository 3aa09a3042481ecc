"""Settings of a run: schema, loading, presets, and the objects that settings describe."""
