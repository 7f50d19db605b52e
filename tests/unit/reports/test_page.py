"""The page of a run: its data is that of the files, its texts are never markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.errors import CheckpointError
from fundamentallm.reports.curves import MAX_VALUES
from fundamentallm.reports.page import duration, page
from fundamentallm.reports.run_data import MAX_SAMPLES, read_run

VOID = {"meta", "input"}
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"&amp;<!--]]>"
    "\u202e\x00\x1b[31m\ud800\u2028{{x}}"
)


class Page(HTMLParser):
    """The elements of a page, each with its attributes and its text."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.content = content.decode()
        self.feed(self.content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [""])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text[0] += data

    def texts(self, tag: str) -> list[str]:
        return [text[0] for name, _, text in self.elements if name == tag]

    @property
    def data(self) -> Any:
        (found,) = [
            text[0] for _, attributes, text in self.elements if attributes.get("id") == "data"
        ]
        return json.loads(found)

    def series(self, metric: str) -> Any:
        return next(
            series
            for chart in self.data["charts"]
            for series in chart["series"]
            if series["metric"] == metric
        )


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def record(step: int, **metrics: float | str) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"step": step, "epoch": 1, "tokens": 64 * step, "elapsed_seconds": step / 8, **named}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "config.yaml").write_text("name: mine\n")
    return path


def test_the_data_is_that_of_the_metrics(run: Path) -> None:
    lines = [record(step, train__loss=1 / step, train__own=step * 0.1) for step in range(1, 60)]
    lines.insert(30, record(30, val__loss=2.0123456789012345))
    lines[5] = record(6, train__loss="NaN", train__own=1e-300)
    write_lines(run / "metrics.jsonl", lines)
    shown = Page(page([read_run(run)]))
    for metric in ("train/loss", "train/own", "val/loss"):
        expected = [line for line in lines if metric in line]
        series = shown.series(metric)
        for name, key in (("step", "step"), ("tokens", "tokens"), ("seconds", "elapsed_seconds")):
            assert series[name] == [line[key] for line in expected]
        assert series["value"] == [line[metric] for line in expected]
        assert "bins" not in series


def test_a_long_run_is_small_and_keeps_its_incidents(run: Path) -> None:
    lines = [record(step, train__loss=3 + (step * 7919 % 1000) / 1e3) for step in range(1, 20_001)]
    write_lines(run / "metrics.jsonl", lines)
    write_incident(run, 777, "loss is NaN")
    series = Page(page([read_run(run)])).series("train/loss")
    assert len(series["value"]) <= MAX_VALUES + 1
    assert series["value"][series["step"].index(777)] == lines[776]["train/loss"]
    assert sum(count for _, _, count in series["bins"]) == 20_000


def write_incident(run: Path, step: int, fault: str, verdict: str = "data") -> None:
    directory = run / "incidents" / f"{step:08d}-{verdict}"
    directory.mkdir(parents=True)
    report = {"step": step, "fault": fault, "verdict": verdict, "decision": "skipped"}
    (directory / "report.json").write_text(json.dumps(report))


def test_incidents_and_rollbacks_are_marks_with_their_text(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [record(1, train__loss=1.0)])
    write_incident(run, 12, "the loss is NaN")
    (run / "log.txt").write_text(
        "2026-01-01 00:00:00,000 WARNING went back from step 12 to step 10 (bad data)\nother\n"
    )
    shown = Page(page([read_run(run)]))
    assert [(mark["step"], mark["kind"]) for mark in shown.data["marks"]] == [
        (12, "incident"),
        (12, "rollback"),
    ]
    cells = shown.texts("td")
    assert "the loss is NaN; verdict data: skipped" in cells
    assert "went back from step 12 to step 10 (bad data)" in cells


