"""Names, labels, statements, bills of materials and signatures: what was made from what.

It may import `evaluating` and the rooms below. Begin with attest.py, whose materials all evidence
is made of; chain.py checks it.
"""
