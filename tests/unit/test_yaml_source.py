from __future__ import annotations

import json
import math
import os
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm.config.base import _Dumper
from fundamentallm.config.yaml.file import MODELINE, SCHEMA, TITLE, with_schema
from fundamentallm.config.yaml.source import parse_value, parse_yaml, read_yaml
from fundamentallm.errors import ConfigError

plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)

awkward_text = st.sampled_from(
    [
        "1e-4",
        "1E5",
        ".5e3",
        "+1",
        "-0",
        "1_000",
        "0o17",
        "017",
        "0x1f",
        "1:30:00",
        "2024-01-01",
        "yes",
        "No",
        "on",
        "OFF",
        "y",
        "true",
        "~",
        "null",
        "+.nan",
        ".nan",
        "-.INF",
        "<<",
        "=",
        "&a",
        "*a",
        "!t",
        "-",
        "#",
        "?",
        "|",
    ]
) | st.sampled_from(
    ["", "- a", "a: b", "# a", " a ", "a\n", "\ta", "\x00\x1b", "\ufeffa", "\x85", "\u2028a\u2028"]
)


def fault(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "train.yaml")
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("1", 1),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("-.inf", -math.inf),
        ("[1, a]", [1, "a"]),
        ("{a: 1e3}", {"a": 1000.0}),
        # What YAML 1.1 would turn into something else stays as it was typed.
        ("yes", "yes"),
        ("off", "off"),
        ("1_000", "1_000"),
        ("0o17", "0o17"),
        ("017", "017"),
        ("0x1f", "0x1f"),
        ("1:30:00", "1:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("${env:HOME}", "${env:HOME}"),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
    ],
)
def test_what_a_value_means(text, value):
    read = parse_value(text, "value")
    assert read == value
    assert type(read) is type(value)


def test_not_a_number_is_read_as_such():
    assert math.isnan(parse_value(".nan", "value"))


@given(plain_values)
def test_every_plain_value_survives_writing_and_reading(value):
    text = yaml.dump({"value": value}, Dumper=_Dumper, allow_unicode=True, sort_keys=False)
    assert repr(parse_yaml(text).data) == repr({"value": value})  # repr: 1, 1.0 and True differ


@given(awkward_text, awkward_text)
def test_text_that_looks_like_something_else_stays_text(key, value):
    assert parse_yaml(yaml.dump({key: [value]}, Dumper=_Dumper)).data == {key: [value]}


def test_lines_of_keys_items_and_parents():
    document = parse_yaml("a: 1\n\n# b comes\nb:\n  c: {d: 2}\n  e:\n    - x\n    - y\n", "f.yaml")
    assert document.locate(("a",)) == "f.yaml:1: a"
    assert document.locate(("b", "c", "d")) == "f.yaml:5: b.c.d"
    assert document.locate(("b", "e", 1)) == "f.yaml:8: b.e[1]"
    assert document.locate(("b", "missing", "deeper")) == "f.yaml:4: b.missing.deeper"
    assert document.locate(("missing",)) == "f.yaml: missing"
    assert document.locate(()) == "f.yaml"


def test_a_key_written_twice_names_both_lines():
    error = fault("a:\n  lr: 1\n  steps: 2\n  lr: 3\n")
    assert error.where == "train.yaml:4: a.lr"
    assert "lines 2 and 4" in error.what


def test_the_same_key_in_two_mappings_is_fine():
    assert parse_yaml("a: {x: 1}\nb: {x: 2}\n").data == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("", "train.yaml", "empty"),
        ("# only words\n", "train.yaml", "empty"),
        ("---\n...\n", "train.yaml", "empty"),
        ("- a\n", "train.yaml:1", "a list"),
        ("seed\n", "train.yaml:1", "a single value"),
        ("a: 1\n---\nb: 2\n", "train.yaml:2", "second document"),
        ("a: 1\n\tb: 2\n", "train.yaml:2", "a tab at column 1"),
        ("a:\n  b:\t1\n\t c: 2\n", "train.yaml:2", "a tab at column 5"),
        ("a: [1\nb: 2\n", "train.yaml:2", "flow sequence that begins in line 1"),
        ("a: 'x\n\nb: 2\n", "train.yaml:4", "begins in line 1"),
        ("a: 1\n b: 2\n", "train.yaml:2", "not YAML"),
        ("a: \x07\n", "train.yaml:1", "YAML does not allow this character"),
        ('a: "\\UFFFFFFFF"\n', "train.yaml", "not YAML"),
        ("a: !!python/object/apply:os.system [true]\n", "train.yaml:1", "tags"),
        ("a: !!str 1\n", "train.yaml:1", "tags"),
        ("a: !x 1\n", "train.yaml:1", "tags"),
        ("!x a: 1\n", "train.yaml:1", "tags"),
        ("a: &x 1\n", "train.yaml:1", "anchors"),
        ("a: 1\nb: *x\n", "train.yaml:2", "anchors"),
        ("a: 1\n<<: *x\n", "train.yaml:2", "anchors"),
        ("1: a\n", "train.yaml:1", "the key is not text"),
        ("true: a\n", "train.yaml:1", "the key is not text"),
        ("? [a]\n: 1\n", "train.yaml:1", "the key is not text"),
        ("a: 1\nb: " + "9" * 5000, "train.yaml:2", "a number of 5,000 digits"),
        ("a: " + "[" * 40 + "]" * 40, "train.yaml:1", "deeper than 32"),
        ("- " * 40 + "a", "train.yaml:1", "deeper than 32"),
        ("a: [" + "1, " * 10_000 + "1]", "train.yaml:1", "more than 10,000 values"),
        ("a: " + "x" * 1_000_001, "train.yaml", "too large"),
    ],
)
def test_what_is_refused(text, where, what):
    error = fault(text)
    assert error.where == where
    assert what in error.what


