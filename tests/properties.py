"""How many examples a property test draws: a few by default, all of them in the long run."""

from __future__ import annotations

from hypothesis import settings

ALL, FEW = 100, 20  # of a test that names no number


def use(all_examples: bool) -> None:
    """Choose for this process, before the tests are imported."""
    number = ALL if all_examples else FEW
    # No deadline: an example that takes long tells of the machine.
    settings.register_profile("tests", max_examples=number, deadline=None)
    settings.load_profile("tests")


def examples(number: int) -> int:
    """Return the number of examples for a test that draws `number` in the long run."""
    return max(5, number * settings.default.max_examples // ALL)
