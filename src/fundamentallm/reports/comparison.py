"""Compare runs: what differs between them, and whether their losses differ by more than chance.

Runs whose configurations differ in the seed and the name alone are one group. The best validation
losses of two groups are compared by Welch's t-test (B. L. Welch, Biometrika 34, 1947), two-sided,
with the degrees of freedom of Welch and Satterthwaite. It assumes that the losses of different
seeds are independent and about normally distributed; their spreads may differ. Each group is
compared with the best one; with several comparisons the p-values are those of Holm (Scandinavian
Journal of Statistics 6, 1979), so that the chance of any false verdict is at most `LEVEL`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fundamentallm.reports.run_data import RunData
from fundamentallm.training.step import bits_per

LEVEL = 0.05
SEED = "seed"
IGNORED = frozenset({SEED, "name", "training.checkpoint_dir", "handlers.pruning.limits"})
"""Keys that may differ within a group."""
IDENTITIES = {"data.sha256": "texts", "tokenizer.sha256": "tokenizers"}
"""What losses per token depend on, told in a note."""

FIGURES = {
    "best": "best validation loss",
    "last": "last validation loss",
    "bits_per_byte": "bits per byte",
    "speed": "tokens per second",
    "seconds": "seconds",
}
"""The figures of a run, each with its name for people."""


@dataclass(frozen=True)
class Summary:
    """The values of one figure in a group.

    Attributes:
        mean: of the values.
        spread: their sample standard deviation; None of fewer than two.
        count: how many there are.
    """

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary | None:
        """Return the summary, None of no values."""
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), spread, len(values))


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, with different seeds.

    Attributes:
        runs: the runs.
        seeds: of each.
        settings: the value of each key that differs between the groups.
        figures: by key of `FIGURES`, the values of the runs that have one. Runs of the same seed
            are no independent samples, so the longest of them alone has values here.
    """

    runs: tuple[RunData, ...]
    seeds: tuple[Any, ...]
    settings: Mapping[str, Any]
    figures: Mapping[str, tuple[float, ...]]

    @property
    def name(self) -> str:
        """The names of its runs."""
        return ", ".join(run.name for run in self.runs)

    def summary(self, figure: str) -> Summary | None:
        """Return mean, spread and count of a figure, None if no run has it."""
        return Summary.of(self.figures[figure])


