"""Bases that are stored quantized: seen in configuration and tensors, and decoded one by one."""
