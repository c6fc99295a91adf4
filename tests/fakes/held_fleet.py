"""The command line with nodes that tests can hold: `python -m tests.fakes.held_fleet fleet …`.

What failed because of its machine is tried again at once.
"""

from __future__ import annotations

import sys

from weightsmith.building import wiring
from weightsmith.cli.program import main
from weightsmith.fleets import running

if __name__ == "__main__":
    wiring.NODE = (sys.executable, "-m", "tests.fakes.held_node")
    running._PAUSES = (1.0, 1.0)
    main()
