"""What every test may take for granted."""

from __future__ import annotations

import os
import signal

# Tests are small and run in two processes: torch's threads would only wait for each other. Before
# anything imports torch, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts something in the background lets it ignore Ctrl-C, and that is inherited by
# the programs whose answer to Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
