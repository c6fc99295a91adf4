"""Models that run with their weights in files: a few rows at a time, shared by several views."""
