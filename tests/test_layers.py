"""Each module imports only from layers above its own; whoever breaks that breaks this."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import rxllm

# From the top: a module sees its own layer and those before it. Folders stand for all that is in them.
LAYERS = """
    errors
    values
    messages
    clock
    runtime
    bell
    demand
    stream
    policies
    events
    reports
    stores
    feedback
    gate
    providers
    transports
    clients
    operators
    sources sinks
    jobs
    telemetry
    testing
    runner presets config scale
    cli __main__
"""
LEVEL = {name: level for level, line in enumerate(LAYERS.split("\n")) for name in line.split()}
FRONT = len(LAYERS)  # rxllm/__init__.py sees all, and nothing in the package sees it

# Who alone may import it, beside the doubles
OWNERS = {
    "aiohttp": "rxllm.transports.http*, rxllm.transports.connections",
    "limits.storage": "rxllm.stores.backends",
    "reactivex.internal": "",
}

ROOT = Path(rxllm.__path__[0])
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def imported(module: str, path: Path, source: str) -> Iterator[str]:
    """Name all that the source imports: at the top, in functions, for types, by import_module("…")."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def level(name: str) -> int | None:
    """Return the layer of a dotted name; that of the package itself is the front."""
    parts = name.split(".")
    return LEVEL.get(parts[1]) if len(parts) > 1 else FRONT


def faults(module: str, path: Path, source: str) -> list[str]:
    """Say what a module imports that it should not."""
    own = level(module)
    found = []
    for name in imported(module, path, source):
        if name == "rxllm" or name.startswith("rxllm."):
            other = level(name)
            if own is not None and (FRONT if other is None else other) > own:
                found.append(f"{module} imports {name}")
        for foreign, owner in OWNERS.items():
            inside = f"{name}.".startswith(f"{foreign}.")
            allowed = module.startswith("rxllm.testing") or any(fnmatch(module, its) for its in owner.split(", "))
            if inside and not allowed:
                found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "rxllm"])
def test_a_module_has_a_layer_and_imports_only_from_above(module: str) -> None:
    assert level(module) is not None, f"{module} has no layer: give it one here and in the design"
    assert faults(module, MODULES[module], MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("rxllm.messages", "from rxllm.errors import ConfigError", 0),
        ("rxllm.messages", "from rxllm import errors", 0),
        ("rxllm.operators.retry", "from rxllm.operators._inner import Inner", 0),
        ("rxllm.sinks", "import rxllm.sources", 0),
        ("rxllm.errors", "import msgspec, rxllmish", 0),
        ("rxllm.testing.provider", "import aiohttp", 0),
        ("rxllm.transports.http", "from aiohttp import web", 0),
        ("rxllm.transports.http_answer", "from aiohttp import web", 0),
        ("rxllm.transports.connections", "from aiohttp import web", 0),
        ("rxllm.transports.sse", "import aiohttp", 1),
        ("rxllm.errors", "import rxllm.messages", 1),
        ("rxllm.errors", "from rxllm import messages", 1),
        ("rxllm.errors", "from . import messages", 1),
        ("rxllm.policies.aimd", "from ..operators import retry", 1),
        ("rxllm.policies.aimd", "from .quota import Quota", 0),
        ("rxllm.errors", "def f():\n    from rxllm.gate import Gate", 1),
        ("rxllm.errors", "if TYPE_CHECKING:\n    from rxllm.gate import Gate", 1),
        ("rxllm.errors", "importlib.import_module('rxllm.gate')", 1),
        ("rxllm.gate", "import rxllm", 1),
        ("rxllm.gate", "from rxllm import Request", 1),
        ("rxllm.sinks", "from rxllm.testing import SimulatedProvider", 1),
        ("rxllm.clients.base", "import aiohttp.web", 1),
        ("rxllm.clients.base", "from limits import storage", 1),
        ("rxllm.clock", "from reactivex.internal.clock import utc", 1),
    ],
)
def test_the_check_finds_every_way_to_import(module: str, source: str, expected: int) -> None:
    assert len(faults(module, Path("module.py"), source)) == expected
