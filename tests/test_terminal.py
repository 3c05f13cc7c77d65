"""Output on a terminal: at most its width and 100 columns, colors, and help in groups."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flare.config import parse
from flare.evaluation import options as evaluation_options
from flare.nope import command_line
from flare.terminal import columns, fold, has_colors, paint
from tests.processes import REPO, script_environment
from tests.pseudo_terminal import ESCAPE, lines_of, run_in_terminal

COMMANDS = {
    "run_training.sh": ["bash", REPO / "run_training.sh"],
    "demo": [sys.executable, "-m", "flare.demo"],
    "train": [sys.executable, REPO / "train_qwen_multi_gpu.py"],
    "evaluate": [sys.executable, REPO / "evaluate_model_enhanced.py"],
    "patch": [sys.executable, REPO / "patch_qwen_rope.py"],
    "gpus": [sys.executable, "-m", "flare.gpus"],
    "checkpoint": [sys.executable, "-m", "flare.checkpoint"],
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_width_is_that_of_the_terminal_up_to_100(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("80", 80), ("100", 100), ("240", 100), ("0", 100), ("many", 100)):
        monkeypatch.setenv("COLUMNS", value)
        assert columns(io.StringIO()) == expected
    monkeypatch.delenv("COLUMNS")
    assert columns(io.StringIO()) == 100


def test_colors_are_used_on_terminals_only(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    assert paint("error:", "red", terminal) == "\033[1;31merror:\033[0m"
    assert not has_colors(io.StringIO())
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert paint("error:", "red", terminal) == "error:"


def test_lines_are_folded_between_words_on_a_terminal_only(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    path = "/data/" + "long/" * 10
    text = f"error: the directory\n{path} is --not-there and cannot be made, because the disk is full"
    assert fold(text, io.StringIO()) == text
    folded = fold(text, terminal).splitlines()
    assert folded[0] == "error: the directory" and path in [line.strip() for line in folded]
    assert all(len(line) <= 30 for line in folded if path not in line)
    assert " ".join(" ".join(folded).split()) == " ".join(text.split())


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_the_terminal_and_ends_with_examples(name: str, width: int) -> None:
    environment = script_environment(PYTHON=sys.executable)
    code, written = run_in_terminal([*COMMANDS[name], "--help"], width, environment)
    lines = lines_of(written)
    assert code == 0
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("usage: ")
    if name != "demo":
        assert "examples" in written
    if name != "run_training.sh":
        assert re.search(r"\033\[1m[a-z].*:\033\[0m", written), "headings are bold"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_plain_in_a_pipe_and_imports_no_torch(name: str) -> None:
    """Without torch, transformers and datasets it takes 0.1 s instead of 5 s."""
    command = [str(word) for word in COMMANDS[name]]
    if command[0] == sys.executable:
        command[1:1] = ["-X", "importtime"]
    environment = script_environment(PYTHON=sys.executable, TERM="xterm", COLUMNS="80")
    result = subprocess.run([*command, "--help"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert not ESCAPE.search(result.stdout)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not {"torch", "transformers", "datasets", "matplotlib"} & imported
    assert ("argparse" in imported) == (name != "run_training.sh")


@pytest.mark.parametrize(
    "parser", [parse.build_parser(), evaluation_options.build_parser(), command_line.build_parser()]
)
def test_every_flag_of_the_scripts_is_in_a_group_and_has_help(parser) -> None:
    alone = [a.option_strings for group in parser._action_groups[:2] for a in group._group_actions]
    assert alone == [["-h", "--help"]]
    assert all(action.help for action in parser._actions)
    assert parser.epilog.startswith("examples")


def test_unknown_flag_is_one_line_with_the_nearest_one() -> None:
    for name, wrong, right in (
        ("evaluate", "--datasset", "--datasets"),
        ("patch", "--output-dir", "--output_dir"),
        ("gpus", "--gpu_id", "--gpu_ids"),
    ):
        needed = {"evaluate": ["--model_path", "x"]}.get(name, [])
        command = [*map(str, COMMANDS[name]), *needed, wrong, "x"]
        result = subprocess.run(command, cwd=REPO, env=script_environment(), capture_output=True, text=True)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and f"did you mean '{right}'?" in line


def test_an_error_is_red_and_folded_on_a_terminal() -> None:
    command = [*COMMANDS["train"], "--stage", "3", "--learning_rat", "1e-4", "--no_such_flag_at_all", "1"]
    code, written = run_in_terminal(command, 80, script_environment())
    assert code == 2
    assert written.count("\033[1;31merror:\033[0m") == 1
    assert max(map(len, lines_of(written))) <= 80
    _, plain = run_in_terminal(["env", "NO_COLOR=1", *command], 80, script_environment())
    assert not ESCAPE.search(plain)


@pytest.mark.slow
def test_a_run_fits_the_terminal_from_the_plan_to_the_summary(train_flags: list[str], tmp_path: Path) -> None:
    """Only a path may be wider than the terminal."""
    flags = [*train_flags, "--eval_context_lengths", "8,16,32"]
    code, written = run_in_terminal([*COMMANDS["train"], *flags, "--nproc_per_node", 2], 80, script_environment())
    assert code == 0, written
    lines = lines_of(written)
    wide = [line for line in lines if len(line) > 80 and max(map(len, line.split())) < 40]
    assert wide == []
    assert "Warning" not in written
    place = {words: max(i for i, line in enumerate(lines) if words in line) for words in ("100%|", "held-out loss")}
    assert place["100%|"] < place["held-out loss"], "the summary is below the bar"
    for words in (
        "NoPE layers     1 3",
        "stage 1: 100%|",
        "step 6/6 | loss",
        "held-out loss   ",
        "curves          tensorb",
    ):
        assert any(line.strip().startswith(words) for line in lines), words
    log = (tmp_path / "out" / "run" / "training.log").read_text()
    assert not ESCAPE.search(log)
    evaluation = [line for line in log.splitlines() if "step 6/6 | epoch" in line]
    assert len(evaluation) == 1 and "at 32: " in evaluation[0]  # in the file a message is one line
