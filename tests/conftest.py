"""What holds for all tests."""

import os
import signal

# Small matrices on a busy machine: threads that wait for each other would make a test of a second last thirty.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A runner that is itself started in the background ignores SIGINT, and so would everything started from here; a
# handler, whichever it is, is reset to the default in a new process.
signal.signal(signal.SIGINT, signal.default_int_handler)
