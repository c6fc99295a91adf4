"""Inner loops in C, called by ctypes."""
