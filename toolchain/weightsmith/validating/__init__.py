"""Checks a merged checkpoint against base and adapters without using the merge's own code.

It may import `forward`, `models`, `oci`, `recipe` and `core`, and never `merging`. Begin with
validate.py; verdict.py says what a difference means.
"""
