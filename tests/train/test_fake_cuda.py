"""Training steps on fake CUDA tensors in bf16 and fp16: what can be tested of the GPU code on a machine without a GPU.

Shown: devices, dtypes and shapes of every operation's arguments fit, the host reads no number from the device between
log lines, and the memory of the tensors that are made is the plan's. Not shown: what kernels do, and anything of
torch's CUDA runtime (streams, NCCL, pinned memory, the allocator).
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import REPO, script_environment

TORCH = Path(torch.__file__).parent
SOURCE = Path(__file__).with_name("fake_cuda.cpp")

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a real CUDA part"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Results of a process with a fake GPU; see tests/train/fake_cuda.py."""
    place = tmp_path_factory.mktemp("fake_cuda")
    library, out = place / "fake_cuda.so", place / "found.json"
    compile_it = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}", str(SOURCE)]
    compile_it += [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
    compiled = subprocess.run(compile_it, capture_output=True, text=True, timeout=240)
    assert compiled.returncode == 0, compiled.stderr
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.fake_cuda", str(out)]
    environment = script_environment(LD_PRELOAD=str(library))
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())


def test_steps_mix_no_devices_and_never_wait_for_the_gpu(found: dict) -> None:
    """Two families, both stages, packed rows by the varlen kernel and by SDPA, with and without checkpointing: two
    steps of two micro-batches, clipping, the update and its flag, and a scoring pass."""
    assert found["torch"] == ["cuda", False]  # torch itself still reports no GPU
    assert len(found["cases"]) == 10
    assert set(found["cases"].values()) == {"fine"}, found["cases"]


def test_a_tensor_on_the_host_and_a_number_read_in_mid_step_are_caught(found: dict) -> None:
    assert re.search("two (different )?devices,? cuda:0", found["planted"]["labels on the host"])
    assert "_local_scalar_dense" in found["planted"]["a number in mid-step"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_the_loss_on_a_gpu_takes_the_memory_of_the_plan(found: dict, head_trains: bool, precision: str) -> None:
    """Four chunks with Qwen's vocabulary. Once, 2 bytes per logit were left from the chunk before."""
    made, planned = found["loss"][f"{precision}, head trains: {head_trains}"]
    assert made == pytest.approx(planned, rel=0.001)


def test_a_step_on_a_gpu_takes_the_memory_of_the_plan(found: dict) -> None:
    """Widths of real models, six layers, rows of 4096, the varlen kernel, two micro-batches: within 1 %."""
    assert len(found["step"]) == 3
    for case, (made, planned) in found["step"].items():
        assert made == pytest.approx(planned, rel=0.01), case
