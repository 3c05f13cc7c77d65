"""Imports point one way, nothing imports in a circle, and files stay readable."""

import ast
from pathlib import Path

import pytest

from tests.processes import REPO

PACKAGES = [
    [
        "errors",
        "files",
        "terminal",
        "cpu",
        "child_process",
        "logs",
        "option_fields",
        "option_values",
        "argument_parser",
        "hub",
        "index_ranges",
        "__init__",
    ],
    ["nope", "gpus"],
    ["config", "distributed"],
    ["plan", "data", "checkpoint"],
    ["run", "model", "optim"],
    ["launch"],
    ["evaluation"],
    ["train"],
    ["demo"],
]
"""Bottom up: modules at the root of flare/ and packages. Each imports only from lower levels."""
RANK = {name: rank for rank, names in enumerate(PACKAGES) for name in names}
MODULES = sorted((REPO / "flare").rglob("*.py"))
MAX_ROOT_MODULES = 12
MAY_PRINT = {
    "errors.py", "demo.py", "launch/launch.py", "launch/agent.py", "evaluation/launch.py", "gpus/__main__.py",
    "checkpoint/__main__.py", "nope/export/stock_check.py",
}  # fmt: skip
"""Commands, whose output it is, and a process without Flare that answers on stdout."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO / "flare").with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, at its top or inside a function, named from flare/ on."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flare":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".partition(".")[2]
                is_module = (REPO / "flare" / Path(*inner.split("."))).with_suffix(".py").exists()
                found.add(inner if is_module else node.module.partition(".")[2] or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("flare.")}
    return found


IMPORTS = {module_name(path): imports_of(path) for path in MODULES}


def test_every_package_has_a_place_in_the_order() -> None:
    assert {name.split(".")[0] for name in IMPORTS} == set(RANK)


def test_few_modules_are_at_the_root() -> None:
    modules = [path.name for path in (REPO / "flare").glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MAX_ROOT_MODULES


@pytest.mark.parametrize("name", IMPORTS)
def test_packages_import_only_lower_levels(name: str) -> None:
    package = name.split(".")[0]
    for imported in IMPORTS[name]:
        other = imported.split(".")[0]
        at_the_bottom = RANK[package] == RANK[other] == 0
        assert package == other or at_the_bottom or RANK[other] < RANK[package], f"{name} imports {imported}"


def test_no_import_comes_back_to_where_it_began() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for imported in sorted(IMPORTS.get(name, ())):
                visit(imported, (*path, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


def test_train_and_evaluation_meet_in_the_session_only() -> None:
    meeting = [
        n for n, imports in IMPORTS.items() if n.startswith("train.") and any("evaluation." in i for i in imports)
    ]
    assert meeting == ["train.session"]


@pytest.mark.parametrize("path", [*MODULES, *REPO.glob("*.py")], ids=lambda p: str(p.relative_to(REPO)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_the_package_logs_and_does_not_print(path: Path) -> None:
    """Except commands, whose output it is, and a process without Flare that answers on stdout."""
    if path.relative_to(REPO / "flare").as_posix() in MAY_PRINT:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno}"
