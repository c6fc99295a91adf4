"""What users write: recipes, settings and options of running, checked and placed.

It may import `core` and its siblings. Begin with schema.py; file.py reads a recipe and applies
`--set`.
"""
