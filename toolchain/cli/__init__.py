"""The command line: parse, call, print. No decisions."""

from invoke.collection import Collection

from toolchain.cli import build, looking, parts

namespace = Collection()
for _module in (build, parts, looking):
    for _task in _module.COMMANDS:
        namespace.add_task(_task)

__all__ = ["namespace"]
