"""A process of its own that calls `main` several times, and prints a JSON list of [status, stderr, seconds].

For what is read from the environment at import. Its argument is a JSON list of argument lists.
"""

import contextlib
import io
import json
import sys
import time

from prefopt_dist.cli import main
from prefopt_dist.commands import inspect
from prefopt_dist.setup import prepare_models

assert prepare_models
assert inspect  # imported now, or the first call would take as long as all imports

found = []
for arguments in json.loads(sys.argv[1]):
    said, before = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    found.append([status, said.getvalue(), time.monotonic() - before])
print(json.dumps(found))
