"""Complete runs in real processes: the files they write, and the same numbers on any number of processes."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flare.config.options import Options
from flare.nope.canary.file import read_canary
from tests.processes import REPO, script_environment, torchrun, train


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def assert_same_weights(first: Path, second: Path, relative: float = 0.0) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        if relative:
            torch.testing.assert_close(a[name], b[name], rtol=relative, atol=relative, msg=name)
        else:
            assert torch.equal(a[name], b[name]), name


def metrics(experiment: Path) -> dict:
    return json.loads((experiment / "training_metrics.json").read_text())


def losses(experiment: Path, stage: int = 1) -> list[float]:
    return [r["loss"] for r in metrics(experiment)["stages"][str(stage)]["history"] if "loss" in r]


def test_a_run_leaves_every_file_of_the_guide(train_flags: list[str], tmp_path: Path) -> None:
    result = train(*train_flags)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "run"
    for name in (
        "checkpoints/checkpoint-6/manifest.json", "final_model/config.json", "final_model/model.safetensors",
        "final_model/tokenizer.json", "final_model/modeling_nope.py", "final_model/nope_canary.json",
        "logs/metrics.jsonl", "tensorboard/stage1", "training.log", "training_metrics.json", "train_command.txt",
        "environment_info.txt",
    ):  # fmt: skip
        assert (run / name).exists(), name
    log = (run / "training.log").read_text().lower()
    for words in (["error"], ["gpu", "cuda", "memory"], ["step", "epoch", "loss"]):  # the guide's three greps
        assert any(any(w in line for w in words) for line in log.splitlines())
    assert re.search(r"train: 1\d\d documents, [\d,]+ tokens", log)
    assert re.search(r"held out: \d+ documents, [\d,]+ tokens", log)
    assert re.search(r"documents end with <\|endoftext\|> \(\d+\)", log)
    assert re.search(r"first row: 32 tokens, \d documents or parts of them\n.*tokens 0-\d+: \d+ [a-z]+ ", log)
    block = metrics(run)["stages"]["1"]
    assert (block["status"], block["totals"]["steps"]) == ("finished", 6)
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in lines if "eval_loss" in r] == [0, 3, 6]

    tags = scalar_tags(run / "tensorboard" / "stage1")
    assert {"train/loss", "train/perplexity", "train/learning_rate", "train/grad_norm", "eval/loss"} <= tags
    assert {"eval/perplexity", "speed/tokens_per_sec", "speed/memory_gib"} <= tags

    again = train(*train_flags)
    assert again.returncode == 0
    assert "finished already" in again.stderr


def scalar_tags(directory: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_recorded_command_can_be_pasted_back(train_flags: list[str], tmp_path: Path) -> None:
    name = "two words 中文 'quoted'"
    result = train(*train_flags, "--experiment_name", name, "--max_steps", 1)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / name
    command = next(line for line in (run / "train_command.txt").read_text().splitlines() if line.startswith("cd "))
    pasted = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=script_environment(), timeout=120
    )
    assert pasted.returncode == 0, pasted.stderr
    assert "finished already" in pasted.stderr


def test_a_start_records_its_resolved_config_and_can_be_repeated_by_it(
    train_flags: list[str], base: Path, tmp_path: Path
) -> None:
    place = train_flags.index("--model_name_or_path")
    file = tmp_path / "c.json"
    model = {"model_name_or_path": str(base)}
    file.write_text(json.dumps({"max_eval_samples": 2, "stages": {"1": {"model_args": model}}}))
    first = train(*train_flags[:place], *train_flags[place + 2 :], "--config", file)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "out" / "run"
    [recorded] = (run / "logs").glob("resolved_config-stage1-*.json")
    content = json.loads(recorded.read_text())
    options = {name: value for section in content["options"].values() for name, value in section.items()}
    assert options.keys() == content["sources"].keys() == {f.name for f in fields(Options)}
    for name, value, source in (
        ("max_eval_samples", 2, "c.json"),
        ("model_name_or_path", str(base), "c.json: stages.1"),
        ("max_steps", 6, "command line"),
        ("no_rope_layers", ["1", "3"], "command line"),
        ("learning_rate", 1e-3, "command line"),
        ("weight_decay", 0.0, "default"),
        ("precision", "fp32", "default, resolved"),
        ("train_layers", ["1", "3"], "default, resolved"),
        ("global_batch_size", 2, "default, resolved"),
        ("rope_theta", 10000.0, "default, resolved"),
    ):
        assert (name, options[name], content["sources"][name]) == (name, value, source)
    assert content["run"] == {"init_from": str(base), "processes": 1, "hosts": 1, "gpus_of_this_host": []}

    again = train("--config", f"{recorded}#options", "--experiment_name", "again")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "out" / "again") == losses(run)


@pytest.mark.parametrize(
    ("flags", "relative"),
    [
        (["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"], 2e-5),
        pytest.param(["--per_device_train_batch_size", "2", "--nproc_per_node", "2"], 2e-5, marks=pytest.mark.slow),
        (["--per_device_train_batch_size", "1", "--nproc_per_node", "2", "--global_batch_size", "4"], 2e-5),
    ],
)
def test_layouts_give_the_same_losses_and_weights(
    train_flags: list[str], tmp_path: Path, flags: list[str], relative: float, one_process_run: Path
) -> None:
    result = train(*train_flags, *flags, timeout=300)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "run"
    assert losses(run) == pytest.approx(losses(one_process_run), rel=1e-5)
    # Adam divides by the root of tiny second moments: rounding in the first steps' gradients shows in weights.
    assert_same_weights(run / "final_model", one_process_run / "final_model", relative=1e-3)
    canaries = [read_canary(r / "final_model") for r in (run, one_process_run)]
    assert canaries[0].sequences == canaries[1].sequences
    assert canaries[0].true_model.flat_nll() == pytest.approx(canaries[1].true_model.flat_nll(), rel=1e-3)


@pytest.mark.parametrize(
    ("processes", "micro", "parallel"),
    [
        pytest.param(2, 2, "ddp", marks=pytest.mark.slow),
        pytest.param(2, 1, "ddp", marks=pytest.mark.slow),
        (3, 4, "ddp"),
        pytest.param(2, 2, "fsdp", marks=pytest.mark.slow),
        (2, 1, "fsdp"),
        pytest.param(3, 1, "fsdp", marks=pytest.mark.slow),
    ],
    ids=["2x2", "2x1x2 accumulation", "3 unequal", "fsdp 2x2", "fsdp 2x1x2 accumulation", "fsdp 3 unequal"],
)
def test_ranks_give_the_loss_and_gradients_of_one_process(
    base: Path, corpus: Path, cache_dir: Path, tmp_path: Path, one: dict, processes: int, micro: int, parallel: str
) -> None:
    """fp32, relative 1e-5; three ranks share four rows as 2, 1 and 1 (with FSDP2 two of them run an empty batch)."""
    out = tmp_path / "many.pt"
    torchrun(processes, "tests.train.rank_gradients", base, corpus, cache_dir, out, micro, 4, parallel)
    many = torch.load(out)
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-5)
    floor = 1e-3 * torch.stack([g.norm() for g in one["gradients"].values()]).norm()
    for name, gradient in one["gradients"].items():
        difference = (many["gradients"][name] - gradient).norm() / max(gradient.norm(), floor)
        assert difference < 1e-5, name


@pytest.fixture(scope="module")
def one(base: Path, corpus: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Loss and gradients of a step of four rows in one process."""
    out = tmp_path_factory.mktemp("gradients") / "one.pt"
    torchrun(1, "tests.train.rank_gradients", base, corpus, cache_dir, out, 4, 4, "ddp")
    return torch.load(out)


