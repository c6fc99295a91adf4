"""Implementations of the ports; constructed only in `wiring.py`."""
