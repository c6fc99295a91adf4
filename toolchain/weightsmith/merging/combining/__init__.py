"""Several adapters into one change per tensor: sums, truncations, votes and prunings."""
