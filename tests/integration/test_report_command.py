"""The `report` and `compare` commands on runs that `run` made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.runs import copied, trained

from fundamentallm.engine.cli import main
from fundamentallm.files.lock import run_lock
from fundamentallm.reports.page import chart_data
from fundamentallm.reports.run_data import read_run, stamp
from fundamentallm.training.checkpoint.store import CheckpointStore

EXCERPT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = f"""
name: tiny
data: {{source: {EXCERPT}, sequence_length: 16, batch_size: 4}}
model: {{d_model: 16, num_layers: 1, num_heads: 2}}
training: {{total_steps: 6, eval_steps: 3, log_steps: 1}}
handlers: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("trained"), CONFIG)


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return copied(finished, tmp_path / "copy", monkeypatch)


def test_the_page_shows_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert "tiny: finished: the last step is done" in capsys.readouterr().out
    page = (run / "report.html").read_text(encoding="utf-8")
    store = CheckpointStore(run / "checkpoints")
    manifests = [store.manifest(store.directory / name) for name in store.step_names()]
    for manifest in manifests:
        assert manifest.hash in page
    data = manifests[0].metadata["data"]
    assert data["sha256"] in page
    assert manifests[0].metadata["versions"]["torch"] in page
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert page.count("<article>") == len(samples) == 2
    assert "learning_rate:" in page


def test_the_curves_are_the_metrics_of_the_run(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = {
        series["metric"]: list(zip(series["step"], series["value"], strict=True))
        for chart in chart_data([read_run(run)])["charts"]
        for series in chart["series"]
    }
    names = {name for line in lines for name in line if "/" in name}
    assert shown == {
        name: [(line["step"], line[name]) for line in lines if name in line] for name in names
    }


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["report", "--out", "{run}"], 2, "write {run}/page.html"),
        (["compare", "--out", "{run}"], 2, "write {run}/page.html"),
        (["report", "--out", "{run}/no/page.html"], 5, "make the directory first"),
        (["report", "--watch", "--out", "page.html"], 2, "leave out --out or --watch"),
        (["report", "--port", "8000"], 2, "add --watch"),
    ],
)
def test_a_page_that_cannot_be_written_is_told_first(
    run: Path, words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.rglob("*"))
    assert main([words[0], str(run), *(word.format(run=run) for word in words[1:])]) == code
    assert says.format(run=run) in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_report_does_not_disturb_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--out", "page.html"]) == 0
    assert main(["report", str(run / "checkpoints" / "best")]) == 0
    assert Path("page.html").read_bytes() == (run / "report.html").read_bytes()
    assert main(["run", "tiny.yaml"]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["samples.jsonl", "metrics.jsonl", "log.txt", "config.yaml"])
def test_a_run_that_lacks_a_file_is_reported(run: Path, missing: str) -> None:
    (run / missing).unlink()
    assert main(["report", str(run)]) == 0


def test_a_damaged_checkpoint_is_named(run: Path) -> None:
    manifest = run / "checkpoints" / "step-00000003" / "MANIFEST.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"versions", b"verzions"))
    entries = {entry.name: entry for entry in read_run(run).checkpoints}
    assert "manifest is damaged" in entries["step-00000003"].fault
    assert not entries["step-00000006"].fault


def test_a_run_whose_lock_is_held_is_running(run: Path) -> None:
    assert not read_run(run).is_running
    before = stamp(run)
    with run_lock(run):
        assert read_run(run).state == "running"
        assert stamp(run) != before  # so a page that is served follows
    assert stamp(run) == before


def test_a_run_without_an_end_is_not_finished(run: Path) -> None:
    (run / "checkpoints" / "scores.jsonl").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert read_run(run).state == "not finished"


def test_runs_are_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, "runs/other")
    config = Path("runs/other/config.yaml")
    config.write_text(config.read_text().replace("seed: 42", "seed: 43"))
    capsys.readouterr()
    assert main(["compare", "runs/tiny", "runs/other", "--json"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["seeds"] == [42, 43]
    assert group["figures"]["best"]["count"] == 2
    assert not Path("comparison.html").exists()
    assert main(["compare", "runs/tiny", "runs/other"]) == 0
    assert "group 1: tiny (seed 42, finished), other (seed 43, finished)" in capsys.readouterr().out
    assert Path("comparison.html").read_text(encoding="utf-8").count('"metric":"val/loss"') == 2


# Two-sided critical values of Student's t at 5 %, by degrees of freedom, from the tables.
CRITICAL = {2: 4.302653, 3: 3.182446, 4: 2.776445}


@pytest.mark.long
@pytest.mark.parametrize(
    ("rates", "verdict"), [((3e-2, 1e-5), "a difference"), ((1e-3, 1.001e-3), "within chance")]
)
def test_three_seeds_of_two_rates_are_judged_as_by_hand(
    rates: tuple[float, float],
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    best: dict[float, list[float]] = {rate: [] for rate in rates}
    runs = []
    for rate in rates:
        for seed in (1, 2, 3):
            run = f"runs/{rate}-{seed}"
            words = [f"training.learning_rate={rate}", f"seed={seed}", "handlers.samples=false"]
            assert main(["run", "tiny.yaml", *words, "--run-dir", run]) == 0
            lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
            best[rate].append(min(line["val/loss"] for line in lines if "val/loss" in line))
            runs.append(run)
    capsys.readouterr()
    assert main(["compare", *runs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    means = {rate: sum(losses) / 3 for rate, losses in best.items()}
    squares = {r: sum((x - means[r]) ** 2 for x in losses) / 2 for r, losses in best.items()}
    first, second = sorted(rates, key=means.__getitem__)
    assert [group["settings"]["training.learning_rate"] for group in found["groups"]] == [
        first,
        second,
    ]
    for group, rate in zip(found["groups"], (first, second), strict=True):
        figures = group["figures"]["best"]
        assert figures["mean"] == pytest.approx(means[rate], rel=1e-12)
        assert figures["spread"] == pytest.approx(squares[rate] ** 0.5, rel=1e-9)
        assert figures["count"] == 3
        assert group["seeds"] == [1, 2, 3]
    a, b = squares[first] / 3, squares[second] / 3
    t = (means[second] - means[first]) / (a + b) ** 0.5
    degrees = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    (judged,) = found["verdicts"]
    assert judged["t"] == pytest.approx(t, rel=1e-9)
    assert judged["degrees"] == pytest.approx(degrees, rel=1e-9)
    low, high = CRITICAL[min(int(degrees) + 1, 4)], CRITICAL[int(degrees)]
    assert not low < t < high  # the table decides
    assert judged["words"] == ("a difference" if t >= high else "within chance") == verdict
