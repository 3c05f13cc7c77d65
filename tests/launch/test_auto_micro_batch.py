"""``auto`` for micro-batch, gradient checkpointing and sharding takes what fits, with the same rows per step."""

from pathlib import Path

import pytest

from flare.config.options import SELECTIVE, STAGE_DEFAULTS
from flare.errors import ConfigError, EnvError
from flare.gpus.nvidia_smi import Gpu
from flare.plan.plan import check_fits
from flare.plan.table import plan_lines
from flare.run.run import Hardware, Run
from tests.launch.runs import AUTO, assert_one_line_after_gpus, dry_run, empty_config, gpus, run_of
from tests.processes import train_in_new_process
from tests.train.test_runs import metrics


def test_auto_takes_the_largest_divisor_that_fits_the_smallest_gpu(base: Path, tmp_path: Path) -> None:
    flags = [*AUTO, "--global_batch_size", 240, "--max_seq_length", 512, "--gradient_checkpointing", "false"]
    roomy = run_of(gpus(80_000, 80_000), base, tmp_path, *flags)
    assert (roomy.micro_batch_size, roomy.global_batch_size) == (120, 240)
    tight = run_of(gpus(80_000, 900), base, tmp_path, *flags)
    micro = tight.micro_batch_size
    assert 1 < micro < 120
    assert 120 % micro == 0
    assert tight.plan().fits
    assert tight.plan().inputs.accumulation == 120 // micro
    larger = next(n for n in range(micro + 1, 121) if 120 % n == 0)
    assert tight.with_layout(larger, False, "ddp").plan().fits is False


def test_auto_shards_what_does_not_fit_unsharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2.5-7B in stage 2 needs 118 GB per GPU with DDP; 3B fits on an A800 unsharded, on four A40 sharded."""

    def not_reached(*_: object) -> dict:
        raise EnvError("no hub here")

    monkeypatch.setattr("flare.run.resolve.read_hub_config", not_reached)
    flags = ["--stage", 2, "--dry_run"]

    def chosen(model: str, mib: int, count: int, *more: object) -> Run:
        return run_of(gpus(*[mib] * count), Path(f"Qwen/Qwen2.5-{model}"), tmp_path, *flags, *more)

    assert [chosen(model, 81_920, 4).parallel for model in ("1.5B", "3B", "7B")] == ["ddp", "ddp", "fsdp"]
    assert chosen("3B", 46_068, 4).parallel == "fsdp"
    assert chosen("3B", 46_068, 1).parallel == "ddp"
    sharded = chosen("7B", 81_920, 4).plan()
    assert sharded.fits and "FSDP2 over 4 processes" in "\n".join(plan_lines(sharded))
    with pytest.raises(ConfigError, match="--parallel fsdp"):
        check_fits(chosen("7B", 81_920, 4, "--parallel", "ddp").plan())


def test_auto_without_a_global_batch_keeps_the_rows_of_the_default(base: Path, tmp_path: Path) -> None:
    for stage, values in STAGE_DEFAULTS.items():
        flags = ["--stage", stage, "--gradient_accumulation_steps", 4]
        given = run_of(gpus(80_000), base, tmp_path, *flags, "--config", empty_config(tmp_path))
        auto = run_of(gpus(80_000), base, tmp_path, *flags, *AUTO)
        assert given.global_batch_size == auto.global_batch_size == 4 * values["per_device_train_batch_size"]
        assert auto.micro_batch_size == auto.global_batch_size


def test_auto_on_gpus_of_unknown_memory_is_the_default(base: Path, tmp_path: Path) -> None:
    hardware = Hardware(True, 1, (Gpu(0, "NVIDIA GB10", "GPU-0", None, None),))
    run = run_of(hardware, base, tmp_path, *AUTO, "--gradient_accumulation_steps", 4)
    assert (run.micro_batch_size, run.global_batch_size) == (3, 12)


def test_auto_prefers_a_smaller_micro_batch_to_checkpointing(base: Path, tmp_path: Path) -> None:
    flags = [*AUTO, "--global_batch_size", 240, "--max_seq_length", 512]
    run = run_of(gpus(900), base, tmp_path, *flags, "--gradient_checkpointing", "auto")
    assert not run.gradient_checkpointing
    assert run.micro_batch_size > 1


def test_auto_takes_the_least_checkpointing_that_fits(base: Path, tmp_path: Path) -> None:
    """Smaller and smaller GPUs: none, selective, everything; whatever the flag says, the same rows a step."""
    flags = ["--global_batch_size", 16, "--per_device_train_batch_size", 16, "--max_seq_length", 512]
    found = [
        run_of(gpus(mib), base, tmp_path, *flags, "--gradient_checkpointing", "auto").gradient_checkpointing
        for mib in range(1000, 700, -1)
    ]
    assert list(dict.fromkeys(found)) == [False, SELECTIVE, True]
    given = run_of(gpus(1000), base, tmp_path, *flags, "--gradient_checkpointing", SELECTIVE)
    assert given.gradient_checkpointing == SELECTIVE
    with pytest.raises(ConfigError, match='must be true or false or selective or auto, got the string "some"'):
        run_of(gpus(1000), base, tmp_path, *flags, "--gradient_checkpointing", "some")


def test_global_batch_that_processes_cannot_share_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--global_batch_size 7 is not divisible by 2 processes; nearest: 6, 8"):
        run_of(gpus(80_000, 80_000), base, tmp_path, *AUTO, "--global_batch_size", 7)


@pytest.mark.slow
def test_auto_trains_as_the_same_micro_batch_given_explicitly(train_flags: list[str], tmp_path: Path) -> None:
    """On two processes, both of which must choose the same number; the records have that number."""
    flags = [*train_flags, "--max_steps", 2, "--nproc_per_node", 2, "--global_batch_size", 8]
    result = train_in_new_process(*flags, *AUTO)
    assert result.returncode == 0, result.stderr
    given = train_in_new_process(*flags, "--per_device_train_batch_size", 4, "--experiment_name", "given")
    assert given.returncode == 0, given.stderr
    first, second = (metrics(tmp_path / "out" / name)["stages"]["1"] for name in ("run", "given"))
    assert first["settings"]["per_device_train_batch_size"] == 4
    auto_losses, given_losses = ([r["loss"] for r in b["history"] if "loss" in r] for b in (first, second))
    assert len(auto_losses) == 2
    assert auto_losses == given_losses


def test_auto_that_fits_nowhere_is_refused_with_numbers(tmp_path: Path) -> None:
    result = dry_run(
        tmp_path, "--stage", 2, "--gpu_ids", 4, "--model_name_or_path", "Qwen/Qwen2.5-7B", *AUTO,
        "--experiment_name", "x",
    )  # fmt: skip
    assert_one_line_after_gpus(result, 2, "stage 2 of Qwen/Qwen2.5-7B does not fit on 1 x NVIDIA A40", "GiB")


def test_seven_billion_parameters_do_not_fit_one_a40_and_what_would_is_named(tmp_path: Path) -> None:
    result = dry_run(tmp_path, "--stage", 2, "--gpu_ids", 4, "--model_name_or_path", "Qwen/Qwen2.5-7B")
    assert_one_line_after_gpus(result, 2, "does not fit on 1 x NVIDIA A40", "what would", "--train_layers nope")
