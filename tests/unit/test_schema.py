"""The catalogue and the schema say what the registries and the configuration accept."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonschema.exceptions import best_match
from tests import forked

from fundamentallm.config.yaml.file import MODELINE, PACKAGED, SCHEMA
from fundamentallm.config.yaml.source import parse_yaml, read_yaml
from fundamentallm.engine.catalogue import KINDS, stored_catalogue
from fundamentallm.engine.cli import main
from fundamentallm.engine.schema import run_schema, schema_text, sweep_schema

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(PACKAGED.glob("*.yaml"))
OWN = ("block", "handler", "logger", "loss", "model", "optimizer", "schedule", "tokenizer")
PLUGINS = [f"own_{part}" for part in OWN]

# In a process of its own: other tests register names in this one.
LIVE = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "examples")!r})
from fundamentallm.engine.catalogue import catalogue_with, registered_catalogue
print(json.dumps([registered_catalogue(), catalogue_with({PLUGINS})]))
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    place = tmp_path_factory.mktemp("live")
    (place / "live.py").write_text(LIVE)
    result = forked.run([], place, program=str(place / "live.py"))
    assert result.returncode == 0, result.stderr
    own, with_plugins = json.loads(result.stdout)
    return [own, with_plugins]


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def fault(validator: jsonschema.Draft202012Validator, data: Any) -> Any:
    return best_match(validator.iter_errors(data))


def test_the_catalogue_is_that_of_the_registries(live):
    assert stored_catalogue() == live[0], "run: python -m fundamentallm.engine.schema"
    assert list(live[0]) == list(KINDS)


def test_the_stored_schema_is_that_of_the_catalogue():
    expected = schema_text(stored_catalogue())
    assert SCHEMA.read_text() == expected, "run: python -m fundamentallm.engine.schema"


def test_it_is_a_schema_of_draft_2020_12(live):
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))
    jsonschema.Draft202012Validator.check_schema(run_schema(live[1]))


def test_every_component_has_a_description_on_one_line():
    for entries in stored_catalogue().values():
        for name, entry in entries.items():
            assert entry["summary"], name
            assert "\n" not in entry["summary"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_packaged_configuration_is_valid_and_names_its_schema(validator, path):
    assert fault(validator, read_yaml(path).data) is None
    first = path.read_text().splitlines()[0]
    assert first.startswith(MODELINE)
    assert (path.parent / first.removeprefix(MODELINE)).is_file()


OF_EXAMPLES = {
    "own_block": "model: {feedforward: geglu}",
    "own_handler": "handlers: {gradient_noise: {every: 20}}",
    "own_logger": "handlers: {sqlite: true}",
    "own_loss": "training: {loss: {name: confidence_penalty, beta: 0.1}}",
    "own_model": "model: {family: gru, hidden_size: 192, vocab_size: 300}",
    "own_optimizer": "training: {optimizer: {name: adabelief, betas: [0.9, 0.99]}}",
    "own_schedule": "training: {scheduler: {name: restarts, depth: 0.2}}",
    "own_tokenizer": "data: {tokenizer: {name: words, max_words: 500}}",
}


@pytest.mark.parametrize("plugin", OF_EXAMPLES)
def test_a_plugin_of_the_examples_is_valid_with_it_alone(validator, live, plugin):
    data = parse_yaml(OF_EXAMPLES[plugin]).data
    with_plugins = jsonschema.Draft202012Validator(run_schema(live[1]))

    assert fault(with_plugins, data) is None
    assert fault(validator, data) is not None


def test_an_option_of_a_plugin_is_checked(live):
    with_plugins = jsonschema.Draft202012Validator(run_schema(live[1]))
    for text, path in {
        "training: {optimizer: {name: adabelief, betas: 3}}": "training.optimizer.betas",
        "model: {family: gru, hidden_size: wide}": "model.hidden_size",
        "model: {family: gru, hiden_size: 192}": "model",
        "model: {family: grue}": "model.family",
        "handlers: {gradient_noise: {evry: 20}}": "handlers.gradient_noise",
    }.items():
        found = fault(with_plugins, parse_yaml(text).data)
        assert ".".join(map(str, found.absolute_path)) == path


# ---------------------------------------------------------------------- mutations

COMPONENTS = {"training.optimizer", "training.scheduler", "data.tokenizer", "model.normalization"}
COMPONENTS |= {"model.positions", "model.feedforward"}


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield from leaves(value, (*path, key))
    else:
        yield path, data


def changed(data: Any, path: tuple[Any, ...], value: Any, key: str | None = None) -> Any:
    data = copy.deepcopy(data)
    parent = data
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    parent[key or path[-1]] = value
    return data


def mutations() -> Iterator[tuple[str, str, Any]]:
    """Yield what was changed, the dotted path at which it is to be refused, and the data."""
    for config in CONFIGS:
        data = read_yaml(config).data
        for path, value in leaves(data):
            dotted = ".".join(path)
            here = f"{config.stem}: {dotted}"
            in_component = ".".join(path[:-1]) in COMPONENTS
            where = ".".join(path[:-1])
            if not in_component or path[-1] != "name":  # without a name another rule is broken
                kind = "option" if in_component or len(path) > 2 else "key"
                yield f"{kind} {here}", where, changed(data, path, value, f"{path[-1]}_x")
            else:
                yield f"name {here}", dotted, changed(data, path, f"{value}_x")
            if dotted in COMPONENTS:
                yield f"name {here}", dotted, changed(data, path, f"{value}_x")
            wrong = 2.5 if isinstance(value, str) else "text"
            if isinstance(value, list):
                wrong = [*value, "text"]
            yield f"type {here}", dotted, changed(data, path, wrong)
            if type(value) in (int, float):
                yield f"range {here}", dotted, changed(data, path, -1)


def test_mutations_of_the_configurations_are_refused_at_their_place(validator):
    mutated = list(mutations())
    assert len(mutated) >= 200
    assert {what.split()[0] for what, _, _ in mutated} == {"key", "type", "range", "name", "option"}
    for what, path, data in mutated:
        found = fault(validator, data)
        assert found is not None, f"{what} was accepted"
        assert ".".join(map(str, found.absolute_path)) == path, f"{what}: {found.message}"


@pytest.mark.parametrize(
    ("text", "path"),
    {
        "handlers: {spices: true}": "handlers",
        "handlers: {spikes: 3}": "handlers.spikes",
        "evaluation: {metrics: {top_k: {k: x}}}": "evaluation.metrics.top_k.k",
        "evaluation: {metrics: {top_9: {}}}": "evaluation.metrics.top_9",
        "evaluation: {metrics: {loss: {}}}": "evaluation.metrics",
        "data: {tokenizer: file}": "data.tokenizer",
        "data: {tokenizer: {name: file}}": "data.tokenizer",
        "data: {sources: [{path: x, weight: -1}]}": "data.sources.0.weight",
        "training: {compile: nativ}": "training.compile",
        "training: {keep_last: 1}": "training.keep_last",
        "name: a/b": "name",
        "model: {adapter: x}": "model.adapter",
    }.items(),
    ids=lambda value: value,
)
def test_other_faults_are_refused_at_their_place(validator, text, path):
    found = fault(validator, parse_yaml(text).data)
    assert ".".join(map(str, found.absolute_path)) == path


@pytest.mark.parametrize(
    "text",
    [
        "evaluation: {metrics: {accuracy: , entropy: true, top_9: {name: top_k, k: 9}}}",
        "handlers: {spikes: true, samples: false, progress: {min_interval: 1}}",
        "model: {family: transformer, adapter: }",
        "data: {source: [a.txt, b.txt], tokenizer: {name: file, path: tokenizer.json}}",
        "training: {compile: true, bf16_weights: auto, max_grad_norm: }",
    ],
)
def test_every_form_of_a_value_is_valid(validator, text):
    assert fault(validator, parse_yaml(text).data) is None


# ---------------------------------------------------------------------- a sweep

SWEEP = """
name: rates
config: quickstart
fixed: {training.eval_steps: 50, handlers.samples: false}
keys:
  training.learning_rate: [3e-4, 1e-3]
  training.optimizer: [adamw, {name: lion, betas: [0.9, 0.99]}]
  model.num_layers: [2, 4]
  training.scheduler.power: [1, 2]
