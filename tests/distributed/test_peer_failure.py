"""One rank of two runs out of memory: both end, and one line with settings that would fit is printed."""

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from flare.distributed.watchdog import StepLimits, Watchdog
from flare.errors import is_out_of_memory
from tests.processes import REPO, script_environment, train_in_new_process

# Put first on PYTHONPATH, it is imported by every Python process before anything else. The third step of rank 1 fails.
OUT_OF_MEMORY = """
import importlib.abc, importlib.util, os, sys

class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "flare.train.trainer" or os.environ.get("RANK") != "1":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            step = module.Trainer._step
            def failing(self):
                if self.train_state.step == 2:
                    import torch
                    raise torch.OutOfMemoryError(
                        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 44.5 GiB."
                    )
                return step(self)
            module.Trainer._step = failing
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch())
"""


def test_out_of_memory_on_one_rank_ends_all_with_flags_that_need_less(train_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "inject").mkdir()
    (tmp_path / "inject" / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    result = train_in_new_process(
        *train_flags, "--nproc_per_node", 2, "--save_steps", 1, "--max_seq_length", 128,
        env=script_environment(PYTHONPATH=str(tmp_path / "inject")), timeout=180,
    )  # fmt: skip
    assert result.returncode == 5
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    assert errors[0].startswith(
        "error: rank 1 (cpu (1 threads)) ran out of memory while training (CUDA out of memory. Trie"
    )
    assert "the plan is 0.00 GiB at the peak" in errors[0]
    assert "what fits: --per_device_train_batch_size 1 --gradient_accumulation_steps 2" in errors[0]
    run = tmp_path / "out" / "run"
    stage = json.loads((run / "training_metrics.json").read_text())["stages"]["1"]
    assert stage["status"] == "failed"
    assert stage["error"] == errors[0].removeprefix("error: ")
    assert (run / "checkpoints" / "checkpoint-2" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.distributed.DistBackendError("NCCL error ... Cuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(error: RuntimeError, is_full: bool) -> None:
    assert is_out_of_memory(error) is is_full


def test_a_rank_that_hangs_ends_when_another_reports_a_failure() -> None:
    """Rank 0 hangs where no signal handler runs; without the report it would hang forever."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.distributed.stuck_rank"]
        ranks.append(subprocess.Popen(command, cwd=REPO, env=script_environment() | place))
    try:
        assert ranks[1].wait(timeout=60) == 3
        assert ranks[0].wait(timeout=60) == 5
    finally:
        for process in ranks:
            process.kill()


def test_a_rank_that_waits_for_an_event_of_its_gpu_counts_as_waiting(tmp_path: Path) -> None:
    """On a GPU collectives are queued, so a rank whose peer is gone waits for an event."""
    source = "def synchronize(waits, go_on):\n    waits.set()\n    go_on.wait()\n"
    names: dict = {}
    exec(compile(source, torch.cuda.streams.__file__, "exec"), names)
    waits, go_on = threading.Event(), threading.Event()
    rank = threading.Thread(target=names["synchronize"], args=(waits, go_on))
    rank.start()
    watchdog = Watchdog(0, 1, None, StepLimits(10, 10), tmp_path, print)
    try:
        assert waits.wait(timeout=30)
        watchdog.main_thread = rank.ident
        assert watchdog.activity() == "waits"
        watchdog.main_thread = threading.get_ident()
        assert watchdog.activity() != "waits"
    finally:
        go_on.set()
        rank.join()
        watchdog.file.close()
