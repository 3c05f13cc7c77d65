"""The embedded corpus: English text from the Python installation (pydoc topics and docstrings)."""

import ast
import json
import os
import platform
import sysconfig
from pathlib import Path

from flare.data.cache_dir import make_cache_dir

SKIPPED_PARTS = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "pydoc_data",
}
MIN_CHARACTERS = 200


def embedded_documents(cache: Path) -> list[tuple[str, str]]:
    """(name, text) of every document. The order is fixed for a Python version.

    The result is kept in ``cache``, because parsing the standard library takes seconds.
    """
    path = cache / f"embedded-{platform.python_version()}.jsonl"
    if path.is_file():
        return [tuple(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    documents = [*_topics(), *_docstrings()]
    make_cache_dir(cache)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    part.write_text("".join(json.dumps(item) + "\n" for item in documents), encoding="utf-8")
    os.replace(part, path)
    return documents


def _topics() -> list[tuple[str, str]]:
    from pydoc_data.topics import topics

    return [(f"topics/{name}", text) for name, text in sorted(topics.items()) if len(text) >= MIN_CHARACTERS]


def _docstrings() -> list[tuple[str, str]]:
    """One document per module of the standard library: its docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_PARTS & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):  # templates, and files that are invalid on purpose
            continue
        text = "\n\n".join(filter(None, map(_docstring, ast.walk(tree))))
        if len(text) >= MIN_CHARACTERS:
            documents.append((str(name), text))
    return documents


def _docstring(node: ast.AST) -> str | None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ast.get_docstring(node)
    return None
