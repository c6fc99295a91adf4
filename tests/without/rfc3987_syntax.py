"""Hides the package of that name, on PYTHONPATH, from processes that import jsonschema.

jsonschema compiles the package's grammars if it is there, which takes two seconds: most of what
`import ray` and `check-jsonschema` take. Another test tool needs the package.
"""

raise ImportError("hidden")
