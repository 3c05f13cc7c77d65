"""Workers get the GPUs and the resolved options of the launcher; a dry run starts nothing."""

import dataclasses
import inspect
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flare.config.parse import resolve
from flare.distributed import process_group
from flare.errors import ConfigError
from flare.launch.agent import SHUTDOWN_TIMEOUT_SEC, shutdown_timeout_arguments
from flare.launch.launch import shell_command
from flare.launch.worker_environment import (
    DEVICE_VARIABLE,
    GPUS_VARIABLE,
    export_environment,
    options_from_launcher,
    worker_hardware,
)
from flare.logs import start_logging
from flare.nope.patch import patch_checkpoint
from flare.run.resolve import resolve_run
from flare.run.run import Hardware
from flare.train.session import Session
from tests.launch.runs import GPUS, run_of
from tests.processes import script_environment, train_in_new_process


def test_workers_get_the_gpus_and_the_resolved_auto_values(
    clean_environment: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    flags = ["--per_device_train_batch_size", "auto", "--gradient_accumulation_steps", 4]
    run = run_of(Hardware(True, 2, GPUS), base, tmp_path, *flags)
    export_environment(run, None)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    os.environ["WORLD_SIZE"] = "2"
    typed = resolve([str(flag) for flag in flags])
    worker = options_from_launcher(typed)
    assert worker_hardware(worker.options) == run.hardware
    assert (worker.options.per_device_train_batch_size, worker.options.global_batch_size) == (12, 24)
    assert worker.options.gradient_checkpointing is False
    assert worker.sources["per_device_train_batch_size"] == "command line, resolved"
    assert typed.options.per_device_train_batch_size == "auto"


def test_the_theta_of_a_nope_model_is_kept(base: Path, tmp_path: Path) -> None:
    patch_checkpoint(base, tmp_path / "patched", [1], rope_theta=4321.0)
    one, file = Hardware(False, 1), tmp_path / "c.json"
    run = run_of(one, tmp_path / "patched", tmp_path, "--rope_theta", 4321)
    assert resolve_run(run.resolved, one).identity()["rope_theta"] == 4321  # resolved twice, as every start is
    file.write_text('{"rope_theta": 5000}')
    run = run_of(one, tmp_path / "patched", tmp_path, "--config", file)
    assert (run.options.rope_theta, run.resolved.sources["rope_theta"]) == (4321, "c.json, resolved")
    with pytest.raises(ConfigError, match=r"--rope_theta 5000 contradicts .*patched, whose rope_theta is 4321"):
        run_of(one, tmp_path / "patched", tmp_path, "--rope_theta", 5000)


def test_the_log_of_a_start_names_the_gpus_and_the_plan(
    clean_environment: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    run = run_of(Hardware(True, 2, GPUS), base, tmp_path)
    rows = SimpleNamespace(describe=lambda: "rows")
    corpus = SimpleNamespace(meta={"end_of_text": "<end>", "end_of_text_id": 0}, fingerprint="f", facts={})
    start_logging(0, 2, tmp_path / "training.log")
    Session(run, process_group.World(0, 0, 2, torch.device("cpu")), corpus, rows, rows)._log_start()
    start_logging()
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert lines[0].endswith("GPU 0: NVIDIA A800 80GB PCIe, memory 80.0 GiB, free 80.0 GiB, GPU-00000000")
    assert lines[1].endswith("GPU 1: NVIDIA A40, memory 45.0 GiB, free 45.0 GiB, GPU-00000001")
    assert any("memory/GPU" in line for line in lines)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_dry_run_under_torchrun_starts_nothing(train_flags: list[str], tmp_path: Path, rank: int) -> None:
    environment = script_environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29501")
    flags = [*train_flags, "--stage1_max_seq_len", 32, "--dry_run"]
    result = train_in_new_process(*flags, env=environment, timeout=60)
    assert result.returncode == 0, result.stderr
    assert ("2 processes" in result.stdout) == (rank == 0)
    assert ("warning: --stage1_max_seq_len is an old name" in result.stderr) == (rank == 0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [["--dry_run"], ["--dry_run", "true"], ["--dry_run=true"]])
def test_the_command_of_a_dry_run_trains(base: Path, tmp_path: Path, words: list[str]) -> None:
    run = run_of(Hardware(False, 1), base, tmp_path, *words, "--experiment_name", "true")
    command = shlex.split(shell_command(Path("train.py"), run, None))
    assert "--dry_run" not in " ".join(command)
    assert command[-2:] == ["--experiment_name", "true"]
    assert resolve(command[command.index("train.py") + 1 :]).options.dry_run is False


def test_a_worker_of_a_cpu_run_sees_no_gpu(clean_environment: pytest.MonkeyPatch) -> None:
    os.environ |= {DEVICE_VARIABLE: "cpu", GPUS_VARIABLE: "[]", "WORLD_SIZE": "3"}
    assert worker_hardware(resolve([]).options) == Hardware(False, 3)


def test_workers_have_time_for_their_last_checkpoint_on_a_torch_without_shutdown_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.11: LaunchConfig has no shutdown_timeout, and the agent closes its workers with the method's default."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    @dataclasses.dataclass
    class OldLaunchConfig:
        nproc_per_node: int

    monkeypatch.setattr(PContext.close, "__defaults__", (None, 30))
    expected = {} if "shutdown_timeout" not in LaunchConfig.__dataclass_fields__ else {"shutdown_timeout": 600}
    assert shutdown_timeout_arguments(LaunchConfig) == expected
    assert shutdown_timeout_arguments(OldLaunchConfig) == {}
    assert inspect.signature(PContext.close).parameters["timeout"].default == SHUTDOWN_TIMEOUT_SEC
