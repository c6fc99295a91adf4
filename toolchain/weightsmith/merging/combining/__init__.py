"""Combine several adapters into one change per tensor: sums, truncation, TIES, DARE, pruning."""
