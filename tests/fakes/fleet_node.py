"""A node's program for tests of engines: `python -m tests.fakes.fleet_node`.

It replies at once with the node and its request, fails, waits, or ends without a reply, as the
request's `do` says.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    text = sys.stdin.readline()
    if text.strip() == "version":
        print(os.environ.get("FAKE_VERSION", "1"))  # noqa: T201
        return 0
    asked = json.loads(text)
    match asked.get("do"):
        case "wait":
            wait(asked)
        case "crash":
            print("it is over", file=sys.stderr)  # noqa: T201
            return 9
    print(json.dumps({"id": asked["id"], "pid": os.getpid()}))  # noqa: T201
    return 0


def wait(asked: dict[str, Any]) -> None:
    """Wait until it is told to end; say first that it began, and last that it could clean up."""
    try:
        # Whoever sees `begun` may end this process at once, so it hears that before it says so.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
        with Path(asked["begun"]).open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(float(asked.get("seconds", 600)))
    finally:
        if ended := asked.get("ended"):
            Path(ended).write_text("ended")


if __name__ == "__main__":
    sys.exit(main())
