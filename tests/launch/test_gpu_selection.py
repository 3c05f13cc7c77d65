"""Both launchers select GPUs with the same code, and report problems of nvidia-smi in one line."""

import shutil
import time
from pathlib import Path

import pytest

from tests.config.test_mistakes import assert_one_line, launch
from tests.fake_nvidia_smi import install
from tests.processes import script_environment, train_in_new_process


def server(tmp_path: Path, mode: str) -> dict[str, str]:
    """Variables of a server whose nvidia-smi behaves as ``mode``, with no limit on its GPUs."""
    fake = install(tmp_path / "bin", mode)
    return {"PATH": fake.environment()["PATH"], "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


PLAN = ("--max_seq_length", 64, "--dry_run")


def test_busy_gpus_are_skipped_and_named_in_the_dry_run(tmp_path: Path, base: Path) -> None:
    flags = ["--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN]
    variables = server(tmp_path, "guide_busy")
    result = launch("1", "auto", "x", *flags, **variables)
    assert result.returncode == 0, result.stderr
    assert "CUDA_VISIBLE_DEVICES=1,2,3,4,6,7 torchrun --standalone --nproc_per_node=6" in result.stdout
    for gpu in ("GPU 0 skipped: NVIDIA A800 80GB PCIe, busy", "GPU 5 skipped: NVIDIA A40, busy"):
        assert gpu in result.stderr
    assert "--allow_busy_gpus takes it" in result.stderr
    taken = launch("1", "auto", "x", *flags, "--allow_busy_gpus", **variables)
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 torchrun" in taken.stdout


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit9", ["nvidia-smi failed (exit code 9)", "couldn't communicate with the NVIDIA driver"]),
        pytest.param("hang", ["nvidia-smi hangs: no answer in 10 s"], marks=pytest.mark.slow),
        ("gbk", ["did not print a list of GPUs"]),
        ("empty", ["printed nothing"]),
        ("rubbish", ["did not print a list of GPUs"]),
    ],
)
def test_nvidia_smi_that_fails_is_one_line_in_time(tmp_path: Path, base: Path, mode: str, words: list[str]) -> None:
    variables = server(tmp_path, mode)
    t0 = time.monotonic()
    result = launch(
        "1", "A800", "x", "--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN, **variables
    )
    assert time.monotonic() - t0 < (14 if mode == "hang" else 12)  # the last is ours, and the shell's own start
    assert_one_line(result, 4, *words)


def test_nvidia_smi_that_is_missing_is_one_line(tmp_path: Path, base: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "date", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = launch("1", "A800", "x", "--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN,
                    PATH=str(tools))  # fmt: skip
    assert_one_line(result, 4, "nvidia-smi not found on PATH", "./run_training.sh STAGE cpu")


def test_gpus_of_unknown_memory_are_selected(tmp_path: Path, base: Path) -> None:
    flags = ["--model_name_or_path", base, "--base_output_dir", tmp_path / "out", *PLAN]
    result = launch("1", "auto", "x", *flags, **server(tmp_path, "not_available"))
    assert result.returncode == 0, result.stderr
    assert "CUDA_VISIBLE_DEVICES=0,1,2 torchrun" in result.stdout


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ("9", ["GPU 9 does not exist", "0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"]),
        ("-1", ['got "-1"']),
        ("0,0", ["GPU 0 listed twice"]),
        ("a", ['got "a"']),
        ("", ["--gpu_ids is empty"]),
    ],
)
@pytest.mark.parametrize("script", ["run_training.sh", "python"])
def test_bad_gpu_numbers_are_one_line(tmp_path: Path, script: str, ids: str, words: list[str]) -> None:
    variables = server(tmp_path, "guide")
    if script == "python":
        environment = script_environment(**variables)
        result = train_in_new_process("--gpu_ids", ids, env=environment)
    else:
        result = launch("1", "manual", "x", ids, **variables)
    assert_one_line(result, 2, *words)
