"""Plan or run the commands of the documents, as far as that works without a GPU, a network and hours."""

import re
import shutil
from pathlib import Path

import pytest

import patch_qwen_rope
import train_qwen_multi_gpu
from flare import demo
from flare.checkpoint import __main__ as checkpoint_command
from flare.errors import CheckpointError, EnvError
from flare.evaluation.options import resolve_settings
from flare.gpus import __main__ as gpus_command
from flare.nope.command_line import parse_command_line
from tests.documents import FINISHED, Call, Sandbox
from tests.processes import REPO

OTHER_PROGRAMS = {"tensorboard", "hf", "pre-commit", "tail", "sbatch", "scancel", "-m pip", "-m ruff"}
"""Programs of others that the documents call. They are not run."""


class Planner:
    """Runs the programs that a command called, as dry runs where possible."""

    def __init__(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.sandbox, self.monkeypatch, self.capsys = sandbox, monkeypatch, capsys
        plenty = shutil.disk_usage("/")._replace(free=10 * 2**40)
        monkeypatch.setattr("flare.run.run.shutil.disk_usage", lambda _path: plenty)
        monkeypatch.setattr("flare.run.run.read_available_ram", lambda: 512 * 2**30)

        def no_hub(name: str, _cache_dir: str | None = None) -> dict:
            raise EnvError(f"no hub for {name}")

        monkeypatch.setattr("flare.run.resolve.read_hub_config", no_hub)

    def try_command(self, command: str, server: str = "guide", **environment: str) -> list[str]:
        """Plan or run the programs that the command calls; returns the output of each."""
        return [self.try_call(call, server) for call in self.sandbox.run(command, server, **environment)]

    def try_call(self, call: Call, server: str) -> str:
        if call.script in OTHER_PROGRAMS:
            return ""
        with self.monkeypatch.context() as patch:
            environment = self.sandbox.environment(server)
            for name in ("PATH", "HF_HOME"):
                patch.setenv(name, environment[name])
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            for name, value in call.environment.items():
                patch.setenv(name, value)
            patch.chdir(self.sandbox.clone)
            if call.arguments[-1:] == ["--help"]:
                with pytest.raises(SystemExit, match="0"):
                    TRIALS[call.script](call.arguments)
            else:
                TRIALS[call.script](call.arguments)
        return " ".join(self.capsys.readouterr().out.split())  # a plan is as wide as the terminal


def plan_training(arguments: list[str]) -> None:
    assert train_qwen_multi_gpu.main([a for a in arguments if a != "--prepare_only"] + ["--dry_run"]) == 0


def check_evaluation(arguments: list[str]) -> None:
    resolve_settings(when_trained(arguments))


def when_trained(arguments: list[str]) -> list[str]:
    """The arguments with my_experiment replaced by an experiment that has results."""
    return [re.sub(r"runs/(?=my_experiment/)", f"{FINISHED}/", word) for word in arguments]


def run_patch(arguments: list[str]) -> None:
    """Patch, inspect and verify really run. The other modes need a new process or a server: flags only."""
    words = ["my_qwen" if word == "Qwen/Qwen2.5-3B" else word for word in when_trained(arguments)]
    mode, options = parse_command_line(words)
    if mode == "patch" and (target := Path(str(options.output_dir))).exists():
        shutil.rmtree(target)
    if mode in ("patch", "inspect", "verify"):
        assert patch_qwen_rope.main(words) == 0


def list_checkpoints(arguments: list[str]) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint-N"):  # the sandbox has none
        checkpoint_command.main(arguments)


def check_pytest(arguments: list[str]) -> None:
    """``run_tests.sh`` passes its flags on, and the files named exist."""
    words = arguments[: arguments.index("-k")] if "-k" in arguments else arguments
    assert words[:4] == ["-n", "2", "--dist", "worksteal"]
    for word in words[4:]:
        assert word in ("--slow", "--faults", "--deselect") or (REPO / word.partition("::")[0]).exists()


def check_pages(arguments: list[str]) -> None:
    assert arguments == []


TRIALS = {
    "train_qwen_multi_gpu.py": plan_training,
    "evaluate_model_enhanced.py": check_evaluation,
    "patch_qwen_rope.py": run_patch,
    "-m flare.demo": demo.parse,
    "-m flare.gpus": gpus_command.main,
    "-m flare.checkpoint": list_checkpoints,
    "-m pytest": check_pytest,
    "-m docs.generate": check_pages,
}
