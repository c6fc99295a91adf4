"""A build as a graph: its steps, and what runs, explains and records them.

It may import stages and all below them; only fleets and the commands import it. Begin with
pipeline.py. The package is not called `build`, because `weightsmith.build` is the public function.
"""
