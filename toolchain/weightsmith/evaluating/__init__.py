"""Questions, answers and scores: data files, metrics, the client that asks a server."""