steps: 500
seeds: 3
prune: {trials: 4, from_step: 100}
"""
OF_RANDOM = """
config: quickstart
keys: {training.learning_rate: {low: 1e-4, high: 1e-2, log: true}, training.optimizer: [lion]}
method: random
trials: 20
steps: 500
"""


@pytest.fixture(scope="module")
def of_sweep() -> jsonschema.Draft202012Validator:
    schema = sweep_schema(stored_catalogue())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("text", [SWEEP, OF_RANDOM], ids=["grid", "random"])
def test_a_sweep_is_valid(of_sweep, text):
    assert fault(of_sweep, parse_yaml(text).data) is None


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ("seeds: 3", "sedes: 3", ()),
        ("seeds: 3", "seeds: 0", ("seeds",)),
        ("steps: 500", "steps: many", ("steps",)),
        ("steps: 500", "", ()),
        ("name: rates", "name: a/b", ("name",)),
        ("config: quickstart", "config: 3", ("config",)),
        ("trials: 4", "trials: 1", ("prune", "trials")),
        ("from_step: 100", "from_stp: 100", ("prune",)),
        ("seeds: 3", "seeds: 3\nmethod: genetic", ("method",)),
        ("seeds: 3", "seeds: 3\ntrials: 5", ("trials",)),
        ("seeds: 3", "seeds: 3\nmethod: random", ()),
        ("[3e-4, 1e-3]", "[3e-4, fast]", ("keys", "training.learning_rate", 1)),
        ("[3e-4, 1e-3]", "[-1.0]", ("keys", "training.learning_rate", 0)),
        ("[3e-4, 1e-3]", "[]", ("keys", "training.learning_rate")),
        ("[3e-4, 1e-3]", "3e-4", ("keys", "training.learning_rate")),
        ("[3e-4, 1e-3]", "{low: 1, high: 2}", ("keys", "training.learning_rate")),
        ("betas", "beta", ("keys", "training.optimizer", 1)),
        ("[adamw,", "[adamm,", ("keys", "training.optimizer", 0)),
        ("training.learning_rate", "training.lerning_rate", ("keys",)),
        ("model.num_layers", "seed", ("keys",)),
        ("model.num_layers", "training.total_steps", ("keys",)),
        ("training.eval_steps: 50", "training.eval_steps: 0", ("fixed", "training.eval_steps")),
        ("training.eval_steps", "training.eval_step", ("fixed",)),
        ("fixed: {", "fixed: {training: {}, ", ("fixed",)),
    ],
    ids=str,
)
def test_a_fault_of_a_sweep_is_refused_at_its_place(of_sweep, before, after, path):
    assert before in SWEEP
    found = fault(of_sweep, parse_yaml(SWEEP.replace(before, after, 1)).data)
    assert found is not None
    assert tuple(found.absolute_path) == path


def test_a_fault_of_a_range_is_refused_at_its_place(of_sweep):
    for before, after, path in (
        ("low: 1e-4", "low: little", "keys.training.learning_rate.low"),
        ("log: true", "lag: true", "keys.training.learning_rate"),
        ("trials: 20", "trials: 0", "trials"),
        ("trials: 20", "", ""),
    ):
        found = fault(of_sweep, parse_yaml(OF_RANDOM.replace(before, after, 1)).data)
        assert ".".join(map(str, found.absolute_path)) == path


# ---------------------------------------------------------------------- the commands


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out

    for entries in stored_catalogue().values():
        for name in entries:
            assert re.search(rf"^  {re.escape(name)} ", out, re.MULTILINE)


def test_list_shows_the_options_of_one_kind(capsys):
    assert main(["list", "optimizers"]) == 0
    out = capsys.readouterr().out

    assert (
        "betas = [0.9, 0.999]: a list of 2 values, each a number from 0 and below 1; decay rates"
        in out
    )
    assert "cosine" not in out
    assert main(["list", "tokenizers"]) == 0
    assert "path, needed: text; the file." in capsys.readouterr().out


def test_schema_prints_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == SCHEMA.read_text()

    assert main(["schema", "--out", "mine.json"]) == 0
    assert Path("mine.json").read_text() == SCHEMA.read_text()
    assert f"{MODELINE}mine.json" in capsys.readouterr().out

    assert main(["schema", "--sweep"]) == 0
    assert json.loads(capsys.readouterr().out) == sweep_schema(stored_catalogue())

    assert main(["schema", "--out", "no/such/folder.json"]) == 5
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["list"], ["list", "handlers"], ["schema"]], ids=" ".join)
def test_they_answer_without_torch(words):
    program = f"""
import sys
from fundamentallm.engine.cli import main
code = main({words!r})
print(code, "torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert result.stdout.endswith("\n0 False\n"), result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_knows_commands_and_packaged_configurations(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out

    assert "quickstart" in script
    for word in ("generate", "--temperature", "_fundamentallm_config"):
        assert word in script


def test_bash_completes(tmp_path, capsys):
    main(["completion", "bash"])
    (tmp_path / "script.sh").write_text(capsys.readouterr().out)
    (tmp_path / "quiet.yaml").touch()
    ask = """
source ./script.sh
COMP_WORDS=(fundamentallm run qui); COMP_CWORD=2
_shtab_fundamentallm fundamentallm qui run
echo "${COMPREPLY[@]}"
"""
    result = subprocess.run(
        ["bash", "-c", ask], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True
    )

    assert set(result.stdout.split()) == {"quickstart", "quiet.yaml"}
