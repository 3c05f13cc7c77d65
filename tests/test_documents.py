"""The documents agree with this program: every command runs or plans, every link works, the file maps are complete."""

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.documents import Command, Sandbox, commands_of, documents
from tests.documents_planner import Planner
from tests.processes import REPO

PAGES = documents()
COMMANDS = [command for page in PAGES for command in commands_of(page)]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("documents"))


@pytest.fixture
def planner(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Planner:
    return Planner(sandbox, monkeypatch, capsys)


def is_for_shell_only(text: str) -> bool:
    """Whether a line calls other programs only, which would wait, or need root or a network."""
    return text.split()[0] in ("grep", "ulimit", "kill", "touch", "rm", "cp", "mkdir", "df", "apt", "nvidia-smi")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.where} {c.text[:60]}")
def test_every_command_of_the_documents_parses_and_plans(command: Command, planner: Planner) -> None:
    """Bash and our scripts read them, on the guide's server without its network. Benchmarks are not run."""
    text = command.text
    assert "<" not in text, "a command with a placeholder cannot be run"
    if match := re.search(r"-m ((?:benchmarks|tests)\.[\w.]+)", text):
        assert (REPO / f"{match[1].replace('.', '/')}.py").exists()
        return
    if is_for_shell_only(text):
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
        return
    nodes = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"} if "two_nodes.json" in text else {}
    planner.try_command(text, **nodes)


def test_the_main_commands_are_found() -> None:
    """The test above would also pass if no command were found."""
    found = {c.text for c in COMMANDS if c.where.startswith("README.md:")}
    assert "./run_training.sh demo" in found
    assert sum("evaluate_model_enhanced.py" in text for text in found) >= 1
    migration = {c.text for c in COMMANDS if c.where.startswith("README_MIGRATION.md:")}
    assert {
        "./run_training.sh 1 A800 my_experiment",
        './run_training.sh 1 manual my_experiment "0,1,4,5"',
    } <= migration


LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPO)))
def test_every_link_has_a_target(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(file), f"{page.name} links to {target}"


@cache
def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


FILE_MAPS = {"docs/code.md": "## Files at the root", "README_MIGRATION.md": "## 二、"}
UNLISTED = {".ci/", ".gitignore"}
"""Not listed for readers."""


@pytest.mark.parametrize(("page", "heading"), FILE_MAPS.items())
def test_file_map_names_every_file_and_no_other(page: str, heading: str) -> None:
    """Files at the root, and folders with a slash at the end."""
    text = (REPO / page).read_text(encoding="utf-8")
    section = text[text.index(heading) :].split("\n## ")[0]
    named = set(re.findall(r"^(?:\| `|[├└│─ ]*)([\w./-]+)", section, re.MULTILINE)) - {"file", "---", "Flare/"}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    files = tracked.stdout.splitlines()
    roots = {name.partition("/")[0] + ("/" if "/" in name else "") for name in files} - UNLISTED
    listed = {name for name in named if "." in name or name.endswith("/")}
    assert {name for name in roots if name not in listed} == set(), "not in the file map"
    assert {name for name in listed if not (REPO / name).exists()} == set(), "in the file map, but not there"
