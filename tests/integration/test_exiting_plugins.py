"""A plugin that ends the program does not pass for a run that is done."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests import forked

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 4, eval_steps: 2}
handlers: {tensorboard: false, samples: false, progress: false%s}
plugins: [leaving]
"""
ON_IMPORT = "import sys\nsys.exit(%s)\n"
IN_A_STEP = """\
import sys
from ignite.engine import Events
from fundamentallm.training.handlers import HANDLERS


@HANDLERS.register("leaving")
class Leaving:
    def attach(self, trainer):
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: sys.exit(%s))
"""


# Each starts a process; the default run has one on import and one in a step.
@pytest.mark.parametrize(
    ("plugin", "more", "code"),
    [
        pytest.param(ON_IMPORT, "", "0", id="import-0"),
        pytest.param(ON_IMPORT, "", "", id="import", marks=pytest.mark.long),
        pytest.param(IN_A_STEP, ", leaving: {}", "0", id="step-0"),
        pytest.param(IN_A_STEP, ", leaving: {}", "", id="step", marks=pytest.mark.long),
    ],
)
def test_the_run_ends_with_an_error(tmp_path, monkeypatch, plugin, more, code):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, tmp_path / "text.txt")
    (tmp_path / "tiny.yaml").write_text(CONFIG % more)
    (tmp_path / "leaving.py").write_text(plugin % code)
    done = forked.run(["run", "tiny.yaml"], tmp_path)
    assert done.returncode == 2
    assert "plugin" in done.stderr
    assert "Traceback" not in done.stderr
