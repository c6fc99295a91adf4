"""The merge engine: names and plan, deltas, rounding, streamed writer, checks."""