def test_every_text_of_a_run_is_data(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    hostile = tmp_path / "<img src=x onerror=alert(1)>\u202e&"
    for path, text in ((plain, "text"), (hostile, HOSTILE)):
        path.mkdir()
        visible = "".join(c for c in text if c.isprintable())
        (path / "config.yaml").write_text(f"name: mine # {visible}\n")
        metric = "train/" + text
        write_lines(path / "metrics.jsonl", [{**record(1, train__loss=1.0), metric: 2.0}])
        copying = {"longest": 5, "start": 2, "place": text}
        sample = {"step": 1, "prompt": text, "text": text * 2, "copying": copying}
        write_lines(path / "samples.jsonl", [sample])
        write_incident(path, 1, text)
        (path / "log.txt").write_bytes(
            f"went back from step 1 to step 0 ({text})\n".encode(errors="replace")
        )
    for copies in (1, 2):
        good, bad = (Page(page([read_run(path)] * copies)) for path in (plain, hostile))
        # The same elements with the same kinds of attributes.
        kinds = [
            [(tag, sorted(attributes)) for tag, attributes, text in one.elements]
            for one in (good, bad)
        ]
        assert kinds[1].count(("script", [])) == 1
        assert kinds[0] == kinds[1]
        assert not [c for c in bad.content if ord(c) < 32 and c not in "\n\t"]
        assert not {"\u202e", "\u2028", "\ud800"} & set(bad.content)
        (sample,) = set(bad.texts("pre")[:copies])
        assert sample.startswith("</script><script>alert(1)</script><img src=x onerror=alert(1)>")
        assert bad.data["runs"] == [hostile.name] * copies


def test_the_page_asks_for_nothing(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [record(1, train__loss=1.0)])
    shown = Page(page([read_run(run)]))
    (policy,) = [
        attributes["content"]
        for tag, attributes, _ in shown.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'none'" in policy
    loading = {"src", "srcset", "action", "data", "poster"}
    assert not [attributes for _, attributes, _ in shown.elements if loading & set(attributes)]
    links = [attributes["href"] for _, attributes, _ in shown.elements if "href" in attributes]
    assert links == ["#curves"]


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b'{"step": 1, "train/loss": 1.0}\n{"step": 2, "train/lo', ""),
        (b'{"step": 1, "train/loss": 1.0}\nnonsense\n[]\n{"step": -1}\n', "3 lines"),
        (b'{"step": 1, "train/loss": 1.0, "train/x": [], "train/y": 1e999}\n', ""),
        (b'{"step": 1, "train/loss": 1.0}\n' + b"[" * 100_000 + b"\n", "1 lines"),
    ],
    ids=["torn", "foreign", "not numbers", "deep"],
)
def test_a_damaged_file_is_read_as_far_as_it_goes(run: Path, content: bytes, note: str) -> None:
    (run / "metrics.jsonl").write_bytes(content)
    data = read_run(run)
    assert data.curves["train/loss"].values == [1.0]
    assert set(data.curves) == {"train/loss"}
    assert note in " ".join(data.notes)
    page([data])


def test_links_in_a_run_are_not_followed(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"step": 1, "text": "secret", "train/loss": 1.0}\n')
    for name in ("metrics.jsonl", "samples.jsonl", "log.txt"):
        (run / name).symlink_to(secret)
    (run / "incidents").symlink_to(tmp_path)
    data = read_run(run)
    assert not data.curves
    assert not data.samples
    assert len(data.notes) == 4


def test_of_many_samples_the_first_and_the_last_are_shown(run: Path) -> None:
    lines = [{"step": step, "prompt": "", "text": str(step)} for step in range(1, 1_001)]
    write_lines(run / "samples.jsonl", lines)
    data = read_run(run)
    steps = [sample.step for sample in data.samples]
    assert len(steps) == MAX_SAMPLES
    assert (steps[0], steps[-1]) == (1, 1000)
    assert steps == sorted(set(steps))
    assert data.num_samples == 1000


def test_what_a_sample_copies_is_beside_it(run: Path) -> None:
    copying = {
        "longest": 4,
        "start": 3,
        "place": "a.txt:2:7",
        "distinct": 0.5,
        "repeated": 2,
        "searched": 2_000_000,
        "whole": False,
        "validation": {"longest": 1.75, "distinct": 0.9, "repeated": 3.0, "count": 4},
    }
    lines = [
        {"step": 1, "prompt": "p", "text": "of an older run"},
        {"step": 2, "prompt": "p", "text": "foreign", "copying": {"longest": "4", "place": 3}},
        {"step": 3, "prompt": "p", "text": "is COPIED", "copying": copying},
    ]
    write_lines(run / "samples.jsonl", lines)
    shown = Page(page([read_run(run)]))
    latest, *earlier = shown.texts("article")
    assert latest.endswith(
        "pis COPIED4 characters at most are also in the training text, underlined, at a.txt:2:7"
        " (validation text: 2); 50% of the 4-grams of words are different (validation text: 90%);"
        " 2 characters at most are repeated (validation text: 3); only the first 2,000,000"
        " characters were searched."
    )
    assert shown.texts("u") == ["COPI"]
    assert ["was not measured" in text for text in earlier] == [True, True]


def test_time_and_energy_add_up_over_the_processes(run: Path) -> None:
    lines = [
        {"process": 1.5, "step": 1, "seconds": {"start": 1.0, "training": 2.0}, "joules": {}},
        {"process": 1.5, "step": 5, "seconds": {"start": 1.0, "training": 60.0}, "joules": {}},
        {"process": 2.5, "step": 9, "seconds": {"start": 2.0}, "joules": {HOSTILE: 7200.0}},
        {"process": "1", "step": 9, "seconds": {"start": 2.0}},
        {"process": 3.5, "step": 9, "seconds": {"start": "x", "training": -1.0}, "joules": 3},
    ]
    write_lines(run / "usage.jsonl", lines)
    data = read_run(run)
    assert data.spent.seconds == {"start": 3.0, "training": 60.0}
    cells = Page(page([data])).texts("td")
    assert "3.0 s (5%)" in cells
    assert "1 min 0 s (95%)" in cells
    assert "1 min 3 s in 3 processes" in cells
    assert "2.00 Wh" in cells
    (run / "usage.jsonl").unlink()
    write_lines(run / "metrics.jsonl", [record(80, train__loss=1.0)])
    old = page([read_run(run)]).decode()
    assert "without times by phase" in old
    assert "<td>10.0 s</td>" in old


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match="no run or checkpoint"):
        read_run(tmp_path / "missing")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 1 s"), (7265, "2 h 1 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
