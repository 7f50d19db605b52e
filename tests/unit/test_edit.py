"""Other values in a file, with its comments where that is possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.config.base import dump_yaml
from fundamentallm.config.load import replaced
from fundamentallm.config.yaml.edit import edited
from fundamentallm.config.yaml.source import parse_yaml

TEXT = """\
# A run.
name: mine
data:
  # where it is from
  source: text.txt   # mine
training:
  precision: auto  # let it choose
  optimizer:
    name: muon
    adamw_lr: 5e-3

  total_steps: 12
handlers: {samples: false}
"""


def changed(text, values):
    document = parse_yaml(text)
    for path, value in values.items():
        document = replaced(document, path, value, "here")
    new = edited(text, document, list(values))
    assert parse_yaml(new).data == document.data
    return new


def test_values_change_and_comments_stay():
    new = changed(TEXT, {("training", "precision"): "bf16", ("data", "source"): "a: b"})

    assert "# A run.\n" in new
    assert "  # where it is from\n  source: 'a: b'   # mine\n" in new
    assert "  precision: bf16  # let it choose\n" in new
    assert new.count("\n") == TEXT.count("\n")


def test_new_keys_join_their_section():
    new = changed(
        TEXT, {("training", "compile"): True, ("training", "threads"): 2, ("data", "batch_size"): 4}
    )

    assert "  total_steps: 12\n  compile: true\n  threads: 2\nhandlers" in new
    assert "  source: text.txt   # mine\n  batch_size: 4\n" in new
    assert "# A run." in new


def test_a_section_that_was_not_there_comes_last():
    assert changed("name: mine # my\n", {("training", "compile"): False}) == (
        "name: mine # my\ntraining:\n  compile: false\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        "training: {precision: auto, total_steps: 12} # short\n",
        "training: {}\n",
        "training:\n  precision: 'a #b'\n",
        "training:\n  precision:\n    auto\n",
        "training:\n  total_steps: 12\n  loss:\n    name: >-\n      x\n      y\n",
    ],
)
def test_text_in_another_form_is_written_anew(text):
    changed(text, {("training", "precision"): "bf16"})


def test_a_value_at_another_depth_is_written_anew():
    values = {("name",): "yours", ("training", "optimizer", "name"): "lion"}
    assert "name: yours" in changed(TEXT, values)


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["data", "training", "model"]), st.sampled_from("abcdef")),
        st.one_of(st.booleans(), st.integers(), st.text(), st.none(), st.lists(st.integers())),
    ),
    st.dictionaries(
        st.sampled_from(["data", "training", "model"]),
        st.dictionaries(st.sampled_from("abcdef"), st.text(max_size=5), min_size=1),
        min_size=1,
    ),
)
def test_whatever_the_values_the_text_says_them(values, sections):
    changed(dump_yaml(sections), values)


def test_comments_at_the_top_stay_where_the_text_is_rewritten():
    text = "# one\n# two\na: {b: 1} # three\n"
    changed = parse_yaml("a: {b: 2}\n")
    assert edited(text, changed, [("a", "b")]) == "# one\n# two\na:\n  b: 2\n"
