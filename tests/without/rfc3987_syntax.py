"""Hides the package of that name, on PYTHONPATH, from Ray's processes.

Ray imports jsonschema, which compiles the package's grammars if it is there: 1.2 of the 1.5 seconds
that `import ray` takes. A test tool needs it; where only weightsmith and Ray are installed, it is
not there.
"""

raise ImportError("hidden")
