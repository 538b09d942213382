"""The rooms and the arrows between them, as the design draws them, held against the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(path for package in ("service", "calibrators") for path in (ROOT / package).rglob("*.py"))

# room -> rooms it may import; `app` and the command line may import all
ALLOWED = {
    "service.rpc": {"service.inference", "service.learning", "service.drift", "service.store", "calibrators"},
    "service.web": {"service.drift", "calibrators"},  # the page shows what these have words and charts for
    "service.learning": {"service.inference", "service.drift", "service.store", "calibrators"},
    "service.drift": {"service.store", "calibrators"},
    "service.inference": {"calibrators"},
    "service.store": set(),
    "calibrators": set(),
}
EVERYWHERE = {"service", "service.errors"}  # the error tree and the version
ONLY_HERE = {
    "onnxruntime": {"service/inference/session.py"},
    "faiss": {"calibrators/index.py"},
    "opentelemetry": {"service/rpc/tracing.py"},
    "sqlite3": {
        f"service/store/{name}.py" for name in ("catalogue", "database", "maintenance", "verification", "writer")
    },
    "ngh2": {"service/rpc/h2_connection.py"},
    "grpc": {
        *(f"service/client/{name}.py" for name in ("asynchronous", "blocking", "connection", "failures", "stream")),
        *(f"service/rpc/{name}.py" for name in ("forward", "grpc_front", "status", "wire")),
    },
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs, anywhere in it."""
    found = set()
    tree = ast.parse(path.read_text())
    for_types_only = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    skipped = {inner for block in for_types_only for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {name_of(m) for m in MODULES}
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return found


def room_of(module: str) -> str:
    return "calibrators" if module.startswith("calibrators") else ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_the_rooms_its_own_room_may(path: Path) -> None:
    room = room_of(name_of(path))
    if room not in ALLOWED:
        return  # app, cli, client and what else stands at the top of `service`
    own = {m for m in imports(path) if m.split(".")[0] in {"service", "calibrators"}}
    foreign = {m for m in own if room_of(m) != room and m not in EVERYWHERE and room_of(m) not in ALLOWED[room]}
    assert not foreign


@pytest.mark.parametrize("library", ONLY_HERE)
def test_a_library_is_imported_only_where_the_design_says(library: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in MODULES if any(m.split(".")[0] == library for m in imports(p))}
    assert users == ONLY_HERE[library]


def test_there_are_no_cycles_between_modules() -> None:
    graph = {name_of(p): {m for m in imports(p) if m.split(".")[0] in {"service", "calibrators"}} for p in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_a_server_needs_none_of_what_the_extras_bring() -> None:
    code = "import sys, service.app, service.client, service.cli, service.learning.worker; print({'torch', 'matplotlib', 'faiss', 'opentelemetry'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_room_has_a_line_that_says_what_it_is_for() -> None:
    for path in MODULES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_test_waits_for_the_clock() -> None:
    sleep = "sle" + "ep("
    assert not [str(path) for path in (ROOT / "tests").rglob("*.py") if sleep in path.read_text()]