@dataclass(frozen=True)
class Verdict:
    """Whether a group differs from the best one.

    Attributes:
        group, best: numbers of the groups.
        difference: of the mean best validation losses, nats per token.
        t, degrees: of Welch's test; None where it cannot be made.
        p: adjusted for the number of comparisons; None where the test cannot be made.
        words: the verdict.
    """

    group: int
    best: int
    difference: float
    t: float | None
    degrees: float | None
    p: float | None
    words: str


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, the best first.

    Attributes:
        groups: by mean best validation loss; those without one are last.
        verdicts: of each other group with a loss against the best.
        notes: why losses cannot be compared, or what is missing.
    """

    groups: tuple[Group, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]


def compare(runs: Sequence[RunData]) -> Comparison:
    """Compare runs; they are at least one."""
    flat = [_described(run) for run in runs]
    _fill_in_identities(flat)
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differing = [key for key in keys if len({_word(one.get(key)) for one in flat}) > 1]
    apart = [key for key in differing if key not in IGNORED]
    telling = [key for key in apart if key not in IDENTITIES]
    members: dict[tuple[str, ...], list[int]] = {}
    for number, one in enumerate(flat):
        # A configuration that cannot be read is like no other.
        own = f"{number}" if not runs[number].config else ""
        members.setdefault((own, *(_word(one.get(key)) for key in apart)), []).append(number)
    groups = [
        Group(
            tuple(runs[i] for i in numbers),
            tuple(flat[i].get(SEED) for i in numbers),
            {key: flat[numbers[0]].get(key) for key in telling},
            _figures(_longest_of_each_seed([(flat[i].get(SEED), runs[i]) for i in numbers])),
        )
        for numbers in members.values()
    ]
    groups.sort(key=_by_loss)
    different = [
        f"the runs have different {what}: losses per token are not comparable between them"
        for key, what in IDENTITIES.items()
        if len({one[key] for one in flat if one[key] is not None}) > 1
    ]
    repeated = [
        f"group {number} has several runs of one seed: the longest of them counts"
        for number, group in enumerate(groups, 1)
        if len(set(map(_word, group.seeds))) < len(group.seeds)
    ]
    verdicts = [] if different else _verdicts(groups)
    return Comparison(tuple(groups), tuple(verdicts), (*different, *repeated))


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float] | None:
    """Return t, the degrees of freedom and the two-sided p of Welch's test.

    None if a sample has fewer than two values or neither varies.
    """
    if min(len(a), len(b)) < 2:
        return None
    squares = [statistics.variance(values) / len(values) for values in (a, b)]
    if sum(squares) == 0:
        return None
    t = (statistics.fmean(a) - statistics.fmean(b)) / math.sqrt(sum(squares))
    parts = [square**2 / (len(v) - 1) for square, v in zip(squares, (a, b), strict=True)]
    degrees = sum(squares) ** 2 / sum(parts)
    return t, degrees, two_sided_p(t, degrees)


def two_sided_p(t: float, degrees: float) -> float:
    """Return P(|T| >= |t|) of Student's distribution with at least 1 degree of freedom.

    With T = sqrt(degrees) / tan(u), the density is proportional to sin(u)**(degrees - 1); its
    integral is taken by Gauss and Legendre's rule in the square root of u.
    """
    upper = math.atan2(math.sqrt(degrees), abs(t))
    nodes, weights = np.polynomial.legendre.leggauss(256)
    roots = (nodes + 1) / 2 * math.sqrt(upper)
    values = np.sin(roots**2) ** (degrees - 1) * 2 * roots
    tail = float(weights @ values) * math.sqrt(upper) / 2
    log_whole = math.lgamma(degrees / 2) - math.lgamma((degrees + 1) / 2)
    return min(1.0, tail / (math.sqrt(math.pi) / 2 * math.exp(log_whole)))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Return Holm's p-values for several comparisons, in the order of the given ones."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = highest
    return found


def _verdicts(groups: Sequence[Group]) -> list[Verdict]:
    losses = [group.figures["best"] for group in groups]
    others = [number for number, values in enumerate(losses) if number > 0 and values]
    tests = {number: welch(losses[number], losses[0]) for number in others}
    made = [number for number, test in tests.items() if test is not None]
    raw = [test[2] for test in tests.values() if test is not None]
    p_values = dict(zip(made, adjusted(raw), strict=True))
    verdicts = []
    for number in others:
        difference = statistics.fmean(losses[number]) - statistics.fmean(losses[0])
        test, p = tests[number], p_values.get(number)
        if test is None or p is None:
            few = min(len(losses[number]), len(losses[0])) < 2
            why = "two seeds of each are needed at least" if few else "the seeds do not vary"
            words = f"chance cannot be judged: {why}"
            verdicts.append(Verdict(number, 0, difference, None, None, None, words))
            continue
        words = "a difference" if p < LEVEL else "within chance"
        verdicts.append(Verdict(number, 0, difference, test[0], test[1], p, words))
    return verdicts


def _longest_of_each_seed(runs: Sequence[tuple[Any, RunData]]) -> list[RunData]:
    """Return a run for each seed, in the order of the seeds; the first one of equal length."""
    longest: dict[str, RunData] = {}
    for seed, run in runs:
        found = longest.setdefault(_word(seed), run)
        if _num_steps(run) > _num_steps(found):
            longest[_word(seed)] = run
    return list(longest.values())


def _num_steps(run: RunData) -> int:
    return max((curve.steps[-1] for curve in run.curves.values()), default=0)


def _by_loss(group: Group) -> float:
    summary = group.summary("best")
    return math.inf if summary is None else summary.mean


def _figures(runs: Sequence[RunData]) -> dict[str, tuple[float, ...]]:
    each = [run_figures(run) for run in runs]
    return {
        name: tuple(value for one in each if (value := one[name]) is not None) for name in FIGURES
    }


def run_figures(run: RunData) -> dict[str, float | None]:
    """Return the figures of a run by key of `FIGURES`, None for what it did not measure."""
    loss = run.curves.get("val/loss")
    best, last = (loss.lowest(), loss.last()) if loss is not None else (None, None)
    speed = run.curves.get("train/tokens_per_second")
    speeds = [value for _, value in speed.finite()] if speed is not None else []
    seconds = max((curve.seconds[-1] for curve in run.curves.values()), default=None)
    return {
        "best": best[1] if best else None,
        "last": last[1] if last else None,
        "bits_per_byte": _bits_per_byte(run, best[1] if best else None),
        "speed": statistics.median(speeds) if speeds else None,
        "seconds": seconds,
    }


def _bits_per_byte(run: RunData, best: float | None) -> float | None:
    """Return bits per byte at the best loss; a run may have none where a token is a byte."""
    if (curve := run.curves.get("val/bits_per_byte")) is not None:
        lowest = curve.lowest()
        return lowest[1] if lowest else None
    if best is None or run.bytes_per_token is None:
        return None
    return bits_per(best, run.bytes_per_token)


def _described(run: RunData) -> dict[str, Any]:
    """Return the configuration by dotted key, with the hashes of data and tokenizer."""
    flat = {
        "data.sha256": run.facts.get("data SHA-256"),
        "tokenizer.sha256": run.facts.get("tokenizer SHA-256"),
    }
    _flatten(run.config, "", flat)
    return flat


def _fill_in_identities(flat: Sequence[dict[str, Any]]) -> None:
    """Give a run without an intact checkpoint what all others of its configuration have."""
    apart = IGNORED | IDENTITIES.keys()
    configurations = [
        frozenset((key, _word(value)) for key, value in one.items() if key not in apart)
        for one in flat
    ]
    for identity in IDENTITIES:
        known: dict[frozenset[tuple[str, str]], set[str]] = {}
        for one, configuration in zip(flat, configurations, strict=True):
            known.setdefault(configuration, set()).update({one[identity]} - {None})
        for one, configuration in zip(flat, configurations, strict=True):
            if one[identity] is None and len(known[configuration]) == 1:
                (one[identity],) = known[configuration]


def _flatten(values: Mapping[str, Any], prefix: str, into: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _flatten(value, f"{prefix}{key}.", into)
        else:
            into[f"{prefix}{key}"] = value


def _word(value: Any) -> str:
    """Return a text that is equal for equal values: 1 and 1.0 are, 1 and true are not."""
    return repr(float(value)) if type(value) is int else repr(value)
