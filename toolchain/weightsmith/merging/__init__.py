"""The merge engine: plan, deltas, rounding, streaming writer, checks."""
