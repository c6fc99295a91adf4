"""Checkpoint files: reading them strictly, walking folders safely, importing other layouts."""
