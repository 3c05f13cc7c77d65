"""GPUs older than Ampere have no bf16: they get fp16, and bf16 is refused."""

from pathlib import Path

import pytest

from flare.config.parse import resolve
from flare.errors import ConfigError
from flare.evaluation.launch import with_precision
from flare.evaluation.options import EvaluationSettings
from flare.gpus.specs import lacks_bf16
from flare.run.resolve import resolve_run
from flare.run.run import Hardware
from tests.fake_nvidia_smi import install
from tests.processes import run_script, script_environment


def plan_on(server: str, base: Path, tmp_path: Path, *flags: object):
    fake = install(tmp_path / "smi", server)
    environment = script_environment(PATH=fake.environment()["PATH"])
    environment.pop("CUDA_VISIBLE_DEVICES")
    return run_script(
        "train_qwen_multi_gpu.py", "--dry_run", "--model_name_or_path", base, "--base_output_dir", tmp_path / "out",
        "--max_seq_length", 64, *flags, env=environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ("v100", ["fp16, DDP", "fp16 auto: GPU 0 (Tesla V100-SXM2-32GB) is older than Ampere and has no bf16"]),
        ("old_and_new", ["fp16, DDP", "fp16 auto: GPU 1 (Quadro RTX 6000) is older than Ampere"]),
        ("guide", ["bf16, DDP"]),
    ],
)
def test_auto_takes_fp16_where_a_gpu_is_older_than_ampere(
    base: Path, tmp_path: Path, server: str, said: list[str]
) -> None:
    result = plan_on(server, base, tmp_path)
    assert result.returncode == 0, result.stderr
    text = " ".join((result.stdout + result.stderr).split())
    assert all(words in text for words in said), text


def test_bf16_on_old_gpus_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    result = plan_on("v100", base, tmp_path, "--precision", "bf16")
    assert result.returncode == 2
    assert "--precision bf16: GPU 0 (Tesla V100-SXM2-32GB) is older than Ampere and has no bf16" in result.stderr
    assert "use --precision fp16" in result.stderr
    assert "Traceback" not in result.stderr


def test_attention_kernels_that_need_ampere_are_not_used_in_fp16(base: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(base), "--base_output_dir", str(tmp_path), "--max_seq_length", "64"]
    flags += ["--precision", "fp16"]
    assert resolve_run(resolve(flags), Hardware(True, 1)).attention == "sdpa"
    with pytest.raises(ConfigError, match="varlen runs on GPUs in bf16 only"):
        resolve_run(resolve([*flags, "--attn_implementation", "varlen"]), Hardware(True, 1))


@pytest.mark.parametrize(
    ("names", "lack"),
    [
        (
            ("Tesla V100-SXM2-32GB", "Tesla V100S-PCIE-32GB", "GRID V100-8Q", "Tesla P100-PCIE-16GB", "Tesla P40",
             "Tesla T4", "NVIDIA T4", "Tesla K80", "NVIDIA TITAN V", "TITAN RTX", "TITAN X (Pascal)",
             "NVIDIA GeForce RTX 2080 Ti", "GeForce RTX 2070 SUPER", "NVIDIA GeForce RTX 2060", "GeForce GTX 1080 Ti",
             "NVIDIA GeForce GTX 1660 SUPER", "Quadro RTX 8000", "Quadro GV100", "NVIDIA T1000 8GB"), True,
        ),
        (
            ("NVIDIA A100-SXM4-80GB", "NVIDIA A800 80GB PCIe", "NVIDIA A40", "NVIDIA A10", "NVIDIA A2",
             "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 2050", "NVIDIA GeForce RTX 4090", "NVIDIA RTX A4000",
             "NVIDIA RTX 4000 SFF Ada Generation", "NVIDIA L4", "NVIDIA L40S", "NVIDIA H100 80GB HBM3", "NVIDIA H20",
             "NVIDIA H200", "NVIDIA B200", "NVIDIA GH200 480GB", "NVIDIA GB10", "NVIDIA RTX 2000 Ada Generation",
             "NVIDIA RTX PRO 6000 Blackwell Server Edition"), False,
        ),
    ],
)  # fmt: skip
def test_names_show_which_gpus_are_older_than_ampere(names: tuple[str, ...], lack: bool) -> None:
    assert [name for name in names if lacks_bf16(name) != lack] == []


@pytest.mark.parametrize(
    ("requested", "on_gpu", "old", "expected"),
    [("auto", True, True, "fp16"), ("auto", True, False, "bf16"), ("auto", False, False, "fp32"),
     ("bf16", True, True, "bf16")],
)  # fmt: skip
def test_evaluation_on_old_gpus_is_in_fp16(requested: str, on_gpu: bool, old: bool, expected: str) -> None:
    settings = EvaluationSettings("model", ("data",), Path("out"), precision=requested)
    assert with_precision(settings, on_gpu, old).precision == expected
