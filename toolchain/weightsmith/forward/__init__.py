"""Runs models with weights read from files, a few rows at a time, shared by several views."""
