"""A build as a graph: its steps, and what runs, explains and records them.

It may import `stages` and the rooms below; fleets, commands and both interfaces import it. Begin
with pipeline.py; the room is not called `build`, because `weightsmith.build` is a public function.
"""
