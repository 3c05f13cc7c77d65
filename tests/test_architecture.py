"""Imports point one way, files stay readable, and no module does at import what belongs into a function."""

import ast
from pathlib import Path

import pytest

from tests.processes import REPO

LAYERS = [
    ["errors", "files", "parent", "phase", "terminal", "threads", "card_models", "__init__"],
    ["command_line", "nvidia_smi", "gpus", "gpus_cli", "jsonc", "options", "option_values", "nope.layers"],
    ["config_file", "config", "batch", "hosts", "fabric", "sharding", "compiler", "distributed", "distress"],
    ["data.order", "moments", "adamw_8bit", "lean_layers", "recompute"],
    ["experiment", "hub", "logs", "metrics_file", "summary", "watchdog", "nope.modeling_nope", "balance", "pace"],
    ["nope.flags", "nope.tensors", "nope.temperature", "nope.staging", "nope.format", "nope.shards"],
    ["nope.probe", "nope.load", "nope.native", "nope.patch", "nope.stock_check", "tensor_files", "optim"],
    ["nope.canary_file", "nope.canary", "nope.endpoint"],
    ["attention"],
    ["shapes", "chunks", "trainable", "flops", "activations", "loss"],
    ["plan_inputs", "gathered", "memory", "rooms", "suggest", "plan", "plan_table", "last_words"],
    ["nope.verify", "nope.compare", "nope.card", "nope.export"],
    ["data"],
    ["run", "setup", "handoff", "worker_errors"],
    ["launch", "model", "checkpoint", "checkpoint_cli", "board", "metrics"],
    ["garbage", "loss_scale", "outcomes", "prefetch", "progress", "parts"],
    ["trainer", "evaluation"],
    ["prepare", "prepare_only", "resolved_config", "saving", "resume", "session", "worker", "demo"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted((REPO / "flare").rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPO / "flare").with_suffix("").parts)


def rank_of(name: str) -> int | None:
    """Rank of a module or, for a package that is one layer, of its package."""
    if name.endswith("__init__") and name != "__init__":
        return None
    while name and name not in RANK:
        name = name.rpartition(".")[0]
    return RANK.get(name)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flare":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("flare").lstrip(".")
                is_module = (REPO / "flare" / Path(*inner.split("."))).with_suffix(".py").exists()
                found.add(inner if is_module else node.module.removeprefix("flare").lstrip("."))
    return {name for name in found if name}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    rank = rank_of(name)
    if rank is None:
        return
    for imported in imports_of(path):
        same_package = imported.split(".")[0] == name.split(".")[0]
        assert rank_of(imported) is not None, f"{imported} has no layer"
        assert rank_of(imported) <= rank, f"{name} imports {imported}, which lies above it"
        assert same_package or name != "trainer" or imported != "evaluation"


def test_every_module_has_a_layer() -> None:
    unknown = [module_name(p) for p in MODULES if rank_of(module_name(p)) is None and p.name != "__init__.py"]
    assert unknown == []


def test_trainer_and_evaluation_do_not_know_each_other() -> None:
    for path in MODULES:
        name = module_name(path)
        if name == "trainer":
            assert not any(i.startswith("evaluation") for i in imports_of(path))
        if name.startswith("evaluation"):
            assert "trainer" not in imports_of(path)


@pytest.mark.parametrize("path", [*MODULES, *REPO.glob("*.py")], ids=lambda p: p.name)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and path.parent.name == "flare":
            assert node.func.id != "print" or path.name in (
                "errors.py",
                "launch.py",
                "demo.py",
                "gpus_cli.py",
                "checkpoint_cli.py",
            )
