"""The command line: parse, call, print; it decides nothing.

It may import every room but `worker`, which runs in builders. Begin with commands.py; command.py
makes a function a command, and sections.py makes flags of fields.
"""

import os
import sys

from weightsmith.core.interrupts import leave_quietly_at_first

if os.path.basename(sys.argv[0]) in ("invoke", "inv"):  # noqa: PTH119 - no pathlib before this
    leave_quietly_at_first()  # the imports below take longer than an impatient Ctrl-C

from invoke.collection import Collection

from weightsmith.cli.commands import COMMANDS

namespace = Collection()
for _task in COMMANDS:
    namespace.add_task(_task)

__all__ = ["namespace"]
