"""A budget of time, as a user writes it."""

from __future__ import annotations

import re

from fundamentallm.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(budget: str) -> int:
    """Return the seconds of a time as 90s, 10m, 2h or 1h30m.

    Raises:
        ConfigError: it is not a time above 0, or has no unit.
    """
    parts = re.findall(r"(\d+)([smhd])", budget)
    whole = "".join(number + unit for number, unit in parts)
    seconds = sum(int(number) * _UNITS[unit] for number, unit in parts)
    if whole == budget and seconds:
        return seconds
    is_bare = budget.isdecimal() and int(budget) > 0
    raise ConfigError(
        f"{budget} what?" if is_bare else "the budget is not a time",
        where="--budget",
        got=budget,
        expected="for example 90s, 10m, 2h or 1h30m",
        fix=f"write {budget}m, {budget}h or {budget}s" if is_bare else "",
    )
