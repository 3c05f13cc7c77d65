"""``python -m flare.gpus``: the table, the selection, errors and exit codes."""

import subprocess
import sys

import pytest

from flare.gpus.__main__ import format_table
from flare.gpus.nvidia_smi import query_gpus
from tests.fake_nvidia_smi import install
from tests.gpus.selections import GUIDE_GPUS
from tests.processes import REPO


def run_cli(env: dict[str, str], *arguments: str, timeout_sec: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flare.gpus", *arguments]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=timeout_sec)


def test_table_is_aligned_and_shows_the_state_of_every_gpu(server):
    server("guide_busy")
    gpus = query_gpus()
    lines = format_table(gpus, gpus[1:2], gpus[6:]).splitlines()
    assert len(lines) == 9
    states = [line.rsplit("GiB", 1)[1].strip() for line in lines[1:]]
    assert states == ["busy", "chosen", "free", "free", "free", "busy", "hidden", "hidden"]
    assert len({line.index("GiB") for line in lines[1:]}) == 1
    assert "20.2 GiB" in lines[1]  # (81920 - 61234) / 1024


def test_command_prints_the_table_and_the_selection(tmp_path):
    done = run_cli(install(tmp_path, "guide_busy").environment(), "--gpu_type", "A40")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:9]] == [
        "busy",
        *["free"] * 3,
        "chosen",
        "busy",
        "chosen",
        "chosen",
    ]
    assert lines[-1] == "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=4,6,7"
    assert any(line.startswith("GPU 5 skipped") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        (["--gpu_ids", "0", "1", "4", "5"], "0,1,4,5"),
        (["--gpu_ids", "0,1,4,5"], "0,1,4,5"),
        (["--gpu_ids", "0-2"], "0,1,2"),
        (["--gpu_type", "auto"], "0,1,2,3,4,5,6,7"),
        ([], "0,1,2,3,4,5,6,7"),
    ],
)
def test_command_selects_as_in_the_guide(tmp_path, arguments, visible):
    done = run_cli(install(tmp_path).environment(), *arguments)
    assert done.stdout.splitlines()[-1].endswith(f"CUDA_VISIBLE_DEVICES={visible}")


@pytest.mark.parametrize(
    "arguments",
    [
        *[["--gpu_ids", ids] for ids in ("9", "-1", "0,0", "a", "", "3-0")],
        ["--gpu_type", "A4000"],
    ],
)
def test_wrong_request_is_one_line_with_the_gpus_and_exit_2(tmp_path, arguments):
    done = run_cli(install(tmp_path).environment(), *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert GUIDE_GPUS in line
    assert (arguments[1] or "empty") in line


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--gpu_ids", "0", "--gpu_type", "A40"], ["--gpu_type"]])
def test_wrong_command_line_is_one_line_and_exit_2(tmp_path, arguments):
    done = run_cli(install(tmp_path).environment(), *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("mode", ["rubbish", "empty", "gbk", "exit9"])
def test_bad_nvidia_smi_is_one_line_and_exit_4(tmp_path, mode):
    done = run_cli(install(tmp_path, mode).environment())
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: nvidia-smi")


def test_missing_nvidia_smi_is_exit_4(tmp_path):
    done = run_cli(install(tmp_path / "bin").environment(PATH=str(tmp_path)))
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)


def test_wrong_ids_are_reported_even_without_nvidia_smi(tmp_path):
    done = run_cli(install(tmp_path / "bin").environment(PATH=str(tmp_path)), "--gpu_ids", "a")
    assert done.returncode == 2
    assert 'got "a"' in done.stderr


def test_odd_gpu_name_prints_under_an_ascii_locale(tmp_path):
    done = run_cli(install(tmp_path, "gbk_name").environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")


def test_preset_is_the_commands_limit_and_the_rest_is_hidden(tmp_path):
    done = run_cli(install(tmp_path).environment(CUDA_VISIBLE_DEVICES="2,3"))
    assert done.stdout.splitlines()[-1].endswith("CUDA_VISIBLE_DEVICES=2,3")
    assert sum(line.endswith("hidden") for line in done.stdout.splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--gpu_ids", "a"]])
def test_hanging_nvidia_smi_ends_the_command_in_under_12_seconds(tmp_path, arguments):
    done = run_cli(install(tmp_path, "hang").environment(), *arguments, timeout_sec=12)
    assert (done.returncode, len(done.stderr.splitlines())) == ((2, 1) if arguments else (4, 1))


def test_import_needs_the_standard_library_only(tmp_path):
    code = "import sys, flare.gpus.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60)
    ours = {"flare", "__main__", "_distutils_hack", "sitecustomize", "usercustomize"}
    foreign = set(done.stdout.split()) - set(sys.stdlib_module_names) - ours
    assert done.returncode == 0
    assert "torch" not in foreign and not {name for name in foreign if not name.startswith("_")}
