"""What all tests need of the process that runs them."""

import signal

# A shell's background job ignores Ctrl-C, and so would every process that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)
