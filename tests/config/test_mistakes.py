"""Mistakes of the user end in one line and exit code 2, and change nothing. The commands of the guide plan."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from flare.errors import run_script as run_here
from flare.evaluation.options import DEFAULT_DATASETS, resolve_settings
from tests.fake_nvidia_smi import install
from tests.processes import REPO, run_script, script_environment, train_in_new_process


def assert_one_line(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert result.returncode == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--stage", "3"], ["--stage must be one of 1, 2; got 3"]),
        (["--learning_rat", "1"], ["unknown argument --learning_rat", "--learning_rate"]),
        (["--no_rope_layers", "40"], ["layer 40 is out of range", "0-3"]),
        (["--no_rope_layers", "none"], ["nothing to train", "--train_layers"]),
        (["--dataset_name", "/nowhere/x.jsonl"], ["/nowhere/x.jsonl", "no such file"]),
        (["--text_column", "body"], ["column 'body' not in", "columns: id, text", "--text_column"]),
        (["--model_name_or_path", "./nowhere"], ["'./nowhere'", "is not a directory"]),
        (["--max_seq_length", "4096"], ["--max_seq_length 4096 is above the model's 512 positions"]),
        (["--global_batch_size", "5"], ["--global_batch_size 5 is not divisible", "nearest: 4, 6"]),
        (["--base_output_dir", "/proc/flare"], ["--base_output_dir"]),
        (["--resume", "/nowhere"], ["--resume /nowhere is not a complete checkpoint"]),
    ],
)
def test_mistake_is_one_line_and_changes_nothing(
    train_flags: list[str], tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    result = train_in_new_process(*train_flags, *changes)
    if changes[0] == "--resume":  # found after the directory was locked, when data and settings were fine
        assert result.returncode == 2
        assert words[0] in result.stderr
        return
    assert_one_line(result, 2, *words)
    assert not (tmp_path / "out").exists()


def test_mistake_is_printed_once_by_two_processes(train_flags: list[str]) -> None:
    result = train_in_new_process(*train_flags, "--no_rope_layers", "none", "--nproc_per_node", 2)
    assert_one_line(result, 2, "nothing to train")


def test_unknown_key_in_the_config_names_the_nearest(train_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"learning_rat": 1e-5}')
    result = train_in_new_process(*train_flags, "--config", tmp_path / "run.json")
    assert_one_line(result, 2, 'unknown key "learning_rat" in run.json', "did you mean 'learning_rate'?")


def test_output_directory_below_a_file_is_refused(train_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = train_in_new_process(*train_flags, "--base_output_dir", tmp_path / "file" / "x")
    assert_one_line(result, 2, "--base_output_dir", "is a file")


@pytest.mark.parametrize("place", ["file", "broken link"])
def test_experiment_directory_that_is_a_file_is_refused(train_flags: list[str], tmp_path: Path, place: str) -> None:
    root = tmp_path / "out" / "run"
    root.parent.mkdir()
    root.touch() if place == "file" else root.symlink_to(tmp_path / "nowhere")
    assert_one_line(train_in_new_process(*train_flags), 2, f"{root} is a {place}", "choose another --experiment_name")


def test_dry_run_warns_of_missing_data(train_flags: list[str]) -> None:
    result = train_in_new_process(*train_flags, "--dataset_name", "embedded,/nowhere/x.jsonl", "--dry_run")
    assert result.returncode == 0
    assert "warning: --dataset_name /nowhere/x.jsonl is not on this machine; a run needs it\n" in result.stderr
    assert "embedded is not" not in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output_directory_is_refused(train_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_one_line(train_in_new_process(*train_flags, "--base_output_dir", tmp_path / "locked"), 2, "cannot write to")


def test_too_little_data_is_a_data_error_before_the_model_is_loaded(train_flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    result = train_in_new_process(*train_flags, "--dataset_name", tmp_path / "two.jsonl")
    assert result.returncode == 3
    assert "training tokens, one step needs 65" in result.stderr


def test_traceback_only_on_request(train_flags: list[str]) -> None:
    environment = script_environment(FLARE_DEBUG="1")
    result = train_in_new_process(*train_flags, "--no_rope_layers", "40", env=environment)
    assert "Traceback" in result.stderr
    assert result.returncode == 2


# -- run_training.sh ----------------------------------------------------------------------------------------------


def launch(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    variables = script_environment(PYTHON=sys.executable, **environment)
    return subprocess.run(
        ["bash", str(REPO / "run_training.sh"), *map(str, arguments)],
        capture_output=True, text=True, env=variables, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["3", "A800"], "unknown stage '3'"),
        (["1"], "no GPU given"),
        (["1", "manual", "x"], "needs the GPU numbers"),
        (["1", "A800", "x", "0,1"], "'0,1' is not a flag; GPU numbers are for GPU \"manual\" only"),
        (["demo", "--dry_run"], "unrecognized arguments: --dry_run"),
    ],
)
def test_launcher_reports_wrong_arguments(arguments: list[str], words: str) -> None:
    assert_one_line(launch(*arguments), 2, words)


def test_launcher_reports_missing_packages_of_the_users_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho torch matplotlib\n")
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", str(REPO / "run_training.sh"), "1", "cpu"],
        capture_output=True, text=True, env=script_environment(PYTHON=str(python)),
    )  # fmt: skip
    assert_one_line(result, 4, "lacks: torch matplotlib")


def test_launcher_reports_old_packages_of_the_users_python(tmp_path: Path) -> None:
    for name, version in (("transformers", "4.57.6"), ("torch", "2.11.0a0+nv26.1"), ("datasets", "10.0")):
        info = tmp_path / "packages" / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    result = launch("1", "cpu", PYTHONPATH=str(tmp_path / "packages"))
    assert_one_line(result, 4, "lacks: transformers>=5.17 (has 4.57.6); install them")


def test_demo_runs_in_the_users_directory(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *flare.demo*) pwd;; *) exec {sys.executable} "$@";; esac\n')
    python.chmod(0o755)
    result = subprocess.run(
        ["bash", str(REPO / "run_training.sh"), "demo", "--output_dir", "here"],
        cwd=tmp_path, capture_output=True, text=True, env=script_environment(PYTHON="./python"),
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}\n"), result.stderr


@pytest.mark.parametrize(
    ("cuda", "words"),
    [
        ("13.0", ""),
        ("13.0 7.0", "https://download.pytorch.org/whl/cu126"),  # a V100 and an H100
        ("12.8", "https://download.pytorch.org/whl/cu128 https://download.pytorch.org/whl/cu126"),
        ("12.2", "https://download.pytorch.org/whl/cu126"),
        ("11.4", "error: the driver supports only CUDA 11.4; torch needs CUDA 12 (driver 525 or newer)"),
    ],
)
def test_setup_installs_a_torch_that_fits_the_driver(tmp_path: Path, cuda: str, words: str) -> None:
    smi = tmp_path / "nvidia-smi"
    version, _, capability = cuda.partition(" ")
    smi.write_text(
        f"""#!/bin/sh
