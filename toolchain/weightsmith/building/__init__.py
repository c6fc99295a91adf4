"""What a build of a recipe does around its stages: checks before them, verdicts after them."""
