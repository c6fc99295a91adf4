"""The entry point inside a builder: `python -m weightsmith.worker job.json` runs one job.

The file is what `weightsmith.core.jobs.write_job` writes. The worker writes JSON lines to standard
output: `{"progress": [done, total, unit]}`, `{"note": text}`, `{"warn": text}`, `{"doing": text}`,
and last either `{"result": {…}}` or `{"error": {"message", "hint", "exit_code"}}`. Everything else
goes to standard error. If standard input closes, the runner is gone, and the worker exits at once
with code 130.

The room may import every other one, and reads what the job needs alone. Begin with jobs.py.
"""
