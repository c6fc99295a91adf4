"""Many builds of one recipe: which there are, what they share, where they run, what came out.

It may import `building` and the rooms below. Begin with graph.py, which unites the cells' steps;
running.py submits them to an engine, and node.py does one on a node.
"""
