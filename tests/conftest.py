"""What every test may take for granted."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from hypothesis import is_hypothesis_test
from tests import properties

# Tests are small and run in two processes: torch's threads would only wait for each other. Before
# anything imports torch, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell that starts something in the background lets it ignore Ctrl-C, and that is inherited by
# the programs whose answer to Ctrl-C is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Minutes each, and a file runs in one process: begun last, one would run beside an idle process.
LONGEST = (
    "test_fault_injection_heal.py",
    "test_prepare_command.py",
    "test_fault_injection_kill.py",
    "test_stalls.py",
    "test_fault_injection_resume.py",
    "test_examples.py",
    "test_tune_command.py",
    "test_saving_on_a_failing_disk.py",
    "test_fault_injection_store.py",
    "test_fault_injection_fuzz.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let property tests draw a few examples by default and all of them with `-m long`."""
    is_long = config.option.markexpr == "long"
    properties.use(all_examples=is_long)
    # Files begin in the order of the items: by the number of their tests, slow ones would be last.
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Select the property tests for the long run too, and begin with what takes longest.

    Skip what needs a GPU where there is none.
    """
    if on_a_gpu := [item for item in items if item.get_closest_marker("cuda")]:
        import torch  # late: see above

        for item in on_a_gpu if not torch.cuda.is_available() else ():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    if config.option.markexpr == "long":
        for item in items:
            if is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker("long")
        items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what lives as long as this process: modules and items."""
    gc.freeze()
