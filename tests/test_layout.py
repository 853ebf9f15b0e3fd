"""The shape of the project: who imports whom, what is never imported, and that every job kind runs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.kinds import KINDS, kind_named
from jobs.specs import Spec

ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "ganq", "worker", "storage", "jobs")
SOURCES = sorted(
    path for folder in (*PACKAGES, "benchmarks") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)
HEAVY = (
    "torch",
    "torchvision",
    "celery",
    "kombu",
    "sqlalchemy",
    "alembic",
    "redis",
    "numpy",
    "PIL",
    "psycopg",
)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- imports ------------------------------------------------------------------------------------


def test_imports_go_from_cli_to_worker_to_storage_to_jobs_and_never_back(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom importlinter.cli import lint_imports\n"
        f"sys.exit(lint_imports(config_filename='pyproject.toml', cache_dir={str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    "module", ["cli.main", "ganq", "jobs.kinds", "jobs.specs", "jobs.context", "storage.settings"]
)
def test_what_every_command_imports_loads_nothing_heavy(module: str) -> None:
    loaded = set(python(f"import sys, {module}; print(*sys.modules)").split())
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    "modules",
    [
        "storage.db.queries, storage.db.store, storage.db.schema",
        "worker.celery_bridge.app, worker.supervisor.loop",
    ],
)
def test_neither_the_table_nor_the_supervisor_loads_torch(modules: str) -> None:
    loaded = set(python(f"import sys, {modules}; print(*sys.modules)").split())
    assert loaded.isdisjoint({"torch", "torchvision"})


def test_the_shared_fixtures_load_neither_torch_nor_a_database() -> None:
    loaded = set(
        python("import sys; sys.path.insert(0, 'tests'); import conftest; print(*sys.modules)").split()
    )
    assert loaded.isdisjoint(HEAVY)


def test_no_module_is_named_after_a_library_it_uses() -> None:
    for path in SOURCES:
        assert path.stem not in HEAVY, f"{path} can hide the library"


# --- kinds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_spec_of_its_own_name(name: Any) -> None:
    kind = kind_named(name)
    assert kind.name == name
    assert kind.spec_class().kind == name
    assert {"source", "checkpoint"} <= set(kind.spec_class().model_fields) or not kind.needs_model


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_says_whether_its_specs_split(name: Any) -> None:
    kind = KINDS[name]
    assert kind.splits == (kind.spec_class().split is not Spec.split)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.runner])
def test_every_kind_that_workers_run_has_a_run_function_of_spec_and_context(name: Any) -> None:
    module, _, function = (KINDS[name].runner or "").partition(":")
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.is_relative_to(ROOT / "jobs")
    tree = ast.parse(path.read_text())  # without importing it: it would load torch
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    assert [argument.arg for argument in found.args.args] == ["spec", "ctx"]


# --- what may not stand in the sources ------------------------------------------------------------

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
TORCH_LOADS = {"torch.load", "torch.serialization.load"}


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load, '' for anything that is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def is_true(call: ast.Call, name: str) -> bool:
    return any(
        word.arg == name and isinstance(word.value, ast.Constant) and word.value.value is True
        for word in call.keywords
    )


def offences(source: str) -> Iterator[str]:
    """Every way in which a source could run code out of a file that it reads."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # what a name of this module stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                if alias.name.split(".")[0] in BANNED_MODULES:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if (node.module or "").split(".")[0] in BANNED_MODULES:
                yield f"line {node.lineno}: from {node.module} import"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        first, _, rest = called.partition(".")
        called = names.get(first, first) + ("." + rest if rest else "")
        if called in TORCH_LOADS and not is_true(node, "weights_only"):
            yield f"line {node.lineno}: {called} without weights_only=True"
        if called in ("numpy.load", "numpy.lib.npyio.load") and any(
            word.arg in ("allow_pickle", None)
            and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            for word in node.keywords
        ):
            yield f"line {node.lineno}: {called} with allow_pickle"
        if called.startswith("yaml.") and "load" in called and not called.startswith("yaml.safe_load"):
            yield f"line {node.lineno}: {called}"
        if called in ("eval", "exec", "os.system", "os.popen") or is_true(node, "shell"):
            yield f"line {node.lineno}: {called} runs text"
        if called in ("__import__", "importlib.import_module") and node.args:
            wanted = node.args[0].value if isinstance(node.args[0], ast.Constant) else ""
            if str(wanted).split(".")[0] in BANNED_MODULES:
                yield f"line {node.lineno}: {called}({wanted!r})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_reads_what_could_run_code(path: Any) -> None:
    assert list(offences(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "def f():\n    import dill",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "import torch as t\nt.load(p)",
        "from torch import load\nload(p)",
        "from torch import load as read\nread(p)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import numpy as np\nnp.load(p, **options)",
        "import yaml\nyaml.load(f, Loader)",
        "from yaml import unsafe_load\nunsafe_load(f)",
        "import importlib\nimportlib.import_module('pickle')",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "eval(x)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(offences(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import numpy as np\nnp.load(p, mmap_mode='r')",
        "import yaml\nyaml.safe_load(f)",
        "model.eval()",
        "import json\njson.load(f)",
    ],
)
def test_the_search_lets_pass_what_is_safe(source: str) -> None:
    assert list(offences(source)) == []
