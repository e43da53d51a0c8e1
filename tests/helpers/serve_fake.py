"""A program that serves a model folder by the fake server: python serve_fake.py FOLDER PORT [slow | ends | leaves]."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

COMMAND = shlex.join([sys.executable, __file__]) + " {model} {port}"
"""As generate.launch.command names it."""

if __name__ == "__main__":
    folder, port, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    print("serving", folder, [name for name in ("MASTER_PORT", "MASTER_KEY") if name in os.environ], flush=True)
    if how == ["ends"]:
        sys.exit("no such card")
    if how == ["slow"]:
        time.sleep(600)
    # A child in a session of its own, as workers of servers may be; it ignores TERM.
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", ignore, str(folder)], start_new_session=True)
    (folder.parent / f"child-of-{port}").write_text(str(child.pid))
    if how == ["leaves"]:  # without a model: the test asks nothing of it
        from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

        class Healthy(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

        ThreadingHTTPServer(("127.0.0.1", port), Healthy).serve_forever()
    from fake_server import FakeServer, serving

    fake = FakeServer(folder)
    fake.name = str(folder)
    with serving(fake, port):
        time.sleep(600)
