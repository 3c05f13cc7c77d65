"""Two hosts, made of network namespaces: each has its own network and only a cable to the other."""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import REPO, script_environment
from tests.train.test_runs import metrics


@dataclass(frozen=True)
class Host:
    """A network namespace with one address, and nothing else that leads out of it."""

    namespace: str
    address: str

    def start(self, command: list[str], **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *command],
            env=script_environment(**environment), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two namespaces and a veth pair between them, removed at the end."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip (iproute2)")
    tag = uuid.uuid4().hex[:6]
    made = [Host(f"flare-{tag}-{n}", f"10.213.77.{n + 1}") for n in range(2)]
    try:
        try:
            for host in made:
                ip("netns", "add", host.namespace)
            ip(
                "link", "add", "cable0", "netns", made[0].namespace, "type", "veth",
                "peer", "name", "cable1", "netns", made[1].namespace,
            )  # fmt: skip
            for number, host in enumerate(made):
                ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", f"cable{number}")
                for device in ("lo", f"cable{number}"):
                    ip("-n", host.namespace, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
        yield made
    finally:
        for host in made:
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True, timeout=20)


def start_all(hosts: list[Host], flags: list[str], **changes: str) -> list[subprocess.Popen]:
    """The same command on each host, as the user would type it."""
    command = [sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *flags]
    variables = {"NNODES": str(len(hosts)), "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29517", **changes}
    return [host.start(command, NODE_RANK=str(rank), **variables) for rank, host in enumerate(hosts)]


def end_all(processes: list[subprocess.Popen], timeout_sec: float = 240) -> list[str]:
    """What each said on stderr, when all have ended."""
    try:
        return [process.communicate(timeout=timeout_sec)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_hosts_train_one_experiment(hosts: list[Host], train_flags: list[str], tmp_path: Path) -> None:
    processes = start_all(hosts, [*train_flags, "--max_steps", "2", "--experiment_name", "two hosts"])
    errors = end_all(processes)
    assert [p.returncode for p in processes] == [0, 0], "\n".join(errors)
    run = tmp_path / "out" / "two hosts"
    assert [path.name for path in run.parent.iterdir()] == ["two hosts"]
    block = metrics(run)["stages"]["1"]
    assert (block["status"], block["totals"]["steps"]) == ("finished", 2)
    assert (run / "final_model" / "model.safetensors").is_file()
    assert (run / "train_command.txt").read_text().count("\ncd ") == 1  # rank 0 alone writes
    assert (run / "training.log").read_text().count("finished stage 1") == 1
    assert "2 processes = 4 rows" in (run / "training.log").read_text()


@pytest.mark.slow
def test_nodes_with_different_commands_are_refused(hosts: list[Host], train_flags: list[str], tmp_path: Path) -> None:
    first, second = ([*train_flags, "--seed", seed] for seed in ("1", "2"))
    variables = {"NNODES": "2", "MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29517"}
    script = [sys.executable, str(REPO / "train_qwen_multi_gpu.py")]
    processes = [
        hosts[0].start([*script, *first], NODE_RANK="0", **variables),
        hosts[1].start([*script, *second], NODE_RANK="1", **variables),
    ]
    for process, text in zip(processes, end_all(processes), strict=True):
        assert process.returncode == 2, text
        assert "error: ranks differ in seed: 1 on rank 0" in text
    assert not (tmp_path / "out" / "run").exists()
