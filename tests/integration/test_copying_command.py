"""A model that has learned its text by heart is told from one that has not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fundamentallm.engine.cli import main

CONFIG = """
name: heart
data: {source: text.txt, sequence_length: 64, batch_size: 8}
model: {d_model: 64, num_layers: 2, num_heads: 2}
training: {total_steps: 500, eval_steps: 500, learning_rate: 3e-3, scheduler: cosine}
handlers: {tensorboard: false, samples: false}
"""


@pytest.mark.long
def test_an_overfitted_run_copies_three_times_as_much_as_validation_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(200)]
    Path("text.txt").write_text(" ".join(rng.choices(words, k=500)))
    Path("heart.yaml").write_text(CONFIG)
    assert main(["run", "heart.yaml"]) == 0
    capsys.readouterr()
    arguments = ["--max-tokens", "200", "--temperature", "0.3", "--check-copying"]
    last = "runs/heart/checkpoints/last"
    assert main(["generate", last, "--num-samples", "4", *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    spans = {
        kind: [int(row[2]) for row in rows if row[:1] == [kind] and row[1].isdigit()]
        for kind in ("sample", "validation")
    }
    mean = {kind: sum(lengths) / len(lengths) for kind, lengths in spans.items() if lengths}
    assert mean["sample"] >= 3 * mean["validation"], spans
