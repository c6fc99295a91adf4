"""The outside world, one file each; constructed only in the wiring module."""
