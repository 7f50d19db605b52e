"""Every error that a user can meet, and the exit code of its class.

```
FundamentaLLMError
    ConfigError                2    a key, value or combination in a configuration
    DataError                  3    text, token files or tokenizers
    CheckpointError            4    a checkpoint or run directory
    MachineError               5    devices, disks, memory, processes, missing packages
    NumericalError            20    training cannot continue for numerical reasons
    StalledRankError          21    one of several ranks stands still, and the run was ended
    InterruptedRunError  128 + n    signal n ended the command
```

One error is one message: what happened, where (file, line, key), what was found and expected, and
how to fix it; the addresses in it have no secrets. The command line prints `str(error)` and exits
with `error.exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fundamentallm.redaction import redacted


class FundamentaLLMError(Exception):
    """The base of all errors raised on purpose.

    Args:
        what: the problem, in one sentence without a final period.
        where: file, line and key, as `config.yaml:12: training.optimizer`.
        got: the offending value as text.
        expected: the allowed values or range as text.
        fix: the next step for the user, as an imperative sentence.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, where: str = "", got: str = "", expected: str = "", fix: str = ""
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.expected = expected
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        lines = [head]
        for label, text in (("got", self.got), ("expected", self.expected), ("fix", self.fix)):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        return redacted("\n".join(lines))


class ConfigError(FundamentaLLMError):
    """A configuration that is invalid.

    Args:
        what, where, got, expected, fix: as in `FundamentaLLMError`.
        key: the dotted path of the offending key, as `training.optimizer.betas`; the caller
            that knows the file uses it to fill in `where`.
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        key: str = "",
        where: str = "",
        got: str = "",
        expected: str = "",
        fix: str = "",
    ) -> None:
        super().__init__(what, where=where, got=got, expected=expected, fix=fix)
        self.key = key

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.key}: {text}" if self.key and not self.where else text


class DataError(FundamentaLLMError):
    """Text or tokens that cannot be used."""

    exit_code = 3


class CheckpointError(FundamentaLLMError):
    """A checkpoint or run directory that is damaged, missing, or belongs to another run."""

    exit_code = 4


class MachineError(FundamentaLLMError):
    """A resource that the machine lacks, or an operation that it refuses."""

    exit_code = 5


class NumericalError(FundamentaLLMError):
    """Training cannot continue: the numbers are not finite and every remedy was tried."""

    exit_code = 20


class StalledRankError(FundamentaLLMError):
    """One of several ranks stands still; all of them end, to be started again."""

    exit_code = 21


class InterruptedRunError(FundamentaLLMError):
    """A signal ended a command. A run that saved its state ends with this code and no error.

    Args:
        what: the message.
        signal_number: the signal; the exit code is 128 plus this number.
        fix: how to continue.
    """

    def __init__(self, what: str, *, signal_number: int, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'?` for the nearest known name, or an empty string."""
    near = nearest(name, known)
    return f"did you mean '{near}'?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the nearest known name; None if none is near."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)
