"""Model files: strict readers, the facts of a configuration, and folders scanned safely.

It may import `core` and its siblings. Begin with facts.py and safetensors.py.
"""