@pytest.fixture(scope="module")
def one_process_run(base: Path, corpus: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of four rows in one process: other layouts must give the same numbers."""
    out = tmp_path_factory.mktemp("one")
    result = train(*flags_for(base, corpus, cache_dir, out), "--per_device_train_batch_size", 4)
    assert result.returncode == 0, result.stderr
    return out / "run"


def flags_for(base: Path, corpus: Path, cache_dir: Path, out: Path) -> list[str]:
    return [
        "--gpu_type", "cpu", "--model_name_or_path", str(base), "--dataset_name", str(corpus), "--cache_dir",
        str(cache_dir), "--base_output_dir", str(out), "--experiment_name", "run", "--max_seq_length", "32",
        "--max_steps", "6", "--eval_steps", "3", "--logging_steps", "1", "--validation_split_percentage", "10",
        "--learning_rate", "1e-3", "--no_rope_layers", "1", "3",
    ]  # fmt: skip


def start(*flags: object) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *map(str, flags)]
    return subprocess.Popen(
        command, env=script_environment(), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def wait_for_line(process: subprocess.Popen, words: str) -> None:
    """Read the process's lines until one contains ``words``."""
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"the process ended without the line {words!r}")


def test_resume_on_another_number_of_processes_keeps_batch_and_order(
    train_flags: list[str], tmp_path: Path, one_process_run: Path
) -> None:
    """As if the run had ended after step 3 of 6. The rest equals a run on one process from the first step."""
    flags, run = [*train_flags, "--save_steps", 3], tmp_path / "out" / "run"
    first = train(*flags, "--nproc_per_node", 2)
    assert first.returncode == 0, first.stderr
    for name in ("checkpoints/checkpoint-6", "final_model"):
        shutil.rmtree(run / name)
    second = train(*flags)
    assert second.returncode == 0, second.stderr
    assert "resumes from checkpoint-3" in second.stderr
    assert "the global batch stays 4 rows, as in the checkpoint; the flags would give 2 on 1 process" in second.stderr
    assert losses(run) == pytest.approx(losses(one_process_run), rel=1e-5)


