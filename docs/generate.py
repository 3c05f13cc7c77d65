"""Write docs/options.md and docs/code.md from the code.

    python -m docs.generate

A test checks that both pages are up to date.
"""

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from flare.config.options import FIELDS
from flare.config.parse import build_parser as training_parser
from flare.evaluation.options import build_parser as evaluation_parser
from flare.nope.command_line import build_parser as patch_parser
from flare.option_fields import OptionField

DOCS = Path(__file__).resolve().parent
REPO = DOCS.parent

OPTIONS_HEAD = """\
# Options

Generated from the code by `python -m docs.generate`; `--help` of each script prints the same.

Training options are also keys of a JSON file (`--config FILE`, default `training_config.json`). A key is in the
section named in the last column, or at the top level. A key under `"stages": {"1": {...}, "2": {...}}` applies to that
stage only. Lists are written as `[20, 21]` or `"20-32"`; `null` means "not set". Precedence: command line > file >
environment > defaults. A `BOOL` flag without a value means true.
"""

CODE_HEAD = """\
# The code

Written by `python -m docs.generate` from the first sentence of each docstring. Packages are in import order: a package
imports only from those above it. See also the [tour](../CONTRIBUTING.md#a-tour-of-the-code) and the
[design](design.md).

## Files at the root

| file | purpose |
|---|---|
| `run_training.sh` | starts a stage on the GPUs that you name, or the demo |
| `run_tests.sh` | runs the tests |
| `env.sh` | sets up the Python environment for these two |
| `train_qwen_multi_gpu.py` | one stage of training: plans, then launches or joins |
| `evaluate_model_enhanced.py` | evaluation and report |
| `patch_qwen_rope.py` | patches, verifies, exports or restores a model on disk; importable |
| `training_config.json` | the default configuration, read without `--config` |
| `training_config_gpu_examples.json` | a configuration for each choice of GPUs on a mixed server |
| `examples/` | configurations for other machines and experiments, Slurm |
| `flare/` | the program |
| `docs/` | documents; `generate.py` writes this page and options.md |
| `benchmarks/` | a script for each published number, and the results |
| `tests/` | same packages as `flare/`; `tests/faults/` injects faults into real processes |
| `requirements.txt` | packages of a run; torch is pinned |
| `requirements-dev.txt` | packages of the tests |
| `pyproject.toml` | settings of ruff and pytest |
| `.pre-commit-config.yaml` | checks before each commit |
| `README.md` | what Flare is and how to use it |
| `README_MIGRATION.md` | guide in Chinese |
| `CONTRIBUTING.md` | working on Flare |
"""

PACKAGES = """
nope gpus config distributed plan data checkpoint run model optim launch evaluation train
""".split()
"""In import order (``tests/test_architecture.py``)."""


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


def options_page() -> str:
    """All flags of the three scripts, by group."""
    parts = [OPTIONS_HEAD]
    scripts = [
        ("train_qwen_multi_gpu.py", training_parser()),
        ("evaluate_model_enhanced.py", evaluation_parser()),
        ("patch_qwen_rope.py", patch_parser()),
    ]
    for script, parser in scripts:
        parts.append(f"## {script}\n")
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.dest != "help"]
            sections = FIELDS if parser is scripts[0][1] else {}
            if actions:
                parts.append("\n".join(_group_lines(group.title or "", actions, sections)) + "\n")
    return "\n".join(parts)


def _group_lines(title: str, actions: list[argparse.Action], fields: Mapping[str, OptionField]) -> Iterator[str]:
    """A table of one group. ``fields`` are the options that a file can set."""
    in_file = any(action.dest in fields for action in actions)
    yield f"### {title}\n"
    yield "| flag | value | what it does |" + (" section in a file |" if in_file else "")
    yield "|---|---|---|" + ("---|" if in_file else "")
    for action in actions:
        cells = [f"`{action.option_strings[-1]}`", _value(action), (action.help or "").replace("%%", "%")]
        if in_file:
            cells.append(fields[action.dest].section if action.dest in fields else "")
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(action: argparse.Action) -> str:
    """What follows the flag; empty for a flag without a value."""
    if action.nargs == 0:
        return ""
    value = action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}"
    return f"`{value}{' ...' if action.nargs in ('*', '+') else ''}`"


def code_page() -> str:
    """Every package and module of flare/, with the first sentence of its docstring."""
    flare = REPO / "flare"
    parts = [CODE_HEAD, "\n".join(_folder_lines(flare)) + "\n"]
    for package in PACKAGES:
        folders = sorted({path.parent for path in (flare / package).rglob("*.py")})
        parts += ["\n".join(_folder_lines(folder)) + "\n" for folder in folders]
    return "\n".join(parts)


def _folder_lines(folder: Path) -> Iterator[str]:
    """The heading of a folder, the sentence of its __init__.py, and a table of its modules."""
    yield f"## {folder.relative_to(REPO)}/\n"
    yield f"{first_sentence(folder / '__init__.py')}\n"
    yield "| file | purpose |"
    yield "|---|---|"
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"| `{path.name}` | {first_sentence(path)} |"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0].replace("|", "\\|")


PAGES = {"options.md": options_page, "code.md": code_page}

if __name__ == "__main__":
    main()