case $* in
  *compute_cap*) printf '9.0\\n{capability or "8.0"}\\n' ;;
  *) echo '| NVIDIA-SMI 535.183   Driver Version: 535.183   CUDA Version: {version}     |' ;;
esac
"""
    )
    smi.chmod(0o755)
    result = subprocess.run(
        ["bash", "-c", f". {shlex.quote(str(REPO))}/env.sh && flare_torch_indexes"],
        capture_output=True, text=True, env=script_environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
    )  # fmt: skip
    assert " ".join((result.stdout + result.stderr).split()) == words
    assert result.returncode == (4 if "error" in words else 0)


def guide_server(tmp_path: Path) -> dict[str, str]:
    fake = install(tmp_path / "bin", "guide")
    environment = fake.environment()
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    return {"PATH": environment["PATH"], "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}


@pytest.mark.parametrize(
    ("gpu", "ids", "gpus"),
    [
        ("A800", [], "0,1,2,3"),
        ("A40", [], "4,5,6,7"),
        ("manual", ["0,1,4,5"], "0,1,4,5"),
        ("auto", [], "0,1,2,3,4,5,6,7"),
    ],
)
def test_dry_run_on_the_guides_server_names_the_gpus(
    tmp_path: Path, base: Path, corpus: Path, gpu: str, ids: list[str], gpus: str
) -> None:
    result = launch(
        "1", gpu, "my experiment", *ids, "--model_name_or_path", base, "--dataset_name", corpus, "--dry_run",
        "--max_seq_length", 64, "--base_output_dir", tmp_path / "out", **guide_server(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"CUDA_VISIBLE_DEVICES={gpus} torchrun --standalone --nproc_per_node={gpus.count(',') + 1}" in result.stdout
    assert "--experiment_name 'my experiment'" in result.stdout
    assert not (tmp_path / "out").exists()


# -- the guide ----------------------------------------------------------------------------------------------------

GUIDE_COMMANDS = """
./run_training.sh 1 A800 my_experiment_stage1
./run_training.sh 2 A800 my_experiment_stage2
python train_qwen_multi_gpu.py --stage 1 --gpu_type A800 --experiment_name my_experiment --learning_rate 1e-4 \
--per_device_train_batch_size 3 --max_steps 1000
python train_qwen_multi_gpu.py --stage 2 --gpu_type A800 --experiment_name my_experiment --learning_rate 3e-5 \
--per_device_train_batch_size 2 --max_steps 2000 --gradient_checkpointing
./run_training.sh 1 manual my_experiment "0,1,2,3"
python train_qwen_multi_gpu.py --gpu_ids 0 1 2 3
python train_qwen_multi_gpu.py --gpu_ids 0
python train_qwen_multi_gpu.py --gpu_ids 0 1 4 5
python train_qwen_multi_gpu.py --gpu_type A800
./run_training.sh 1 A800 my_experiment
python train_qwen_multi_gpu.py --gpu_type A40
./run_training.sh 1 A40 my_experiment
python train_qwen_multi_gpu.py --gpu_type auto
./run_training.sh 1 auto my_experiment
python train_qwen_multi_gpu.py --dataset_name "togethercomputer/RedPajama-Data-1T-Sample" --text_column "text" \
--max_seq_length 4096
python train_qwen_multi_gpu.py --dataset_size 100000 --validation_split_percentage 0.1
python train_qwen_multi_gpu.py --rope_theta 1000000.0 --no_rope_layers 20 21 22 23 24 25 26 27 28 29 30 31 32
python train_qwen_multi_gpu.py --model_name_or_path "Qwen/Qwen2.5-7B"
python train_qwen_multi_gpu.py --per_device_train_batch_size 1 --gradient_accumulation_steps 32 \
--gradient_checkpointing --cache_dir /path/to/cache --ddp_timeout 1800
python train_qwen_multi_gpu.py --stage 1 --max_steps 10 --dataset_size 1000
./run_training.sh 1 A800 migration_test
""".strip().splitlines()


@pytest.mark.parametrize("command", GUIDE_COMMANDS)
def test_every_command_of_the_guide_parses_and_plans(command: str, tmp_path: Path) -> None:
    """With the GPUs of the guide and without a network; nothing after the plan runs."""
    import sys

    line = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    line = re.sub(r"^\./run_training.sh", f"bash {shlex.quote(str(REPO))}/run_training.sh", line)
    environment = script_environment(
        PYTHON=sys.executable, FLARE_OUTPUT_DIR=str(tmp_path), HF_HOME=str(tmp_path / "hf"), **guide_server(tmp_path)
    )
    result = subprocess.run(
        ["bash", "-c", f"{line} --dry_run"], cwd=REPO, capture_output=True, text=True, env=environment, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "torchrun" in result.stdout


def test_evaluation_commands_of_the_guide_parse() -> None:
    settings = resolve_settings(
        "--model_path /m --output_dir /o --max_length 2048 --batch_size 1 --max_samples_per_dataset 1000".split()
    )
    assert (settings.max_length, settings.batch_size, settings.max_samples_per_dataset) == (2048, 1, 1000)
    settings = resolve_settings("--model_path /m --use_default_datasets --output_dir /o".split())
    assert settings.datasets == DEFAULT_DATASETS


def test_evaluation_help_and_missing_model() -> None:
    assert run_script("evaluate_model_enhanced.py", "--help").returncode == 0
    assert_one_line(run_script("evaluate_model_enhanced.py", "--model_path", "./nowhere"), 2, "./nowhere")


def test_ctrl_c_during_an_import_prints_no_traceback(capsys: pytest.CaptureFixture) -> None:
    """transformers' lazy imports turn a KeyboardInterrupt into a ModuleNotFoundError."""

    def interrupted() -> int:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module") from error

    assert run_here(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ImportError):
        run_here(lambda: __import__("no_such_module"))
