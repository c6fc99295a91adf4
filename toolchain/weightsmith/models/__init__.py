"""Checkpoint files: strict readers, safe folder scans, GGUF import."""
