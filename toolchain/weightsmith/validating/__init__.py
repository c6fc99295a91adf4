"""Checks a merged checkpoint against base and adapters without using the merge's own code."""
