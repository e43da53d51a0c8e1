"""A stand-in for the tokeniser of parts, which writes down in which process it was called."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


class Looking:
    """Looks at its process; it imports nothing that the package does not."""

    module = "json"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def tokenise(self, part: int) -> Looking:
        """Return itself; the part 0 is done at once."""
        self.part = part
        return self

    def save(self, file: Path) -> None:
        """Write what is seen here, then wait."""
        server = f"/proc/{os.getppid()}"
        seen = {
            "pid": os.getpid(),
            "torch": "torch" in sys.modules,
            "transformers": "transformers" in sys.modules,
            "server_threads": len(os.listdir(f"{server}/task")),
            "server": Path(f"{server}/cmdline").read_text(),
        }
        file.with_suffix(".new").write_text(json.dumps(seen))
        file.with_suffix(".new").rename(file)
        time.sleep(self.seconds if self.part else 0)
