"""The page of one run or several: one HTML file that loads nothing.

Text, tables and the values of all curves are in the file; `page.js` draws the curves. The page's
own policy forbids any other script, style, image or request.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fundamentallm.reports.curves import MAX_VALUES, Curve, drawn
from fundamentallm.reports.html import Html, escaped, joined, json_block, table, tag
from fundamentallm.reports.run_data import CheckpointEntry, RunData, Sample

MAX_ALL_VALUES = 60_000
"""Values of all curves of a page, about 4 MB; beyond it, curves have fewer than `MAX_VALUES`."""

LOSSES = ("train/loss", "train/loss_ema", "val/loss")
UNITS = {
    **dict.fromkeys((*LOSSES, "train/epoch_loss"), "nats per token"),
    "train/grad_norm": "norm before clipping",
    "train/tokens_per_second": "tokens per second",
    "train/samples_per_second": "sequences per second",
}
TITLES = {
    "train/loss": "Training loss",
    "train/loss_ema": "Training loss, smoothed",
    "val/loss": "Validation loss",
    "train/lr": "Learning rate",
    "train/grad_norm": "Gradient norm",
    "train/tokens_per_second": "Speed",
}
"""Metrics with a title of their own, in the order of the charts."""

LABELS = {
    "train/loss": "training",
    "train/loss_ema": "training, smoothed",
    "val/loss": "validation",
}


def page(
    runs: Sequence[RunData], comparison: Html | None = None, refresh: float | None = None
) -> bytes:
    """Return the page.

    Args:
        runs: at least one.
        comparison: a section that compares them, if there is one.
        refresh: seconds between two looks for news, for a page that is served; None for a file.
    """
    title = " and ".join(run.name for run in runs[:3]) + (" and others" if len(runs) > 3 else "")
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_fingerprint(style)}';"
        f" script-src '{_fingerprint(script)}'; connect-src '{'self' if refresh else 'none'}';"
        " base-uri 'none'; form-action 'none'"
    )
    payload = {"refresh": refresh, **chart_data(runs)}
    heading = f"Run {title}" if len(runs) == 1 else f"Runs {title}"
    body = joined(
        tag("a", "Skip to the curves", href="#curves", class_="skip"),
        tag("header", tag("h1", tag("bdi", heading)), tag("p", _state(runs), id="state")),
        tag(
            "main",
            *([_live("comparison", comparison)] if comparison else []),
            _live("overview", _overview(runs)),
            _curves(),
            _live("figures", _figures(runs)),
            _live("changes", _changes(runs)),
            _live("marks", _marks(runs)),
            _live("samples", _samples(runs)),
            _live("configuration", _configuration(runs)),
            _live("spent", _spent(runs)),
            _live("facts", _facts(runs)),
            _live("checkpoints", _checkpoints(runs)),
        ),
        json_block(payload, "data"),
        tag("script", Html(script)),
    )
    head = joined(
        Html('<meta charset="utf-8">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        tag("title", heading),
        tag("style", Html(style)),
    )
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    return text.encode()


def chart_data(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return what `page.js` draws: the names of the runs, the charts with their series, the marks.

    Each series has the number of its run, its metric, its label and its values (`curves.drawn`).
    """
    num_values = sum(
        min(len(curve.steps), MAX_VALUES) for run in runs for curve in run.curves.values()
    )
    num_curves = sum(len(run.curves) for run in runs)
    limit = MAX_VALUES if num_values <= MAX_ALL_VALUES else max(50, MAX_ALL_VALUES // num_curves)
    marks = [
        {"run": number, "step": mark.step, "kind": mark.kind, "text": mark.text}
        for number, run in enumerate(runs)
        for mark in run.marks
    ]
    charts = []
    for title, metrics in _charts(runs):
        series = [
            {
                "run": number,
                "metric": metric,
                "label": _label(run, metric, metrics, len(runs)),
                "color": number if len(runs) > 1 else metrics.index(metric),
                **drawn(run.curves[metric], {mark.step for mark in run.marks}, limit),
            }
            for number, run in enumerate(runs)
            for metric in metrics
            if metric in run.curves
        ]
        charts.append({"title": title, "unit": UNITS.get(metrics[0], ""), "series": series})
    return {"runs": [run.name for run in runs], "charts": charts, "marks": marks}


def _charts(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return title and metrics of each chart: a run's losses share one, those of several do not."""
    present = {name for run in runs for name in run.curves}
    ordered = [*(name for name in TITLES if name in present), *sorted(present - set(TITLES))]
    if len(runs) > 1:
        return [(TITLES.get(name, name), [name]) for name in ordered]
    losses = [name for name in LOSSES if name in present]
    rest = [(TITLES.get(name, name), [name]) for name in ordered if name not in losses]
    return [("Loss", losses), *rest] if losses else rest


def _label(run: RunData, metric: str, metrics: Sequence[str], num_runs: int) -> str:
    if num_runs > 1:
        return run.name
    return LABELS.get(metric, metric) if len(metrics) > 1 else TITLES.get(metric, metric)


def _resource(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _fingerprint(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _live(identifier: str, section: Html) -> Html:
    return tag("section", section, id=identifier, data_live="")


def _state(runs: Sequence[RunData]) -> Html:
    if len(runs) == 1:
        return escaped(runs[0].state)
    states = [run.state.partition(":")[0] for run in runs]
    counts = (f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return escaped(f"{len(runs)} runs: {', '.join(counts)}")


def _overview(runs: Sequence[RunData]) -> Html:
    parts = [tag("h2", "Overview", class_="skip")]
    for run in runs:
        if len(runs) > 1:
            parts.append(tag("p", tag("b", tag("bdi", run.name)), f": {course(run)}"))
            continue
        val, speed = run.curves.get("val/loss"), run.curves.get("train/tokens_per_second")
        tiles = [("course", course(run))]
        if val is not None:
            best, last = val.lowest(), val.last()
            tiles += [("best validation loss (step)", _value(best))]
            tiles += [("last validation loss (step)", _value(last))]
        if speed is not None:
            tiles.append(("tokens per second, last (step)", _value(speed.last())))
        terms = (tag("div", tag("dt", term), tag("dd", value)) for term, value in tiles)
        parts.append(tag("dl", *terms))
    for run in runs:
        parts += [tag("p", f"{run.name}: {note}", class_="note") for note in run.notes]
    return joined(*parts)


def _figures(runs: Sequence[RunData]) -> Html:
    head = ["metric", "values", "first (step)", "last (step)", "lowest (step)", "highest (step)"]
    parts = []
    for run in runs:
        rows = []
        for metric in sorted(run.curves, key=_order):
            curve = run.curves[metric]
            finite = curve.finite()
            ends = (next(iter(finite), None), curve.last(), curve.lowest())
            highest = max(finite, key=lambda pair: pair[1], default=None)
            row = [metric, f"{len(curve.steps):,}", *map(_value, (*ends, highest))]
            rows.append(row)
        if rows:
            caption = f"Figures of {run.name}"
            parts.append(
                tag("details", tag("summary", caption), table(head, rows, caption, numbers=True))
            )
    return joined(*parts)


def _order(metric: str) -> tuple[int, str]:
    names = list(TITLES)
    return (names.index(metric) if metric in names else len(names), metric)


def _value(pair: tuple[int, float] | None) -> str:
    return "-" if pair is None else f"{pair[1]:,.6g} ({pair[0]:,})"


def course(run: RunData) -> str:
    """Return how far the run came, in words."""
    ends = [curve for curve in run.curves.values() if curve.steps]
    if not ends:
        return f"No metrics yet; {run.state}."
    longest: Curve = max(ends, key=lambda curve: curve.steps[-1])
    return (
        f"{longest.steps[-1]:,} steps, {longest.tokens[-1]:,} tokens in"
        f" {duration(longest.seconds[-1])}; {run.state}."
    )


def duration(seconds: float) -> str:
    """Return a time in words: 4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _name(run: RunData, runs: Sequence[RunData]) -> Html:
    return tag("h3", tag("bdi", run.name)) if len(runs) > 1 else Html("")


def _curves() -> Html:
    axes = [("step", "step"), ("tokens", "tokens"), ("seconds", "time")]
    choices = [tag("option", label, value=value) for value, label in axes]
    controls = tag(
        "div",
        tag("label", "horizontal axis ", tag("select", *choices, id="axis")),
        *(
            tag("label", Html(f'<input type="checkbox" id="{identifier}">'), f" {words}")
            for identifier, words in (("logx", "log horizontal"), ("logy", "log vertical"))
        ),
        tag("button", "Reset zoom", id="reset", type="button"),
        class_="controls",
    )
    how = (
        "Drag across a chart to zoom all of them; double-click to zoom out. By keyboard: arrows,"
        " Page Up and Down, Home and End move through the values, + and - zoom, Escape zooms out."
    )
    return tag(
        "section",
        tag("h2", "Curves"),
        tag("noscript", tag("p", "The curves need JavaScript; the figures are in the tables.")),
        controls,
        tag("p", how, class_="note"),
        tag("div", id="legend"),
        tag("div", id="charts"),
        id="curves",
    )


def _marks(runs: Sequence[RunData]) -> Html:
    parts = [tag("h2", "Incidents and rollbacks")]
    kinds = ("incident", "rollback")
    tables = _tables_of_marks(runs, kinds, "Incidents and rollbacks", "what happened")
    return joined(*parts, *(tables or [tag("p", "None.")]))


def _changes(runs: Sequence[RunData]) -> Html:
    """Return the changes of the configuration; nothing without any."""
    tables = _tables_of_marks(runs, ("change",), "Changes", "what changed")
    return joined(tag("h2", "Changes"), *tables) if tables else Html("")


def _tables_of_marks(
    runs: Sequence[RunData], kinds: Sequence[str], caption: str, what: str
) -> list[Html]:
    tables = []
    for run in runs:
        rows = [[f"{m.step:,}", m.kind, m.text] for m in run.marks if m.kind in kinds]
        if rows:
            tables.append(table(["step", "kind", what], rows, f"{caption} of {run.name}"))
    return tables


def _samples(runs: Sequence[RunData]) -> Html:
    parts = [tag("h2", "Samples")]
    if not any(run.samples for run in runs):
        parts.append(tag("p", "None."))
    for run in runs:
        parts.append(_name(run, runs) if run.samples else Html(""))
        if run.num_samples > len(run.samples):
            words = f"{len(run.samples):,} of {run.num_samples:,}, evenly chosen."
            parts.append(tag("p", words, class_="note"))
        *earlier, latest = [
            tag(
                "article",
                tag("h3" if len(runs) == 1 else "h4", f"Step {sample.step:,}"),
                tag("pre", tag("b", sample.prompt), *_copied(sample)),
                tag("p", copying_in_words(sample), class_="note"),
            )
            for sample in run.samples
        ] or [Html("")]
        parts.append(latest)
        if earlier:
            words = f"Earlier samples ({len(earlier):,}), oldest first"
            parts.append(tag("details", tag("summary", words), *earlier))
    return joined(*parts)


def _copied(sample: Sample) -> list[str]:
    """Return the text, with the longest span of the training text underlined."""
    start, length = (int(sample.copying.get(key, 0)) for key in ("start", "longest"))
    text, end = sample.text, start + length
    return [text[:start], tag("u", text[start:end]), text[end:]] if length else [text]


def copying_in_words(sample: Sample) -> str:
    """Say what a sample copies and repeats, with the same figures of validation text."""
    if "longest" not in sample.copying:
        return "Whether it copies was not measured; generate --check-copying measures a model."
    parts = []
    for key, form, words in (
        ("longest", ",.0f", "characters at most are also in the training text"),
        ("distinct", ".0%", "of the 4-grams of words are different"),
        ("repeated", ",.0f", "characters at most are repeated"),
    ):
        if key in sample.copying:
            usual = f" (validation text: {sample.usual[key]:{form}})" if key in sample.usual else ""
            where = f", underlined, at {sample.place}" if key == "longest" and sample.place else ""
            parts.append(f"{sample.copying[key]:{form}} {words}{where}{usual}")
    if not sample.copying.get("whole", 1):
        searched = sample.copying.get("searched", 0)
        parts.append(f"only the first {searched:,.0f} characters were searched")
    return "; ".join(parts) + "."


def _configuration(runs: Sequence[RunData]) -> Html:
    parts = [tag("h2", "Configuration")]
    for run in runs:
        words = "Every value, resolved" if len(runs) == 1 else run.name
        parts.append(
            tag(
                "details",
                tag("summary", words),
                tag("pre", run.config_text or "It cannot be read.", tabindex="0"),
            )
        )
    return joined(*parts)


def _spent(runs: Sequence[RunData]) -> Html:
    """Tell time by phase and energy; for a run that did not record it, the time of its metrics."""
    phases = list(dict.fromkeys(phase for run in runs for phase in run.spent.seconds))
    counters = list(dict.fromkeys(name for run in runs for name in run.spent.joules))
    rows = [[phase, *(_seconds_of(run, phase) for run in runs)] for phase in phases]
    rows.append(["altogether", *(_all_seconds(run) for run in runs)])
    for name in counters:
        cells = (
            f"{run.spent.joules[name] / 3600:,.2f} Wh" if name in run.spent.joules else "-"
            for run in runs
        )
        rows.append([f"energy: {name}", *cells])
    notes = []
    if not all(run.spent.seconds for run in runs):
        notes.append("A run without times by phase is of an older version, or usage is off.")
    if all(run.spent.joules for run in runs):
        notes.append("Energy is that of the whole processor or GPU, from the first step on.")
    else:
        notes.append(
            "No energy where the machine does not tell it: Linux lets a user read"
            " /sys/class/powercap/intel-rapl:*/energy_uj only if the administrator allows it, and"
            " an NVIDIA GPU needs nvidia-ml-py."
        )
    return joined(
        tag("h2", "Time and energy"),
        table(["phase", *(run.name for run in runs)], rows, "Time by phase, and energy"),
        *(tag("p", note, class_="note") for note in notes),
    )


def _seconds_of(run: RunData, phase: str) -> str:
    seconds, whole = run.spent.seconds.get(phase), sum(run.spent.seconds.values())
    return "-" if seconds is None else f"{duration(seconds)} ({seconds / max(whole, 1e-9):.0%})"


def _all_seconds(run: RunData) -> str:
    if run.spent.seconds:
        several = f" in {run.spent.num_processes} processes" if run.spent.num_processes > 1 else ""
        return f"{duration(sum(run.spent.seconds.values()))}{several}"
    seconds = max((curve.seconds[-1] for curve in run.curves.values()), default=None)
    return "-" if seconds is None else duration(seconds)


def _facts(runs: Sequence[RunData]) -> Html:
    topics = list(dict.fromkeys(topic for run in runs for topic in run.facts))
    if not topics:
        return joined(tag("h2", "Data, machine, versions"), tag("p", "No checkpoint tells."))
    rows = [[topic, *(run.facts.get(topic, "-") for run in runs)] for topic in topics]
    head = ["what", *(run.name for run in runs)]
    return joined(tag("h2", "Data, machine, versions"), table(head, rows, "From the checkpoints"))


def _checkpoints(runs: Sequence[RunData]) -> Html:
    parts = [
        tag("h2", "Checkpoints"),
        tag(
            "p",
            "A manifest has the SHA-256 of each file of its checkpoint, and the hash below proves"
            " the manifest. To check every byte: ",
            tag("code", shlex.join(["fundamentallm", "verify", str(runs[0].path)])),
        ),
    ]
    for run in runs:
        if not run.checkpoints:
            parts.append(tag("p", f"{run.name}: none."))
            continue
        rows = [_checkpoint_row(entry) for entry in run.checkpoints]
        head = ["checkpoint", "validation loss", "size", "pointers", "manifest's SHA-256"]
        parts.append(table(head, rows, f"Checkpoints of {run.name}"))
    return joined(*parts)


def _checkpoint_row(entry: CheckpointEntry) -> list[str]:
    loss = "-" if entry.val_loss is None else f"{entry.val_loss:.4f}"
    size = f"{entry.num_bytes / 2**20:,.1f} MiB" if entry.hash else "-"
    proof = tag("code", entry.hash) if entry.hash else f"damaged: {entry.fault}"
    return [entry.name, loss, size, ", ".join(entry.pointers), proof]
