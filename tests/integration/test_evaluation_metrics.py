"""Metrics of the validation pass, from a line of YAML to every place where `val/loss` stands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fundamentallm.config import RunConfig
from fundamentallm.engine.cli import main
from fundamentallm.engine.wiring.assemble import check_names
from fundamentallm.errors import ConfigError
from fundamentallm.training.metrics import METRICS

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 2}
model: {d_model: 16, num_layers: 1, num_heads: 2, dropout: 0.1}
training: {learning_rate: 1e-2, total_steps: 4, eval_steps: 2}
handlers: {samples: false, progress: false}
"""
CHOICE = """\
evaluation:
  metrics:
    accuracy:
    entropy: {}
    top_3: {name: top_k, k: 3}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fundamentallm.engine.check._SECONDS", 0.1)  # of steps that it times
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG + CHOICE)
    return tmp_path


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]


def test_they_are_logged_and_evaluate_prints_the_same_figures(capsys):
    assert main(["run", "tiny.yaml"]) == 0
    last = lines()[-1]
    measured = {name: last[f"val/{name}"] for name in ("accuracy", "entropy", "top_3")}
    assert 0 < measured["accuracy"] < measured["top_3"] < 1
    said = f", accuracy {measured['accuracy']:.4g}, entropy {measured['entropy']:.4g}, top_3 "
    output = capsys.readouterr()
    assert said in output.err
    (done,) = (line for line in output.out.splitlines() if line.startswith("Validation loss"))
    assert said in done
    assert main(["check", "tiny.yaml"]) == 0
    assert (
        "validation       loss, perplexity, accuracy, entropy, top_3\n" in capsys.readouterr().out
    )

    (board,) = Path("runs/tiny/tensorboard").iterdir()
    assert b"val/accuracy" in board.read_bytes()

    assert main(["evaluate", "runs/tiny/checkpoints/step-00000004", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["metrics"] == pytest.approx(measured, rel=1e-6)
    assert told["metrics"]["accuracy"] == measured["accuracy"]
    assert told["loss"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert main(["evaluate", "runs/tiny/checkpoints/step-00000004"]) == 0
    assert f"accuracy            {measured['accuracy']:.4f}\n" in capsys.readouterr().out


PLUGIN = """
import torch
from ignite.metrics import Metric
from ignite.metrics.metric import sync_all_reduce
from fundamentallm.training.metrics import METRICS


@METRICS.register("share_below")
class ShareBelow(Metric):
    def __init__(self, bound: float = 1.0, device="cpu"):
        self.bound = bound
        super().__init__(device=device)

    def reset(self):
        self.below, self.count = torch.zeros((), dtype=torch.int64, device=self._device), 0

    def update(self, output):
        y_pred, y = output
        nll = -y_pred.log_softmax(1).gather(1, y[:, None])
        self.below += (nll < self.bound).sum().to(self._device)
        self.count += len(y)

    @sync_all_reduce("below", "count")
    def compute(self):
        return self.below.item() / self.count
