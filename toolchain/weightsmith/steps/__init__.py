"""What every stage of a build is made with: a step's shape, and where its results go.

It may import all that does work (merging, quantizing, images), and no stage. Begin with step.py.
"""
