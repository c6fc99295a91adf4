"""The merge: a plan of output tensors, their exact sums, a streaming writer, and proofs.

It may import `forward`, `models`, `oci`, `recipe` and `core`, and nothing of what checks it. Begin
with plan.py and engine.py; families/ says where each kind of adapter has its changes.
"""
