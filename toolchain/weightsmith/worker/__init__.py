"""The entry point inside a builder: `python -m weightsmith.worker job.json` runs one job.

What the other side sees is a stream of JSON lines on standard output: `{"progress": [done, total,
unit]}`, `{"note": text}`, `{"warn": text}`, and last either `{"result": {…}}` or `{"error":
{"message", "hint", "exit_code"}}`. Everything else that is printed goes to standard error. The end
of standard input means that the other side is gone: the worker ends at once (exit code 130).
"""
