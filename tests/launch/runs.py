"""Runs and dry runs on GPUs that this machine need not have."""

import subprocess
from pathlib import Path

from flare.config.parse import resolve
from flare.gpus.nvidia_smi import Gpu
from flare.run.resolve import resolve_run
from flare.run.run import Hardware, Run
from tests.config.test_mistakes import assert_one_line, guide_server
from tests.processes import script_environment, train_in_new_process

GPUS = tuple(
    Gpu(index, name, f"GPU-{index:08x}", mib, 4)
    for index, (name, mib) in enumerate([("NVIDIA A800 80GB PCIe", 81920), ("NVIDIA A40", 46068)])
)


AUTO = ("--per_device_train_batch_size", "auto")


def run_of(hardware: Hardware, base: Path, tmp_path: Path, *flags: object) -> Run:
    defaults = ["--model_name_or_path", base, "--base_output_dir", tmp_path / "out", "--max_seq_length", 64]
    return resolve_run(resolve([str(word) for word in [*defaults, *flags]]), hardware)


def gpus(*mib: int) -> Hardware:
    gpus = tuple(Gpu(i, "NVIDIA Test", f"GPU-{i}", size, 4) for i, size in enumerate(mib))
    return Hardware(True, len(mib), gpus)


def empty_config(tmp_path: Path) -> Path:
    path = tmp_path / "empty.json"
    path.write_text("{}")
    return path


def dry_run(tmp_path: Path, *flags: object) -> subprocess.CompletedProcess:
    """The Python script's plan on the guide's server, without its network."""
    environment = script_environment(
        FLARE_OUTPUT_DIR=str(tmp_path / "out"), HF_HOME=str(tmp_path / "hf"), **guide_server(tmp_path)
    )
    return train_in_new_process(*flags, "--dry_run", env=environment)


def assert_one_line_after_gpus(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """As assert_one_line; lines that only describe the chosen GPUs may stand before it."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("GPU ")]
    assert_one_line(subprocess.CompletedProcess([], result.returncode, "", "\n".join(lines)), code, *words)
