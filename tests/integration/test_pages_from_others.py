"""The pages for those who come from other trainers: their blocks run, and the weights are equal."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# Each page with the packages that its blocks import.
PAGES = {
    "from-ignite.md": (),
    "from-nanogpt.md": (),
    "from-hugging-face.md": ("transformers", "accelerate"),
    "from-lightning.md": ("lightning",),
}


def code_of(page: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


def execute(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.random.get_rng_state()
    try:
        exec(code, {"__name__": "page"})
    finally:
        torch.random.set_rng_state(state)


def test_every_page_from_another_library_is_run() -> None:
    assert {path.name for path in (ROOT / "docs").glob("from-*.md")} == set(PAGES)
    assert all("assert_close(one, other" in code_of(page) for page in PAGES)


@pytest.mark.parametrize(
    "page", [pytest.param("from-ignite.md", marks=pytest.mark.long), "from-nanogpt.md"]
)
def test_the_same_job_there_and_here(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute(code_of(page), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("page", ["from-hugging-face.md", "from-lightning.md"])
def test_the_same_job_in_a_library_that_may_be_missing(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PAGES[page]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (the extras huggingface and peers)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what those libraries warn of is their matter
        execute(code_of(page), tmp_path, monkeypatch)


@pytest.mark.long
def test_the_part_of_hugging_faces_page_that_is_ours_runs_without_their_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="the extra 'huggingface' is not installed")
    both, _, here = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/from-hugging-face.md").read_text(), flags=re.DOTALL
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        execute(both + here.split("\nfor one, other")[0], tmp_path, monkeypatch)


@pytest.mark.long
def test_a_difference_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = code_of("from-nanogpt.md").replace(
        "warmup_steps=warmup_iters + 1", "warmup_steps=warmup_iters"
    )
    with pytest.raises(AssertionError, match="not close"):
        execute(changed, tmp_path, monkeypatch)
