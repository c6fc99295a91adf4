"""Runs models with weights read from files, a few rows at a time, shared by several views.

It may import `core` and its siblings; it runs in builders, with torch and transformers. Begin with
walk.py: what asks a model, and which modules read their rows while they run.
"""
