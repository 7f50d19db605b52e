"""The house: imports go down only, doors open fast, and nothing in a load path runs code."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "fundamentallm"

# Lowest first; a module may import from its own layer and from those before it. Longer prefixes
# win, so that a file can stand elsewhere than its package.
LAYERS = [
    ["redaction"],
    ["errors", "registry", "events", "markdown"],
    ["files"],
    ["config.yaml"],
    ["config", "config.yaml.difference", "config.yaml.edit"],
    ["data.text_file", "data.file_kinds", "data.batch", "data.permutation"],
    ["data.tokenizer"],
    ["data"],
    ["data.loaders"],
    ["data.sources", "data.dataset"],
    ["data.preparing", "data.overlap"],
    ["models.layers", "models.calling"],
    ["models.generation"],
    ["models"],
    ["models.layouts", "models.native"],
    ["compute"],
    ["training.optim"],
    ["training.optimizers"],
    ["training.losses", "training.schedulers"],
    [
        "training.checkpoint.finite",
        "training.checkpoint.manifest",
        "training.checkpoint.tensor_file",
        "training.checkpoint.tree",
    ],
    ["training.checkpoint.directory"],
    ["training.checkpoint.store"],
    ["training.checkpoint"],
    ["training"],
    ["training.step"],
    ["training.recovery"],
    ["training.state"],
    ["training.limits"],
    ["training.decision"],
    ["training.dispatch"],
    ["training.ignite_handlers"],
    ["training.evaluator"],
    ["training.steering"],
    ["training.loop"],
    ["training.checkpoint.snapshot", "training.recovery.incident"],
    ["training.handlers.base"],
    ["training.handlers"],
    ["training.trainer"],
    ["inference"],
    ["reports"],
    ["engine.console", "engine.plugins", "engine.stopping", "engine.arguments"],
    ["engine.wiring.abilities"],
    ["engine.tuning"],
    ["engine.wiring"],
    ["engine.catalogue"],
    ["engine", "engine.tuning.tune", "engine.tuning.range_test"],
    ["engine.planning"],
    ["engine.commands"],
    [
        "engine.cli",
        "engine.sweeping.child",
        "engine.__main__",
        "engine.reference",
        "__main__",
        "training.train",
        "testing",
    ],
]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def layer_of(module: str) -> int:
    matches = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert matches, f"{module} belongs to no layer: add it to LAYERS"
    return max(matches)[1]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path) -> set[str]:
    """Return the package's modules that a file imports: at once, lazily, or only for types."""
    return imports_in(tree_of(path))


def imports_in(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith("fundamentallm."):
                found.add(resolve(name.removeprefix("fundamentallm.")))
    return found


@cache
def resolve(dotted: str) -> str:
    """Return the module in `module.attribute`."""
    parts = dotted.split(".")
    while parts:
        path = PACKAGE.joinpath(*parts)
        if path.with_suffix(".py").exists() or (path / "__init__.py").exists():
            return ".".join(parts)
        parts.pop()
    return dotted.split(".")[0]


# training/train.py is a door to the engine that its callers expect in this package.
def test_imports_go_down_only() -> None:
    upward = {
        module: found
        for path in SOURCES
        # The packages' own doors are checked to be light below.
        if (module := module_name(path)) not in ("", "training")
        and (found := upward_imports(module, imports_of(path)))
    }
    assert not upward, f"imports from above: {upward}"


def upward_imports(module: str, imports: set[str]) -> set[str]:
    return {name for name in imports if layer_of(name) > layer_of(module)}


# One module of each layer but the highest, the last by name, which is a file and not a face.
LOWER = [
    max(name for name in map(module_name, SOURCES) if name and layer_of(name) == number)
    for number in range(len(LAYERS) - 1)
]


@pytest.mark.parametrize(
    "form",
    [
        "import fundamentallm.{}",
        "def f():\n    import fundamentallm.{}",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fundamentallm.{}",
    ],
    ids=["plain", "lazy", "types"],
)
def test_an_import_that_goes_up_is_noticed(form: str) -> None:
    for module in LOWER:
        above = next(
            name
            for name in map(module_name, SOURCES)
            if name and layer_of(name) == layer_of(module) + 1
        )
        path = PACKAGE.joinpath(*module.split("."))
        path = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        source = path.read_text(encoding="utf-8") + "\n" + form.format(above)
        assert upward_imports(module, imports_in(ast.parse(source))) == {above}, module


def test_data_and_models_do_not_know_each_other() -> None:
    for room, other in (("data", "models"), ("models", "data")):
        for path in (PACKAGE / room).rglob("*.py"):
            assert not {name for name in imports_of(path) if name.split(".")[0] == other}


def test_no_files_import_each_other_in_a_circle() -> None:
    imports = {module_name(path): imports_of(path) - {module_name(path)} for path in SOURCES}
    while free := {name for name in imports if not imports[name] & imports.keys()}:
        imports = {name: found for name, found in imports.items() if name not in free}
    assert not imports, f"a circle is among {sorted(imports)}"


def test_a_handler_never_imports_the_engine_or_another_layer_above() -> None:
    for path in (PACKAGE / "training" / "handlers").glob("*.py"):
        assert not {name for name in imports_of(path) if name.startswith(("engine", "inference"))}


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(result.stdout.split())


def test_errors_registry_events_and_config_do_without_torch() -> None:
    modules = modules_after(
        "import fundamentallm, fundamentallm.errors, fundamentallm.registry, fundamentallm.config"
    )
    assert not modules & {"torch", "ignite", "tensorboardX"}


def test_the_command_line_starts_with_the_standard_library_alone() -> None:
    modules = modules_after("import fundamentallm.engine.cli as cli; cli.build_parser()")
    assert not modules & {"torch", "numpy", "pydantic", "yaml", "ignite", "safetensors"}


def test_the_package_of_handlers_does_not_hide_the_module_train() -> None:
    modules_after(
        "import fundamentallm.training, fundamentallm.training.train as door;"
        "assert callable(door.main)"
    )


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib"}


def calls_in(path: Path) -> list[tuple[int, str, ast.Call]]:
    calls = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            calls.append((node.lineno, ast.unparse(node.func), node))
    return calls


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_unpickles_or_evaluates(path: Path) -> None:
    tree = tree_of(path)
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
        if name
    }
    assert not imported & FORBIDDEN_MODULES
    for line, name, call in calls_in(path):
        assert name not in FORBIDDEN_CALLS, f"{path}:{line}: {name}"
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), f"{path}:{line}"
        if name == "torch.load":
            options = {k.arg: k.value for k in call.keywords}
            assert ast.unparse(options["weights_only"]) == "True", f"{path}:{line}"
            assert path.name == "portable.py", f"{path}:{line}: .pt is read in one module alone"
        if name == "importlib.import_module":
            assert path.name == "plugins.py", f"{path}:{line}: plugins are imported in one place"
        shell = [k for k in call.keywords if k.arg == "shell"]
        assert not shell, f"{path}:{line}: shell="


def test_no_command_reaches_the_module_that_reads_pt_files() -> None:
    importers = {module_name(p) for p in SOURCES if "training.checkpoint.portable" in imports_of(p)}
    assert importers == {"training.checkpoint.manager"}
    for path in (PACKAGE / "engine").rglob("*.py"):
        assert "CheckpointManager" not in path.read_text(encoding="utf-8").replace(
            "CheckpointManager.load in Python", ""
        )
