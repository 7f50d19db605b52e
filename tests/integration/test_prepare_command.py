"""`prepare` from the command line, and runs on what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fundamentallm.data.prepared import read_prepared
from fundamentallm.engine.cli import main
from fundamentallm.training.checkpoint.scores import Scores
from fundamentallm.training.checkpoint.store import CheckpointStore
from fundamentallm.training.handlers import HANDLERS

TEXT = Path(__file__).resolve().parents[1] / "data" / "shakespeare_excerpt.txt"
CONFIG = """\
name: tiny
data:
  source: out
  sequence_length: 16
  batch_size: 4
model: {d_model: 16, num_layers: 1, num_heads: 2}
training:
  learning_rate: 1e-2
  total_steps: 12
  eval_steps: 4
handlers: {tensorboard: false, samples: false, progress: false}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEXT, "text.txt")
    Path("tiny.yaml").write_text(CONFIG)
    parts = TEXT.read_text(encoding="utf-8").split("\n\n")
    Path("docs.jsonl").write_text("".join(json.dumps({"body": part}) + "\n" for part in parts))
    return tmp_path


def prepare(*words: str) -> int:
    return main(["prepare", *words])


def weights(run: str) -> dict[str, object]:
    store = CheckpointStore(Path(run) / "checkpoints")
    last = store.resolve("last")
    assert last is not None
    return {name: value.tolist() for name, value in store.read(last)["model"].items()}


