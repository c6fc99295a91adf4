"""Quantized bases: detection from configuration and tensors, and dequantization."""
