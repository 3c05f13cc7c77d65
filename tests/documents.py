"""Commands of the documents, and a sandbox in which bash runs them.

Programs that a command calls are recorded and not run (``Sandbox``), so the test sees the arguments that bash passes
to them. ``run_training.sh`` and ``run_tests.sh`` are the real ones.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import write_base, write_corpus
from tests.fake_nvidia_smi import install
from tests.processes import REPO, script_environment

OURS = re.compile(r"(\w+=\S+ )*(\./run_|\.venv/bin/|python |python3 |sbatch )")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
PLACES = {"/work/xiaoyonggao": "runs", "/data/runs": "runs", "/shared/runs": "runs"}
"""Directories of the documents -> those of the sandbox."""
FINISHED = "finished"
"""Directory of my_experiment after training; in runs/ it is not trained yet."""
RECORDED = ("python", "python3", "tensorboard", "hf", "sbatch", "scancel", "pre-commit", "tail")
"""Programs that are recorded and not run."""
VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "FLARE_OUTPUT_DIR", "CUDA_VISIBLE_DEVICES")

RECORDER = """#!/bin/sh
# env.sh checks the packages of the user's python with a script on stdin: none are missing.
[ "$1" = - ] && exit 0
{ for name in %s; do eval "printf '%%s=%%s\\\\0' $name \\"\\${$name:-}\\""; done
  printf '%%s\\0' "$(basename "$0")" "$@"; printf '\\n\\0'; } >>"%s"
"""


def documents() -> list[Path]:
    """All pages for readers."""
    return sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("examples/*.md")])


@dataclass(frozen=True)
class Command:
    """A command line of a document, with continued lines joined."""

    where: str  # FILE:LINE
    text: str


def commands_of(path: Path) -> list[Command]:
    """Commands in the shell blocks of a page, and those in its inline code that call Flare."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        first = text[: match.start(2)].count("\n") + 1
        if match[1] == "bash" and not match[2].startswith("#!"):
            found += [(first + n, line) for n, line in joined_lines(match[2])]
        elif not match[1]:
            found += [(first + n, line) for n, line in joined_lines(match[2]) if OURS.match(line)]
    prose = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    for match in INLINE.finditer(prose):
        if OURS.match(match[1]) and len(match[1].split()) > 1:
            found.append((prose[: match.start()].count("\n") + 1, match[1]))
    return [Command(f"{path.relative_to(REPO)}:{line}", " ".join(words.split())) for line, words in sorted(found)]


def joined_lines(block: str) -> list[tuple[int, str]]:
    """(offset of the first line, command) of each command, without comments. A backslash at the end joins lines.

    A comment begins with a # after a space, so that ``FILE#NAME`` contains none.
    """
    found, start, words = [], 0, ""
    for number, line in enumerate(block.splitlines()):
        start = start if words else number
        words += re.sub(r"(^|\s)#.*$", "", line).removesuffix("\\")
        if not line.endswith("\\"):
            if words.strip():
                found.append((start, words.strip()))
            words = ""
    return found


@dataclass(frozen=True)
class Call:
    """A program that a command called."""

    environment: dict[str, str]
    words: list[str]

    @property
    def script(self) -> str:
        """The script: ``train_qwen_multi_gpu.py``, ``-m flare.gpus``, or the name of the program."""
        if self.words[0] not in ("python", "python3") or len(self.words) < 2:
            return self.words[0]
        return " ".join(self.words[1:3]) if self.words[1] == "-m" else Path(self.words[1]).name

    @property
    def arguments(self) -> list[str]:
        """Arguments of the script."""
        return self.words[1 + len(self.script.split()) :] if self.words[0].startswith("python") else self.words[1:]


class Sandbox:
    """A directory like a clone, with the models, data and results that the documents use."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clone = root / "clone"
        self.clone.mkdir(parents=True)
        for path in REPO.iterdir():
            if path.name not in (".git", "demo_output"):
                (self.clone / path.name).symlink_to(path)
        for model in (
            "my_qwen",
            "patched",
            *(f"{FINISHED}/my_experiment/{m}" for m in ("final_model", "stage1/final_model")),
        ):
            self.make_model(model)
        for corpus in ("corpus.jsonl", "corpus/part1.jsonl", "my.jsonl", "a.jsonl", "b.jsonl"):
            (self.clone / corpus).parent.mkdir(exist_ok=True)
            write_corpus(self.clone / corpus)
        self._record = root / "calls"
        for name in RECORDED:
            program = root / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(RECORDER % (" ".join(VARIABLES), self._record))
            program.chmod(0o755)

    def make_model(self, name: str) -> None:
        """A tiny base with Qwen2.5-3B's number of layers, so that the documents' layer numbers are in range."""
        first = self.clone / "my_qwen"
        if name == "my_qwen":
            write_base(first, num_hidden_layers=36, max_position_embeddings=32768)
        else:
            shutil.copytree(first, self.clone / name)

    def in_place(self, text: str) -> str:
        """The text with directories of the documents replaced by those of the sandbox."""
        for place, ours in PLACES.items():
            text = text.replace(place, str(self.clone / ours))
        return re.sub(r"(?<= )N\b", "1", text.replace(".venv/bin/", ""))  # --seed N

    def environment(self, server: str, **more: str) -> dict[str, str]:
        """Environment with the recorders and the GPUs of ``server`` (a key of fake_nvidia_smi.SERVERS) on PATH."""
        fake = install(self.root / "smi" / server, server)
        path = os.pathsep.join([str(self.root / "bin"), fake.environment()["PATH"]])
        return script_environment(PATH=path, PYTHON="python", HF_HOME=str(self.root / "hf")) | more

    def run(self, command: str, server: str = "guide", **more: str) -> list[Call]:
        """Run the command in bash; returns the programs that it called."""
        self._record.unlink(missing_ok=True)
        environment = self.environment(server, **({"FLARE_OUTPUT_DIR": str(self.clone / "runs")} | more))
        environment.pop("CUDA_VISIBLE_DEVICES")
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.in_place(command)],
            cwd=self.clone, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}\n{result.stderr}"
        return self.calls()

    def calls(self) -> list[Call]:
        """The recorded calls."""
        if not self._record.exists():
            return []
        calls = self._record.read_text(encoding="utf-8").split("\n\0")
        fields = [call.removesuffix("\0").split("\0") for call in calls if call]
        n = len(VARIABLES)
        fields = [
            (words[:n], [word for word in words[n:] if word != "-P"]) for words in fields
        ]  # a flag of python itself
        return [Call(dict(v.split("=", 1) for v in settings if v[-1] != "="), words) for settings, words in fields]
