"""From a base model and LoRA adapters to a ready-to-serve, verified container image."""

__version__ = "0.1.0"
