"""Measure how much a quantized model differs from its 16-bit checkpoint."""