"""


def test_a_run_goes_on_with_a_metric_of_a_plugin_and_stays_the_same_run(capsys):
    Path("own_metric.py").write_text(PLUGIN)
    assert main(["run", "tiny.yaml"]) == 0
    Path("tiny.yaml").write_text(
        CONFIG.replace("total_steps: 4", "total_steps: 6")
        + "plugins: [own_metric]\nevaluation: {metrics: {share_below: {bound: 4.0}}}\n"
    )
    assert main(["run", "tiny.yaml", "--resume", "runs/tiny"]) == 0
    assert not Path("runs/tiny-2").exists()
    last = lines()[-1]
    assert last["step"] == 6
    assert 0 < last["val/share_below"] < 1
    assert "val/accuracy" not in last

    checkpoint = "runs/tiny/checkpoints/step-00000006"
    capsys.readouterr()
    assert main(["evaluate", checkpoint, "--json", "--plugins", "own_metric"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == {
        "share_below": last["val/share_below"]
    }


def test_evaluate_leaves_out_a_metric_whose_plugin_is_not_named(capsys, monkeypatch):
    monkeypatch.setattr(METRICS, "_factories", dict(METRICS._factories))
    Path("own_metric_2.py").write_text(PLUGIN.replace("share_below", "share_under"))
    yaml = CONFIG + "evaluation: {metrics: {accuracy: {}, share_under: {}}}\n"
    Path("tiny.yaml").write_text(yaml)
    assert main(["run", "tiny.yaml", "--plugins", "own_metric_2"]) == 0
    del METRICS._factories["share_under"]
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["metrics"].keys() == {"accuracy"}
    assert "metric 'share_under' is left out: name its plugin with --plugins" in told.err


@pytest.mark.parametrize(
    ("metrics", "line", "key", "message"),
    [
        ("{accuracy: {}, tok_k: {}}", 7, "tok_k", "unknown metric 'tok_k'"),
        ("{top_k: {n: 3}}", 7, "top_k.n", "metric 'top_k' has no option 'n'"),
        ("{accuracy: {k: 3}}", 7, "accuracy.k", "metric 'accuracy' has no option 'k'"),
        ("{loss: {}}", 7, "loss", "loss is always measured"),
        ("{'a b': {name: accuracy}}", 7, "a b", "stands in the logs as val/NAME"),
        ("[accuracy]", 7, "", "metrics are chosen by name"),
        ("{best: {name: [top_k]}}", 7, "best.name", "chosen by its name"),
    ],
)
def test_a_fault_is_told_with_its_line(metrics, line, key, message):
    Path("tiny.yaml").write_text(CONFIG + f"evaluation:\n  metrics: {metrics}\n")
    with pytest.raises(ConfigError, match=message) as caught:
        check_names(RunConfig.from_yaml("tiny.yaml"))
    assert caught.value.where == f"tiny.yaml:{line}: evaluation.metrics.{key}".rstrip(".")


def test_a_k_beyond_the_vocabulary_is_refused_before_the_first_step(capsys):
    assert main(["run", "tiny.yaml", "evaluation.metrics.top_3.k=1000"]) == 2
    assert "k must be 1 to" in capsys.readouterr().err


def test_the_forms_of_a_choice_mean_the_same_and_survive_yaml():
    forms = "{a: accuracy, b: {name: accuracy}, accuracy: true, entropy: , top_k: false}"
    config = RunConfig.from_yaml(f"evaluation: {{metrics: {forms}}}\n")
    metrics = config.evaluation.metrics
    assert [(key, chosen.name) for key, chosen in metrics.items()] == [
        ("a", "accuracy"),
        ("b", "accuracy"),
        ("accuracy", "accuracy"),
        ("entropy", "entropy"),
    ]
    assert RunConfig.from_yaml(config.to_yaml()) == config


def test_metrics_that_nothing_computes_are_told(capsys):
    options = ["handlers.evaluation=false", "training.total_steps=1"]
    assert main(["run", "tiny.yaml", *options]) == 0
    told = capsys.readouterr()
    assert "evaluation.metrics has no effect: the handler evaluation" in told.out + told.err


JUDGED = """\
handlers:
  samples: false
  progress: false
  early_stopping: {patience: 1, metric: val/accuracy, mode: max}
  checkpointing: {metric: val/accuracy, mode: max}
"""


def test_a_metric_ends_the_run_and_says_which_checkpoint_is_the_best(capsys):
    text = (CONFIG + CHOICE).replace("handlers: {samples: false, progress: false}\n", JUDGED)
    Path("tiny.yaml").write_text(text.replace("total_steps: 4", "total_steps: 40"))
    assert main(["run", "tiny.yaml"]) == 0
    accuracies = {line["step"]: line["val/accuracy"] for line in lines() if "val/loss" in line}
    *steps, last = accuracies
    values = [accuracies[step] for step in steps]
    assert values == sorted(set(values))  # it rose until the run ended
    assert accuracies[last] <= values[-1]
    assert Path("runs/tiny/checkpoints/best").read_text().strip() == f"step-{steps[-1]:08d}"
    said = capsys.readouterr().out
    assert f"(no higher val/accuracy in 1 evaluations (best {values[-1]:.4f}))" in said
    assert f" (best val/accuracy {values[-1]:.4g} at step {steps[-1]}), " in said


@pytest.mark.parametrize(
    ("handler", "options", "key", "message"),
    [
        ("early_stopping", "{metric: val/acuracy, mode: max}", "metric", "does not measure"),
        ("checkpointing", "{metric: val/acuracy, mode: max}", "metric", "does not measure"),
        ("early_stopping", "{metric: val/accuracy}", "mode", "lower or a higher val/accuracy"),
    ],
)
def test_a_metric_that_cannot_judge_is_told_with_its_line(handler, options, key, message, capsys):
    text = (CONFIG + CHOICE).replace("progress: false}", f"progress: false, {handler}: {options}}}")
    Path("tiny.yaml").write_text(text)
    for command in ("check", "run"):
        assert main([command, "tiny.yaml"]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert f"tiny.yaml:5: handlers.{handler}.{key}" in told
    assert ("val/loss, val/perplexity, val/bits_per_byte, val/accuracy" in told) == (key != "mode")
