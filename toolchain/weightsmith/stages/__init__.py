"""The stages of a build: each file has a step, and the function that commands call too.

A stage may import `steps` and the rooms below, and no other stage. Begin with cache_scales.py, the
example of CONTRIBUTING.
"""
