"""Memory that runs out on one of two ranks: both end, and the last checkpoint is kept."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests import forked

from fundamentallm.training.checkpoint.store import CheckpointStore

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
PLUGIN = """\
import os, torch
from fundamentallm.events import TrainingEvents
from fundamentallm.training.handlers.base import HANDLERS

@HANDLERS.register("full")
class Full:
    def attach(self, trainer):
        def fail():
            if trainer.state.iteration == 5 and os.environ["RANK"] == "1":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        trainer.add_event_handler(TrainingEvents.FLLM_MICRO_BATCH_COMPLETED, fail)
"""
CONFIG = """\
name: tiny
data: {source: text.txt, sequence_length: 16, batch_size: 4}
model: {d_model: 16, num_layers: 1, num_heads: 2}
training: {total_steps: 12, checkpoint_steps: 2}
handlers: {full: {}}
plugins: [full_plugin]
"""


@pytest.mark.long  # one process: tests/unit/test_memory.py
def test_two_ranks_end_where_one_runs_out(tmp_path):
    shutil.copy(TEXT, tmp_path / "text.txt")
    (tmp_path / "full_plugin.py").write_text(PLUGIN)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(  # a hang is a TimeoutExpired
        [sys.executable, *launcher, "-m", "fundamentallm.engine", "run", "tiny.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=forked.SECONDS,
    )
    assert ended.returncode != 0
    assert "error on rank 1: out of memory at step 5; the last checkpoint is kept" in ended.stderr
    assert "gradient_checkpointing" in ended.stderr
    newest = CheckpointStore(tmp_path / "runs" / "tiny" / "checkpoints").newest()
    assert newest is not None
    assert newest.step == 4
