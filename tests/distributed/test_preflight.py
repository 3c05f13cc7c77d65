"""The preflight check finds a connection that does not work, and ranks with different settings."""

import os
import subprocess
import sys
import time

import pytest
import torch

from flare.errors import EnvError
from tests.config.test_mistakes import assert_one_line
from tests.processes import REPO, script_environment

RANK_SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
from flare.distributed import process_group
from flare.errors import run_script
if os.environ["RANK"] == os.environ.get("ABSENT"):
    dist.all_reduce = lambda *a, **k: time.sleep(60)
if os.environ["RANK"] == os.environ.get("WRONG"):
    true = dist.all_reduce
    dist.all_reduce = lambda values, **k: true(values.mul_(2), **k)
def main():
    world = process_group.start(False, 60, (), float(sys.argv[1]))
    assert process_group.all_reduce_sum(torch.tensor([world.rank + 1.0])).tolist() == [3.0]
    process_group.check_same_settings(world, {"--seed": int(os.environ.get("SEED", 0)) * world.rank})
    process_group.stop()
    return 0
sys.exit(run_script(main))
"""


def two_ranks(limit_sec: float, **environment: str) -> list[subprocess.CompletedProcess]:
    """Run the start of a run in two real gloo processes. Returns how each ended, by rank."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **environment}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(limit_sec)], cwd=REPO, text=True, stderr=subprocess.PIPE,
            env=script_environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables),
        )
        for rank in range(2)
    ]  # fmt: skip
    ended = [(rank.communicate(timeout=60)[1], rank.returncode) for rank in ranks]
    return [subprocess.CompletedProcess([], code, "", text) for text, code in ended]


def test_ranks_that_reach_each_other_start() -> None:
    assert [rank.returncode for rank in two_ranks(20)] == [0, 0]


def test_rank_that_never_joins_is_named_within_the_timeout() -> None:
    t0 = time.monotonic()
    first = two_ranks(3, ABSENT="1")[0]
    assert time.monotonic() - t0 < 30
    assert first.returncode == 4
    error = next(line for line in first.stderr.splitlines() if line.startswith("error: "))
    assert "the first all-reduce of 2 processes" in error
    assert f"look at rank 1 ({os.uname().nodename}), which did not join" in error
    assert "Traceback" not in first.stderr


def test_damaged_sum_is_an_error() -> None:
    for rank in two_ranks(20, WRONG="1"):
        assert rank.returncode == 4
        assert "the sum is {5.0} instead of 3: data is damaged in transit" in rank.stderr


def test_nccl_failure_names_the_usual_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from flare.distributed import preflight

    monkeypatch.setattr(preflight.atexit, "register", lambda *_: None)
    monkeypatch.setattr(preflight, "all_reduce_and_check", lambda *_: time.sleep(5))
    with pytest.raises(EnvError) as error:
        preflight.run_preflight_check(torch.distributed.HashStore(), 0, 2, torch.device("cuda", 0), 0.2)
    assert "did not end within 0.2 s" in str(error.value)
    assert "NCCL_P2P_DISABLE=1" in str(error.value)


def test_ranks_with_different_settings_are_refused_with_both_values() -> None:
    for rank in two_ranks(20, SEED="7"):
        assert_one_line(rank, 2, "ranks differ in --seed: 0 on rank 0", "7 on rank 1")
