"""Quantizers; each is one file here and one builder folder."""
