"""Write docs/options.md and docs/code.md from the code.

    python -m docs.generate

A test checks that both pages are up to date.
"""

import argparse
import ast
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
# The code, a line a file

Made from the modules' first lines by `python -m docs.generate`. A tour in reading order is in
[CONTRIBUTING.md](../CONTRIBUTING.md), why things are as they are in [design.md](design.md).
"""


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
    """Every module of flare/, folder by folder, and the scripts, with the first line of its docstring."""
    parts = [CODE_HEAD]
    folders = sorted({path.parent for path in (REPO / "flare").rglob("*.py")})
    for folder in [REPO, *folders]:
        parts.append(f"## {'Scripts' if folder == REPO else f'{folder.relative_to(REPO)}/'}\n")
        lines = ["| file | what it is for |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            lines.append(f"| `{path.name}` | {first_line(path)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def first_line(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


PAGES = {"options.md": options_page, "code.md": code_page}

if __name__ == "__main__":
    main()
