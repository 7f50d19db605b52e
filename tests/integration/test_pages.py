"""Each fenced block of a page is executed or checked, or the page says why it is not.

Commands run in the order of
their page, in a folder that has a short run `runs/mine`, with the small budgets of `SMALL` added.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from ignite.metrics import Accuracy, Loss
from tests.pages import DOCS, ROOT, blocks, code, commands, indented

from fundamentallm.engine.cli import main

FINE_TUNING = ROOT / "docs/fine-tuning.md"
MODEL = ["model.d_model=32", "model.num_layers=1", "model.num_heads=2"]
DATA = ["data.sequence_length=16", "data.batch_size=2"]
STEPS = ["training.total_steps=4", "training.warmup_steps=1", "training.eval_steps=2"]
SMALL = {"run": [*MODEL, *DATA, *STEPS], "tune": [*MODEL, *DATA, *STEPS, "--seconds", "5"]}
"""What is added to the commands of a page, so that they end within seconds."""


WITH_COMMANDS = [page for page in DOCS if commands(page)]


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_each_block_is_of_a_kind_that_is_tested_or_says_why_not(page):
    fences = re.findall("^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(fences) == 2 * len(blocks(page))
    for block in blocks(page):
        assert block["reason"] or block["kind"] in ("bash", "python", "yaml"), block["code"]
    assert indented(page) == []


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_a_page_has_only_commands_of_this_package(page):
    assert {words[0] for words in commands(page)} <= {"fundamentallm", "torchrun"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    text = (ROOT / "examples/data/tiny.txt").read_text(encoding="utf-8")
    (pairs,), (settings,) = code(FINE_TUNING, "json"), code(FINE_TUNING, "yaml")
    text += pairs  # so that the character vocabulary has its letters
    (folder / "answers.jsonl").write_text(pairs * 8)
    (folder / "answers.yaml").write_text(settings)
    (folder / "config.yaml").write_text("data: {global_batch: 4}\n")
    for name in ("my_texts", "notes", "corpus"):
        (folder / name).mkdir()
    (folder / "my_texts/a.txt").write_text(text)
    (folder / "notes/a.txt").write_text(text)
    with gzip.open(folder / "corpus/a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": text}) + "\n")
    shutil.copytree(ROOT / "configs", folder / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, seed in (("mine", 1), ("mine-2", 2), ("other", 3), ("quickstart", 4)):
            config = "quickstart" if name == "quickstart" else "train"  # of blocks as `new` writes
            words = ["run", config, f"name={name}", f"seed={seed}", "data.source=my_texts/"]
            length = ["data.sequence_length=64"] if name == "mine" else []  # for whole answers
            assert main([*words, *SMALL["run"], *length]) == 0
    return folder


def launched(words: list[str]) -> None:
    """Run a command of torchrun with two ranks."""
    words = [re.sub(r"(?<=nproc_per_node=)\d+", "2", word) for word in words]
    added = [*SMALL["run"], "data.source=my_texts/", "name=page", "training.device=cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *added],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_the_commands_of_a_page_work(page, trained, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    for program, *words in commands(page):
        if program == "torchrun":
            launched(words)
            continue
        small = list(SMALL.get(words[0], ()))
        if words[0] == "run" and words[1] == "answers.yaml":
            small = [*STEPS, "training.num_epochs=1"]
        elif words[0] == "run" and not any(word.startswith("data.source=") for word in words):
            small.append("data.source=my_texts/")  # the page's own text may be large or far away
            small.append("name=page")
        if "--learning-rate" in words:
            small = ["training.total_steps=200", *MODEL, *DATA, "data.source=my_texts/"]
        assert main([*words, *small]) == 0, words


@pytest.mark.long
def test_the_python_of_the_page_on_evaluation_runs_in_the_readmes_script(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    (script,) = re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    names = {"__name__": "page", "my_function": torch.nn.functional.cross_entropy}
    names |= {"Accuracy": Accuracy, "Loss": Loss, "EarlyStopping": EarlyStopping, "Events": Events}
    exec(script.partition("history = ")[0] + "other_loader = val_loader", names)
    page = blocks(ROOT / "docs/generate-and-evaluate.md")
    for block in page:
        if block["kind"] == "python":
            exec(block["code"] or "", names)
    metrics = names["trainer"].evaluator.state.metrics
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["mine"] == pytest.approx(metrics["loss"], rel=1e-4)


def test_every_page_with_python_is_executed_by_a_test():
    python = {page.name for page in DOCS if any(b["kind"] == "python" for b in blocks(page))}
    others = {page.name for page in DOCS if page.name.startswith("from-")}  # test_pages_from_others
    # tests/outside/test_llama_cpp.py executes the one of export.md
    assert python == {*others, "generate-and-evaluate.md", "export.md"}
