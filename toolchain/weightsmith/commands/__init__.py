"""One stage at a time, on folders and references instead of a recipe."""
