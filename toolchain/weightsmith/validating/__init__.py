"""The merged checkpoint held against base and adapters, with no code of the merge."""
