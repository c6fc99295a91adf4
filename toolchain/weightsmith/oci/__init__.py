"""Images as values: lazy layers, deterministic tar, layouts, archives, the registry client.

It may import `core` and its siblings. Begin with image.py and layers.py; registry.py and session.py
talk to registries.
"""
