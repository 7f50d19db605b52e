"""The process of one run of a sweep: the `run` command, ended when the sweep's process has ended.

python -m fundamentallm.engine.sweeping.child PARENT CONFIG.yaml --run-dir DIR ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from fundamentallm.engine.cli import exit_process, main


def _stop_with(parent: int) -> None:
    """Save the state and stop as after SIGTERM, once the parent process has ended."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with, args=(int(sys.argv[1]),), daemon=True).start()
    with contextlib.suppress(OSError):  # if memory runs out, end this process and not the sweep's
        Path("/proc/self/oom_score_adj").write_text("500")
    exit_process(main(["run", *sys.argv[2:]]))
