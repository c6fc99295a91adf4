"""The stages of a build: each is a function from frozen values to a frozen value."""