def test_nesting_up_to_the_limit_is_read():
    assert parse_yaml("a: " + "[" * 31 + "]" * 31).data["a"]
    fault("a: " + "[" * 32 + "]" * 32)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
        "a: " + "[" * 10_000,
        "a: " + "{a: " * 10_000,
        "a:" + " - " * 10_000,
        "x" * 2_000_000,
    ],
)
def test_bombs_are_refused_at_once(text):
    start = time.process_time()
    fault(text)
    assert time.process_time() - start < 0.1


@given(st.text(alphabet="ab:-[]{}&*!|>'\"%@`,?# \n\t019.e~<=\\\r\x85", max_size=40))
def test_any_text_is_read_or_refused_with_a_place(text):
    try:
        assert isinstance(parse_yaml(text, "f.yaml").data, dict)
    except ConfigError as error:
        assert error.where.startswith("f.yaml")  # noqa: PT017 - either outcome is right


class TestFiles:
    def test_a_file_with_a_byte_order_mark(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_bytes(b"\xef\xbb\xbfname: \xc3\xa9\n")
        document = read_yaml(path)
        assert document.data == {"name": "\u00e9"}
        assert document.locate(("name",)) == f"{path}:1: name"

    def test_not_utf8_names_the_byte_and_the_line(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_bytes(b"a: 1\nb: \xff\n")
        with pytest.raises(ConfigError, match="byte offset 8") as caught:
            read_yaml(path)
        assert caught.value.where == f"{path}:2"
        assert caught.value.got == "byte 0xff"

    def test_utf16_is_named(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("a: 1\n", encoding="utf-16")
        with pytest.raises(ConfigError, match="UTF-16"):
            read_yaml(path)

    def test_a_missing_file_suggests_a_near_one(self, tmp_path):
        (tmp_path / "train.yaml").write_text("a: 1\n")
        with pytest.raises(ConfigError, match="configuration file does not exist") as caught:
            read_yaml(tmp_path / "tarin.yaml")
        assert caught.value.fix == "did you mean 'train.yaml'?"

    def test_a_missing_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="configuration file does not exist"):
            read_yaml(tmp_path / "no" / "a.yaml")

    def test_a_directory(self, tmp_path):
        with pytest.raises(ConfigError, match="this path is a directory"):
            read_yaml(tmp_path)

    def test_a_pipe_is_refused_before_it_is_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.yaml")
        with pytest.raises(ConfigError, match="not a regular file"):
            read_yaml(tmp_path / "pipe.yaml")

    def test_a_path_that_no_system_allows(self):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_yaml("a\0b.yaml")

    def test_a_file_larger_than_the_limit_is_not_read_to_its_end(self, tmp_path):
        path = tmp_path / "a.yaml"
        with path.open("wb") as file:
            file.truncate(100_000_000)
        start = time.process_time()
        with pytest.raises(ConfigError, match="too large"):
            read_yaml(path)
        assert time.process_time() - start < 0.1

    def test_the_limit_counts_bytes_and_never_cuts_a_file(self, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("name: a\n# " + "\u00e9" * 499_999 + "\nname: b\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="too large"):
            read_yaml(path)


def test_a_value_that_occurs_twice_is_written_twice():
    pair = [0.9, 0.95]
    text = yaml.dump({"a": pair, "b": pair}, Dumper=_Dumper)
    assert parse_yaml(text).data == {"a": pair, "b": pair}


class TestTheSchemaThatAFileNames:
    LINE = f"{MODELINE}schema.json"

    def test_is_written_beside_it_once(self, tmp_path):
        for name in ("a.yaml", "b.yaml"):
            assert with_schema(f"{self.LINE}\nname: a\n", tmp_path / name) == (
                f"{self.LINE}\nname: a\n"
            )
        assert (tmp_path / "schema.json").read_text() == SCHEMA.read_text()

    def test_with_plugins_or_under_another_name_is_kept(self, tmp_path):
        own = json.dumps({"title": TITLE, "plugins": True})
        for name in ("schema.json", "own.json"):
            (tmp_path / name).write_text(own)
            text = f"{MODELINE}{name}\nname: a\n"
            assert with_schema(text, tmp_path / "a.yaml") == text
            assert (tmp_path / name).read_text() == own

    @pytest.mark.parametrize("content", ['{"title": "another"}', "[1]", "no JSON", "\udcff"])
    def test_of_something_else_is_kept_and_the_packages_is_named(self, content, tmp_path):
        foreign = tmp_path / "schema.json"
        foreign.write_text(content, errors="surrogateescape")
        text = with_schema(f"{self.LINE}\nname: a\n", tmp_path / "a.yaml")
        assert text == f"{MODELINE}{SCHEMA}\nname: a\n"
        assert foreign.read_text(errors="surrogateescape") == content

    def test_of_another_folder_is_written_where_the_copy_lies(self, tmp_path):
        (tmp_path / "there").mkdir()
        text = with_schema(f"{MODELINE}../own.json\n", tmp_path / "there" / "a.yaml")
        assert text == f"{self.LINE}\n"
        assert (tmp_path / "there" / "schema.json").is_file()

    @pytest.mark.parametrize(
        "text", ["", "name: a\n", "# a\n", f"{MODELINE}https://x.org/a.json\n"]
    )
    def test_needs_no_file_where_none_is_named(self, text, tmp_path):
        assert with_schema(text, tmp_path / "a.yaml") == text
        assert not list(tmp_path.iterdir())

    def test_is_the_packages_where_the_folder_cannot_be_written(self, tmp_path):
        text = with_schema(f"{self.LINE}\n", tmp_path / "no" / "a.yaml")
        assert text == f"{MODELINE}{SCHEMA}\n"
