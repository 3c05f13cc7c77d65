"""Environment variables of a run on several nodes, as far as one node can show it. See also test_nodes.py."""

import os
import subprocess
import sys

import pytest

from flare.errors import ConfigError
from flare.launch.nodes import check_node_variables, rendezvous
from tests.processes import REPO, script_environment


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK and MASTER_ADDR"),
        ({"NNODES": "1:4"}, "NNODES='1:4' in the environment must be a number"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK='2' in the environment must be a number"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT='x'"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, "needs --experiment_name"),
    ],
)
def test_wrong_node_variables_are_named(
    clean_environment: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    os.environ |= variables
    with pytest.raises(ConfigError) as error:
        check_node_variables(name_was_given=False)
    assert words in str(error.value)


def test_torchruns_variables_reach_the_rendezvous(clean_environment: pytest.MonkeyPatch) -> None:
    assert rendezvous()["rdzv_endpoint"] == "localhost:0"
    os.environ |= {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}
    several = rendezvous()
    assert (several["min_nodes"], several["max_nodes"], several["rdzv_backend"]) == (4, 4, "static")
    assert several["rdzv_endpoint"] == "10.0.0.7:1234"
    assert several["rdzv_configs"] == {"rank": 3}


@pytest.mark.slow
def test_host_whose_name_does_not_resolve_trains(train_flags: list[str]) -> None:
    """The name of a container or laptop often does not resolve."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("needs root and unshare --uts")
    flags = [*train_flags, "--max_steps", "1", "--nproc_per_node", "2"]
    command = [sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *flags]
    renamed = 'echo no.such.host.invalid > /proc/sys/kernel/hostname && exec "$@"'
    result = subprocess.run(
        ["unshare", "--uts", "sh", "-c", renamed, "sh", *command],
        capture_output=True, text=True, env=script_environment(), timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "finished stage 1" in result.stderr
