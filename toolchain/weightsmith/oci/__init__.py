"""Images as values: lazy layers, deterministic tar, layout, archive, registry client."""
