"""`invoke NAME` from a checkout; a repository of yours can do the same and add its own tasks."""

from weightsmith.cli import namespace  # noqa: F401
