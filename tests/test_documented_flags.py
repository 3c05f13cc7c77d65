"""Flags and messages in the documents are those of the code, and every flag has help and a test."""

import argparse
import ast
import re
from functools import cache
from pathlib import Path

import pytest

from docs import generate
from flare.config.options import FIELDS
from flare.config.parse import build_parser as training_parser
from flare.evaluation.options import build_parser as evaluation_parser
from flare.nope.command_line import build_parser as patch_parser
from tests.documents import documents
from tests.processes import REPO

PARSERS = {"train": training_parser(), "evaluate": evaluation_parser(), "patch": patch_parser()}
PAGES = documents()
WITHOUT_USE = (
    "test_documented_flags.py", "test_documents.py", "documents_planner.py", "test_examples.py", "test_invocations.py",
)  # fmt: skip
"""Test files that name flags without checking their effect."""

OTHERS_FLAGS = {
    # torchrun, Slurm, pip, tensorboard, nvidia-smi, git, ruff, hf, pytest
    "--standalone", "--logdir", "--port", "--host", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--signal",
    "--kill-on-bad-exit", "--index-url", "--no-build-isolation", "--repo-type", "--local-dir", "--query-gpu",
    "--format", "--ipc", "--shm-size", "--durations", "--check", "--hook-type", "--signoff", "--maxfail",
    # of the tests and their scripts
    "--slow", "--faults", "--fast", "--kills",
}  # fmt: skip


@cache
def known_flags() -> set[str]:
    """Flags of our scripts, those of the modules with a command line, and those of benchmarks."""
    flags = {flag for parser in PARSERS.values() for action in parser._actions for flag in action.option_strings}
    sources = [*REPO.glob("flare/**/*.py"), *REPO.glob("benchmarks/*.py"), *REPO.glob("tests/**/*.py")]
    for path in sources:
        flags |= set(re.findall(r"add_argument\(\s*\"(--\w+)\"", path.read_text(encoding="utf-8")))
    return flags | OTHERS_FLAGS


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_flag_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", page.read_text(encoding="utf-8")))
    assert named - known_flags() == set()


@pytest.mark.parametrize("page", ["options.md", "code.md"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    wrong = f"docs/{page} is not up to date; run: python -m docs.generate"
    assert (REPO / "docs" / page).read_text(encoding="utf-8") == generate.PAGES[page](), wrong


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_every_flag_has_a_help_text(parser: argparse.ArgumentParser) -> None:
    assert [action.dest for action in parser._actions if not action.help] == []


def flags_to_test() -> list[str]:
    return sorted(
        {f for p in PARSERS.values() for a in p._actions for f in a.option_strings if f not in ("-h", "--help")}
    )


@cache
def words_of_tests() -> str:
    """All tests except those of ``WITHOUT_USE``."""
    files = [p for p in (REPO / "tests").rglob("*.py") if p.name not in WITHOUT_USE]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize("flag", flags_to_test())
def test_every_flag_is_used_by_a_test(flag: str) -> None:
    """As a flag, or as an option of this name."""
    used = re.search(rf"{flag}\b|[\"' (,{{]{flag[2:]}(=|\"|'|:)", words_of_tests())
    assert used, f"no test uses {flag}"


def test_options_page_names_every_option() -> None:
    text = generate.PAGES["options.md"]()
    assert [name for name in FIELDS if f"`--{name}`" not in text] == []


# -- messages ----------------------------------------------------------------------------------------------------


@cache
def strings_of_the_code() -> list[str]:
    """Every string of flare/ and of the shell scripts, with "…" in place of values."""
    found = [path.read_text(encoding="utf-8") for path in REPO.glob("*.sh")]
    for path in (REPO / "flare").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
    return found


def flares_messages() -> list[str]:
    """Messages of Flare in docs/troubleshooting.md: the headings of its first part."""
    text = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", text.split("\n## Messages of other programs")[0], re.MULTILINE)


@pytest.mark.parametrize("message", flares_messages())
def test_quoted_messages_are_those_of_the_code(message: str) -> None:
    """Except for the values, which the page writes as "…"."""
    pieces = [re.escape(piece.strip()) for piece in message.split("…") if piece.strip()]
    pattern = re.compile(".*?".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in strings_of_the_code()), message
