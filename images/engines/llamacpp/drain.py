"""What is changed in llama.cpp's server, so that requests that are running may end after SIGTERM.

Unchanged, it stops computing at SIGTERM and then waits for its connections: requests without a
stream wait until the container is killed, streams are cut. Changed, it refuses new requests,
answers those that it has, and ends. A second SIGTERM ends it at once, as before.
"""

from __future__ import annotations

from pathlib import Path

SERVER, HTTP = "tools/server/server.cpp", "vendor/cpp-httplib/httplib.cpp"
EDITS = {
    SERVER: (
        # As process 1 of a container it would ignore the signal until its own handler is set.
        (
            "    common_init();\n",
            """    common_init();
    signal(SIGTERM, [](int) { _exit(128 + SIGTERM); });
""",
        ),
        (
            """        shutdown_handler = [&](int) {
            mcp_mgr.shutdown();
            // this will unblock start_loop()
            ctx_server.terminate();
        };
""",
            """        // A handler may neither wait nor take locks, so a thread does.
        drain = std::thread([&]() {
            while (sem_wait(&asked_to_end) != 0) {
            }
            ctx_http.is_ready.store(false); // on open connections, 503 and the connection's end
            ctx_http.stop();                // no new connections
            ctx_http.join();                // until every request is answered
            mcp_mgr.shutdown();
            // this will unblock start_loop()
            ctx_server.terminate();
        });
        shutdown_handler = [](int) { sem_post(&asked_to_end); };
""",
        ),
        (
            "    std::function<void()> clean_up;\n",
            """    std::function<void()> clean_up;
    std::thread drain;
    static sem_t asked_to_end;
    sem_init(&asked_to_end, 0, 0);
""",
        ),
        (
            "        ctx_server.start_loop();\n",
            """        ctx_server.start_loop();
        sem_post(&asked_to_end);
        drain.join();
""",
        ),
        (
            "#include <signal.h>\n",
            "#include <semaphore.h>\n#include <signal.h>\n#include <unistd.h>\n",
        ),
    ),
    # It would cut streams as soon as it no longer listens.
    HTTP: (
        (
            """  auto is_shutting_down = [this]() {
    return this->svr_sock_ == INVALID_SOCKET;
  };
""",
            "  auto is_shutting_down = []() { return false; };\n",
        ),
    ),
}
"""File below the source tree -> what is replaced by what."""


def write_edited(source: Path, target: Path) -> None:
    """Write the changed files into `target`, by their paths in `source`.

    Raises ValueError where a text to replace is not there exactly once.
    """
    for name, edits in EDITS.items():
        text = (source / name).read_text("utf-8")
        for old, new in edits:
            if text.count(old) != 1:
                raise ValueError(f"{name} has {text.count(old)} times: {old.strip()}")
            text = text.replace(old, new)
        path = target / name
        path.parent.mkdir(parents=True)
        path.write_text(text, "utf-8")
