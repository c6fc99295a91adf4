"""The public functions of `weightsmith`: each does the same as its command."""