def test_bin_format_holds_the_same_weights(train_flags: list[str], tmp_path: Path) -> None:
    result = train(*train_flags, "--max_steps", 1, "--save_format", "bin")
    assert result.returncode == 0, result.stderr
    run = tmp_path / "out" / "run"
    loaded = torch.load(run / "final_model" / "pytorch_model.bin", weights_only=True)
    expected = weights(run / "checkpoints" / "checkpoint-1")
    assert all(torch.equal(loaded[n], t) for n, t in expected.items())


def test_a_run_reuses_data_prepared_without_gpus(train_flags: list[str], tmp_path: Path) -> None:
    """With the flags of a GPU run, on a machine without GPUs, and an output directory that cannot be made."""
    flags = [*train_flags, "--cache_dir", tmp_path / "c"]
    result = train(*flags, "--gpu_type", "A800", "--base_output_dir", "/proc/flare", "--prepare_only")
    assert result.returncode == 0, result.stderr
    summary = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert summary["documents"].startswith("120 (")
    assert not (tmp_path / "out").exists()
    files = list(Path(summary["path"]).iterdir())
    assert int(summary["bytes"].replace(",", "")) == sum(file.stat().st_size for file in files)
    run = train(*flags, "--max_steps", 1)
    assert run.returncode == 0, run.stderr
    assert "tokenised" in result.stderr
    assert "tokenised" not in run.stderr
    assert f"{int(summary['rows to train on'].split()[0]):,} rows" in run.stderr
    useless = train(*flags, "--prepare_only", "--max_seq_length", 100_000)
    assert useless.returncode == 3
    assert "training tokens, not one row; lower --max_seq_length" in useless.stderr


@pytest.mark.slow
def test_joins_under_torchrun(train_flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(REPO / "train_qwen_multi_gpu.py"), *train_flags, "--max_steps", "2"],
        env=script_environment(), capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert metrics(tmp_path / "out" / "run")["stages"]["1"]["status"] == "finished"
