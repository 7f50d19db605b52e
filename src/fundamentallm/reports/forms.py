"""A comparison as a table for a terminal, as JSON, as CSV, and as a section of the page."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

from fundamentallm.config.base import in_yaml
from fundamentallm.reports.comparison import FIGURES, LEVEL, Comparison, Group, Summary, Verdict
from fundamentallm.reports.html import Html, joined, table, tag
from fundamentallm.reports.page import duration

TEST = (
    f"Welch's t-test of the best validation losses, two-sided, level {LEVEL}, adjusted by Holm; it"
    " assumes independent and about normally distributed losses of the seeds."
)
HEAD = ["group", "runs", *FIGURES.values(), "differs in"]


def rows(comparison: Comparison) -> list[list[str]]:
    """Return the cells of the table under `HEAD`, a row for each group."""
    return [
        [
            str(number),
            _count(group),
            *(_cell(name, group.summary(name)) for name in FIGURES),
            ", ".join(f"{key}={_shown(value)}" for key, value in group.settings.items()) or "-",
        ]
        for number, group in enumerate(comparison.groups, 1)
    ]


def text_table(comparison: Comparison) -> str:
    """Return the comparison for a terminal."""
    cells = [HEAD, *rows(comparison)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    lines.append("")
    lines += [f"group {number}: {_members(g)}" for number, g in enumerate(comparison.groups, 1)]
    if comparison.verdicts:
        lines += ["", *map(in_words, comparison.verdicts), TEST]
    lines += [f"note: {note}" for note in comparison.notes]
    return "\n".join(lines)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as plain JSON; groups are numbered from 1."""
    return {
        "groups": [
            {
                "group": number,
                "runs": [str(run.path) for run in group.runs],
                "seeds": list(group.seeds),
                "settings": dict(group.settings),
                "figures": {
                    name: None if summary is None else {**asdict(summary), "values": list(values)}
                    for name, values in group.figures.items()
                    for summary in [group.summary(name)]
                },
            }
            for number, group in enumerate(comparison.groups, 1)
        ],
        "verdicts": [
            {**asdict(verdict), "group": verdict.group + 1, "best": verdict.best + 1}
            for verdict in comparison.verdicts
        ],
        "test": TEST,
        "notes": list(comparison.notes),
    }


def to_csv(comparison: Comparison) -> str:
    """Return the table as CSV, a row for each group; what was not measured is empty."""
    settings = list(comparison.groups[0].settings)
    parts = [(name, part) for name in FIGURES for part in ("mean", "spread", "count")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["group", "runs", *settings, *(f"{name}_{part}" for name, part in parts)])
    for number, group in enumerate(comparison.groups, 1):
        figures = [getattr(group.summary(name), part, None) for name, part in parts]
        chosen = [_shown(group.settings[key]) for key in settings]
        writer.writerow([number, _names(group), *chosen, *figures])
    return text.getvalue()


def section(comparison: Comparison) -> Html:
    """Return the section of the page."""
    members = [
        tag("li", f"group {number}: {_members(group)}")
        for number, group in enumerate(comparison.groups, 1)
    ]
    verdicts = [tag("li", in_words(verdict)) for verdict in comparison.verdicts]
    return joined(
        tag("h2", "Comparison"),
        table(HEAD, rows(comparison), "Groups of runs, the best first", numbers=True),
        tag("ul", *members),
        *([tag("ul", *verdicts), tag("p", TEST, class_="note")] if verdicts else []),
        *(tag("p", note, class_="note") for note in comparison.notes),
    )


def in_words(verdict: Verdict) -> str:
    """Return a verdict as a sentence."""
    head = (
        f"group {verdict.group + 1} against group {verdict.best + 1}:"
        f" {verdict.difference:+.4f} nats per token"
    )
    if verdict.p is None:
        return f"{head}; {verdict.words}"
    numbers = f"t = {verdict.t:.3g}, {verdict.degrees:.3g} degrees of freedom, p = {verdict.p:.2g}"
    return f"{head}, {verdict.words} ({numbers})"


def _members(group: Group) -> str:
    pairs = zip(group.runs, group.seeds, strict=True)
    return ", ".join(
        f"{run.name} (seed {_shown(seed)}, {run.state.partition(':')[0]})" for run, seed in pairs
    )


def _count(group: Group) -> str:
    """Return the number of runs, and of those behind the losses if they are fewer."""
    counted, runs = len(group.figures["best"]), len(group.runs)
    return str(runs) if counted == runs else f"{counted} of {runs}"


def _names(group: Group) -> str:
    return " ".join(run.name for run in group.runs)


def _cell(figure: str, summary: Summary | None) -> str:
    if summary is None:
        return "-"
    if figure == "seconds":
        return duration(summary.mean)
    form = ",.0f" if figure == "speed" else ".4f"
    spread = "" if summary.spread is None else f" \u00b1 {summary.spread:{form}}"
    return f"{summary.mean:{form}}{spread}"


def _shown(value: Any) -> str:
    return "-" if value is None else in_yaml(value)
