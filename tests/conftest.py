"""What holds for all tests."""

import signal

# A runner that is itself started in the background ignores SIGINT, and so would everything started from here; a
# handler, whichever it is, is reset to the default in a new process.
signal.signal(signal.SIGINT, signal.default_int_handler)
