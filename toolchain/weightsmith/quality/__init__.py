"""How much a quantized model differs from the one it was made from."""
