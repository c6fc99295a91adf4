"""Evaluation: data files, metrics, scores, and the client of the server."""