@pytest.mark.parametrize("tokenizer", ["character", "byte", "{name: bpe, vocab_size: 300}"])
def test_what_was_prepared_is_trained_measured_and_written(
    tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("text.txt", "--out", "out", "--tokenizer", tokenizer) == 0
    said = capsys.readouterr()
    assert 'data: {source: "out"}' in said.out
    assert "1 document," in said.err
    assert main(["run", "tiny.yaml"]) == 0
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < result["bits_per_byte"] < 9
    assert main(["generate", "runs/tiny", "--prompt", "the", "--max-tokens", "5"]) == 0
    assert main(["evaluate", "runs/tiny", "--data", "out"]) == 0
    assert prepare("text.txt", "--out", "out", "--tokenizer", tokenizer) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_a_configuration_trains_its_own_subwords_and_resumes_with_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bpe = "data.tokenizer={name: bpe, vocab_size: 300}"
    source = "data.source=text.txt"
    assert main(["run", "tiny.yaml", source, bpe, "training.total_steps=4"]) == 0
    again = ["run", "tiny.yaml", source, bpe, "training.total_steps=8", "--resume", "runs/tiny"]
    assert main(again) == 0
    assert "vocabulary of 300" in capsys.readouterr().err


def test_documents_packed_apart(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["docs.jsonl", "--field", "body", "--out", "out", "--split", "document"]
    assert prepare(*words, "--fractions", "0.7", "0.3", "0") == 0
    apart = "data.packing=document"
    assert main(["run", "tiny.yaml", apart, "data.split=[0.8, 0.2, 0.0]"]) == 0
    assert "data.split has no effect" in capsys.readouterr().err
    assert main(["run", "tiny.yaml", "name=plain"]) == 0
    assert weights("runs/tiny") != weights("runs/plain")
    assert main(["evaluate", "runs/tiny"]) == 0
    capsys.readouterr()
    assert main(["run", "tiny.yaml", apart, "data.source=text.txt", "name=raw"]) == 2
    assert "nothing in this source marks where a document ends" in capsys.readouterr().err


def test_a_mixture_runs_and_resumes_bit_for_bit(capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("text.txt", "--out", "a", "--tokenizer", "byte") == 0
    words = ["docs.jsonl", "--field", "body", "--out", "b", "--tokenizer", "byte"]
    assert prepare(*words) == 0
    three = "{path: a, weight: 3}, {path: b, weight: 1}, {path: text.txt, weight: 1}"
    mixture = f"data.sources=[{three}]"
    config = Path("tiny.yaml")
    config.write_text(CONFIG.replace("  source: out\n", ""))
    assert main(["run", "tiny.yaml", mixture]) == 0
    assert main(["run", "tiny.yaml", mixture, "name=two", "training.total_steps=5"]) == 0
    words = ["run", "tiny.yaml", mixture, "name=two", "--resume", "runs/two"]
    assert main(words) == 0
    assert weights("runs/tiny") == weights("runs/two")
    assert main(["evaluate", "runs/two"]) == 0
    capsys.readouterr()
    assert prepare("text.txt", "--out", "c", "--tokenizer", "character") == 0
    other = "data.sources=[{path: a, weight: 3}, {path: c, weight: 1}]"
    assert main(["run", "tiny.yaml", other]) == 3
    assert "different tokenizers" in capsys.readouterr().err


SOURCES = {
    "a part": ["data.source=by-document"],
    "a part, packed apart": ["data.source=by-document", "data.packing=document"],
    "by position, packed apart": ["data.source=whole", "data.packing=document"],
    "a mixture": [
        "data.sources=[{path: whole, weight: 2}, {path: text.txt, weight: 1},"
        " {path: by-document, weight: 1}]"
    ],
    "a mixture, packed apart": [
        "data.sources=[{path: whole, weight: 2}, {path: by-document, weight: 1}]",
        "data.packing=document",
    ],
}


@pytest.mark.parametrize("kind", SOURCES)
def test_evaluate_measures_what_training_did(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = filter(str.strip, TEXT.read_text(encoding="utf-8").split("\n"))
    Path("lines.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    words = ["lines.jsonl", "--field", "body", "--tokenizer", "byte"]
    assert prepare(*words, "--out", "whole") == 0
    split = ["--split", "document", "--fractions", "0.6", "0.2", "0.2"]
    assert prepare(*words, "--out", "by-document", *split) == 0
    Path("tiny.yaml").write_text(CONFIG.replace("  source: out\n", ""))
    assert main(["run", "tiny.yaml", *SOURCES[kind]]) == 0
    store = CheckpointStore(Path("runs/tiny/checkpoints"))
    best = store.resolve("best")
    assert best is not None
    recorded = Scores(store.directory).val_loss(store.manifest(best))
    capsys.readouterr()
    results = {}
    for more in ([], ["--documents"], ["--split", "test"], ["--split", "train"]):
        code = main(["evaluate", "runs/tiny", "--json", *more])
        if code:  # nothing was kept for a test
            assert code == 3
            assert "there is nothing to evaluate" in capsys.readouterr().err
            assert more == ["--split", "test"]
            continue
        results[" ".join(more)] = json.loads(capsys.readouterr().out)
    assert results[""]["loss"] == pytest.approx(recorded, rel=1e-6)
    documents = results["--documents"]["documents"]
    assert results["--documents"]["num_tokens"] == results[""]["num_tokens"]
    assert results["--documents"]["num_bytes"] == results[""]["num_bytes"]
    assert len(documents) > 1
    assert sum(one["num_tokens"] for one in documents) == results[""]["num_tokens"]
    assert results["--split train"]["num_tokens"] > results[""]["num_tokens"]


def test_a_folder_split_by_document_is_measured_by_its_parts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["docs.jsonl", "--field", "body", "--tokenizer", "byte", "--split", "document"]
    assert prepare(*words, "--out", "out", "--fractions", "0.6", "0.2", "0.2") == 0
    assert prepare("docs.jsonl", "--field", "body", "--out", "all", "--tokenizer", "byte") == 0
    assert main(["run", "tiny.yaml", "training.total_steps=4"]) == 0
    numbers = {}
    for part in ("train", "val", "test"):
        capsys.readouterr()
        words = ["evaluate", "runs/tiny", "--split", part, "--json"]
        assert main(words) == 0
        own = json.loads(capsys.readouterr().out)
        assert own["data"].startswith("the run's ")
        assert main([*words, "--data", "out"]) == 0
        named = json.loads(capsys.readouterr().out)
        assert named["data"].startswith("out ")
        assert named["loss"] == own["loss"]
        numbers[part] = own["num_tokens"]
    assert main(["evaluate", "runs/tiny", "--json", "--data", "out"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == numbers["val"]
    assert main(["evaluate", "runs/tiny", "--json", "--data", "all"]) == 0
    # The first token of each part has nothing before it.
    assert json.loads(capsys.readouterr().out)["num_tokens"] == sum(numbers.values()) + 2
    assert main(["evaluate", "runs/tiny", "--data", "all", "--split", "val"]) == 2
    assert "--split selects a part of the run's text" in capsys.readouterr().err
    assert main(["evaluate", "runs/tiny", "--document-separator", ";"]) == 2
    assert "--document-separator splits text into documents" in capsys.readouterr().err


def test_tokens_for_a_model_to_start_from_are_made_with_its_tokenizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bpe = "{name: bpe, vocab_size: 300}"
    assert prepare("docs.jsonl", "--field", "body", "--out", "out", "--tokenizer", bpe) == 0
    assert main(["run", "tiny.yaml", "training.total_steps=4"]) == 0
    assert main(["export", "runs/tiny", "--format", "hf", "--out", "base"]) == 0
    text = TEXT.read_text(encoding="utf-8")
    Path("new.txt").write_text(text[::-1])
    changes = {"tiny": "next", "out": "other", "{d_model: 16, num_layers: 1, num_heads: 2}": "{}"}
    config = CONFIG
    for old, new in changes.items():
        assert old in config
        config = config.replace(old, new, 1)
    Path("next.yaml").write_text(config.replace("{}", "{init_from: base}"))
    assert prepare("new.txt", "--out", "other", "--tokenizer", bpe) == 0
    capsys.readouterr()
    assert main(["run", "next.yaml"]) == 3
    assert "another tokenizer than the weights of init_from" in capsys.readouterr().err
    shutil.rmtree("other")
    assert prepare("new.txt", "--out", "other", "--tokenizer", "base/tokenizer.json") == 0
    assert main(["run", "next.yaml"]) == 0
    assert main(["run", "next.yaml", "training.total_steps=14", "--resume", "runs/next"]) == 0


def test_a_mixture_keeps_its_copy_of_a_built_in_source(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tiny.yaml").write_text(CONFIG.replace("  source: out\n", ""))
    mixture = "data.sources=[{name: python-docs, weight: 1}, {path: text.txt, weight: 1}]"
    assert main(["run", "tiny.yaml", mixture, "training.total_steps=4"]) == 0
    from pydoc_data import topics

    monkeypatch.setattr(topics, "topics", {"other": "another release"})
    again = ["run", "tiny.yaml", mixture, "training.total_steps=8", "--resume", "runs/tiny"]
    assert main(again) == 0


CHANGES = {
    "shrinks": "os.truncate(path, os.path.getsize(path) // 2)",
    "is-written-to": "file = open(path, 'r+b'); file.seek(2000); file.write(b'aaaa'); file.close()",
    "goes": "os.rename(path, path + '.away')",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_under_a_run_ends_it_with_its_state_saved(
    place: Path,
    change: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare("text.txt", "--out", "out", "--tokenizer", "byte") == 0
    assert main(["run", "tiny.yaml", "name=quiet"]) == 0
    plugin = f"spoil_{change.replace('-', '_')}"
    Path(f"{plugin}.py").write_text(
        "import os\n"
        "from ignite.engine import Events\n"
        "from fundamentallm.training.handlers import HANDLERS\n"
        f"@HANDLERS.register('{plugin}')\n"
        "class Spoil:\n"
        "    def attach(self, trainer):\n"
        "        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), self.spoil)\n"
        "    def spoil(self, trainer):\n"
        "        path = 'out/all.tokens'\n"
        f"        {CHANGES[change]}\n"
    )
    shutil.copytree("out", "kept")
    monkeypatch.syspath_prepend(str(place))
    words = ["run", "tiny.yaml", "--plugins", plugin, f"handlers.{plugin}={{}}"]
    capsys.readouterr()
    assert main(words) == 3
    assert "the token file changed while it was in use" in capsys.readouterr().err
    store = CheckpointStore(Path("runs/tiny/checkpoints"))
    last = store.resolve("last")
    assert last is not None
    assert store.manifest(last).step == 6
    shutil.rmtree("out")
    shutil.copytree("kept", "out")
    monkeypatch.setattr(HANDLERS.get(plugin), "spoil", lambda self, trainer: None)
    assert main(words) == 0
    assert weights("runs/tiny") == weights("runs/quiet")


# bad input


def listing(place: Path) -> list[tuple[str, int, int]]:
    found = [(str(path), path.lstat()) for path in sorted(place.rglob("*"))]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


BAD = {
    "missing": ("prepare nowhere.txt --out x", 3, ("nowhere.txt", "fix")),
    "no-match": ("prepare *.none --out x", 3, ("*.none",)),
    "latin1": ("prepare latin1.txt --out x", 3, ("latin1.txt: byte 3", "0xe9", "iconv")),
    "binary": ("prepare zeros.txt --out x", 3, ("zeros.txt: byte 2", "NUL")),
    "utf16": ("prepare utf16.txt --out x", 3, ("utf16.txt", "UTF-16")),
    "zip": ("prepare zip.txt --out x", 3, ("zip.txt", "zip file")),
    "empty": ("prepare empty.txt --out x", 3, ("empty.txt", "no text")),
    "no-key": ("prepare docs.jsonl --out x", 3, ("docs.jsonl:1", "'text'", "--field")),
    "not-json": ("prepare bad.jsonl --out x", 3, ("bad.jsonl:2", "not JSON")),
    "occupied": ("prepare text.txt --out runs", 3, ("runs", "choose another --out")),
    "tokenizer": ("prepare text.txt --out x --tokenizer bpee", 2, ("did you mean 'bpe'",)),
    "option": (
        "prepare text.txt --out x --tokenizer byte --vocab-size 3",
        2,
        ("--tokenizer", "vocab_size"),
    ),
    "small": (
        "prepare text.txt --out x --tokenizer bpe --vocab-size 3",
        2,
        ("got:      3", "from 257 to"),
    ),
    "tokenizer-file": ("prepare text.txt --out x --tokenizer no.json", 3, ("no.json",)),
    "fractions": (
        "prepare text.txt --out x --split document --fractions 1 1 1",
        2,
        ("--fractions", "sum to 1"),
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("tokenizer", ["", "--tokenizer byte"])
def test_bad_input_is_one_message_and_writes_nothing(
    place: Path, case: str, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command, code, says = BAD[case]
    if "--tokenizer" in command and tokenizer:
        pytest.skip("has its own tokenizer")
    Path("latin1.txt").write_bytes("caf\u00e9".encode("latin1"))
    Path("zeros.txt").write_bytes(b"ab\0")
    Path("utf16.txt").write_bytes("ab".encode("utf-16"))
    Path("zip.txt").write_bytes(b"PK\x03\x04")
    Path("empty.txt").touch()
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("runs/mine").mkdir(parents=True)
    before = listing(place)
    assert main([*command.split(), *tokenizer.split()]) == code
    captured = capsys.readouterr()
    assert listing(place) == before
    assert captured.out == ""
    assert captured.err.count("error: ") == 1
    for words in says:
        assert words in captured.err


SPOILED = {
    "cut": (lambda data: data[:-1], "ends before its last token"),
    "longer": (lambda data: data + b"a", "continues after its last token"),
    "flipped": (lambda data: data[:-10] + bytes([data[-10] ^ 1]) + data[-9:], "damaged"),
    "outside": (lambda data: data[:-4] + b"\xff\xff" + data[-2:], "token 8,"),
    "headless": (lambda data: bytes(1024) + data[1024:], "not a token file"),
    "empty": (lambda data: b"", "not a token file"),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("command", [["run", "tiny.yaml"], ["check", "tiny.yaml"]])
def test_a_spoiled_token_file_is_refused_before_the_first_step(
    place: Path, case: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("text.txt", "--out", "out", "--tokenizer", "byte") == 0
    path = Path("out/all.tokens")
    spoil, says = SPOILED[case]
    path.write_bytes(spoil(path.read_bytes()))
    before = listing(place)
    capsys.readouterr()
    assert main(command) == 3
    error = capsys.readouterr().err
    if case != "outside":
        assert says in error
    assert "all.tokens" in error
    assert "fix:" in error
    assert listing(place) == before


def test_a_missing_middle_part_is_named_before_the_first_step(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["docs.jsonl", "--field", "body", "--out", "out", "--split", "document"]
    assert prepare(*words, "--fractions", "0.6", "0.2", "0.2") == 0
    Path("out/val.tokens").unlink()
    before = listing(place)
    capsys.readouterr()
    assert main(["run", "tiny.yaml"]) == 3
    assert "val.tokens" in capsys.readouterr().err
    assert listing(place) == before


# real processes


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fundamentallm.engine", "prepare", *words]


def opens_or_is_absent(out: Path, expected: str) -> bool:
    if not out.exists():
        return False
    assert read_prepared(out).sha256 == expected
    return True


def kill_at_instants(place: Path, count: int, number: int) -> int:
    """End a process `count` times at moments spread over its life; return how often it ended."""
    long_text = TEXT.read_text(encoding="utf-8") * 300
    (place / "long.txt").write_text(long_text)
    words = ["long.txt", "--tokenizer", "{name: bpe, vocab_size: 300}", "--out"]
    began = time.monotonic()
    subprocess.run(command(*words, "whole"), check=True, capture_output=True)
    whole = time.monotonic() - began
    expected = read_prepared(place / "whole").sha256
    killed = 0
    for turn in range(count):
        process = subprocess.Popen(
            command(*words, "out"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        time.sleep(whole * (0.2 + 0.9 * turn / count))
        process.send_signal(number)
        process.communicate()
        killed += process.returncode != 0
        there = opens_or_is_absent(place / "out", expected)
        if process.returncode == 0:
            assert there
        if number == signal.SIGTERM and process.returncode not in (0, -signal.SIGTERM):
            assert process.returncode == 128 + number
            assert list(place.glob(".out.tmp-*")) == []
        shutil.rmtree(place / "out", ignore_errors=True)
    subprocess.run(command(*words, "out"), check=True, capture_output=True)
    assert opens_or_is_absent(place / "out", expected)
    assert list(place.glob(".out.tmp-*")) == []
    return killed


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_an_end_at_an_instant_leaves_nothing_half_written(place: Path) -> None:
    assert kill_at_instants(place, 2, signal.SIGTERM) > 0


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_at_many_instants_leaves_nothing_half_written(place: Path, number: int) -> None:
    assert kill_at_instants(place, 40, number) > 10


# Not getrusage: its peak begins with that of the process that started this one.
MEASURE = """
import sys
from pathlib import Path
from fundamentallm.engine.cli import main
code = main(["prepare", *sys.argv[1:]])
print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def peak_megabytes(*words: str) -> float:
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], check=True, capture_output=True, text=True
    )
    return int(process.stdout.split("peak ")[1]) * 1024 / 1e6


def write_much(path: Path, size: int, shape: str) -> None:
    """Write a text of `size` bytes: lines, one line, one word, or records."""
    text = TEXT.read_text(encoding="utf-8") + " na\u00efve \U0001f600 "
    if shape != "lines":
        text = " ".join(text.split())
    if shape == "word":
        text = text.replace(" ", "_")
    if shape == "records":
        text = "".join(json.dumps({"text": text[i : i + 500]}) + "\n" for i in range(0, 5000, 500))
    data = text.encode()
    with path.open("wb") as file:
        for _ in range(size // len(data) + 1):
            file.write(data)


LIMIT = 400  # MB, whatever the size of the input
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@ON_LINUX
@pytest.mark.parametrize("shape", ["line", pytest.param("records", marks=pytest.mark.long)])
def test_memory_is_bounded(place: Path, shape: str) -> None:
    path = place / ("a.jsonl" if shape == "records" else "a.txt")
    write_much(path, 60_000_000, shape)
    assert peak_megabytes(str(path), "--out", "x", "--tokenizer", "byte") < 150


@pytest.mark.long
@ON_LINUX
@pytest.mark.parametrize("tokenizer", ["character", "byte"])
@pytest.mark.parametrize("shape", ["lines", "line", "word", "records"])
def test_memory_is_bounded_for_large_files(place: Path, shape: str, tokenizer: str) -> None:
    size = 500_000_000 if shape == "records" else 1_000_000_000  # JSON takes minutes to read
    assert peak_of(place, size, shape, tokenizer) < LIMIT


@pytest.mark.long
@ON_LINUX
@pytest.mark.parametrize("size", [200_000, 1_000_000])
def test_memory_is_bounded_where_documents_are_read_whole(place: Path, size: int) -> None:
    """A tokenizer.json that reads a text in one piece, as those of Llama's family do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    text = TEXT.read_text(encoding="utf-8")
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["</s>"], unk_token="</s>")
    library.train_from_iterator([text], trainer)
    library.save("pieces.json")
    Path("many").mkdir()
    for number in range(12_000_000 // size):
        whole = f"{number} " + text * (size // len(text) + 1)
        Path(f"many/{number:03}.txt").write_text(whole[:size], encoding="utf-8")
    words = ("--out", "x", "--tokenizer", "pieces.json")
    assert peak_megabytes("many", *words) < LIMIT


@pytest.mark.long
@ON_LINUX
@pytest.mark.parametrize("shape", ["lines", "line", "word", "records"])
def test_memory_is_bounded_for_subwords(place: Path, shape: str) -> None:
    """Smaller, for the library takes minutes for a gigabyte; its sample is full after 25 MB."""
    assert peak_of(place, 60_000_000, shape, "{name: bpe, vocab_size: 2048}") < LIMIT


def peak_of(place: Path, size: int, shape: str, tokenizer: str) -> float:
    path = place / ("a.jsonl" if shape == "records" else "a.txt")
    write_much(path, size, shape)
    peak = peak_megabytes(str(path), "--out", "x", "--tokenizer", tokenizer)
    assert len(read_prepared(place / "x").tokens["all"]) > 1_000_000
    shutil.rmtree(place / "x")
    path.unlink()
    return peak
