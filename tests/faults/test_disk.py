"""Disks that are full, read-only or gone (rows 8-10, 40 and 48 of the matrix), on real file systems."""

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import complete_steps, digest, stage
from tests.processes import Zygote, wait_until


def mounted(directory: Path, options: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here (needs root)")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: room for one checkpoint of the tiny model, and not for three."""
    mounted(tmp_path / "disk", "size=1m")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_disk_that_fills_up_costs_no_checkpoint(
    zygote: Zygote, flags: list[str], small_disk: Path, uninterrupted: Path
) -> None:
    """Row 8."""
    run = small_disk / "run"
    flags = [*flags, "--base_output_dir", str(small_disk)]
    ended = zygote.run(*flags)
    assert ended.returncode == 4, ended.stderr
    (error,) = ended.errors
    assert f"cannot write to {run}" in error
    assert "No space left on device" in error
    assert "earlier checkpoints are untouched" in error
    assert "GiB free" in error
    kept = complete_steps(run)
    assert kept
    assert not list((run / "checkpoints").glob(".tmp-*"))
    assert not (run / "final_model").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)  # somebody frees space
    again = zygote.run(*flags)
    assert again.returncode == 0, again.stderr
    assert f"resumes from checkpoint-{kept[-1]}" in again.stderr
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")


def test_a_full_disk_for_logs_does_not_stop_the_training(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path
) -> None:
    """Row 9: warned of once."""
    for name in ("logs", "tensorboard"):
        mounted(run / name, "size=8k")
    try:
        ended = zygote.run(*flags)
        assert ended.returncode == 0, ended.stderr
        assert digest(run / "final_model") == digest(uninterrupted / "final_model")
        assert 0 < ended.stderr.count("No space left on device") <= 5  # one for each file: three are TensorBoard's
        assert "Traceback" not in ended.stderr
    finally:
        for name in ("logs", "tensorboard"):
            subprocess.run(["umount", "-l", str(run / name)], check=True)


def test_a_disk_too_small_from_the_start_is_refused(zygote: Zygote, flags: list[str], small_disk: Path) -> None:
    """Row 10: before the model is loaded or a file is written."""
    subprocess.run(["mount", "-o", "remount,size=128k", str(small_disk)], check=True)
    ended = zygote.run(*flags, "--base_output_dir", small_disk)
    assert ended.returncode in (2, 4)
    (error,) = ended.errors
    assert "free" in error
    assert str(small_disk) in error or "--base_output_dir" in error
    assert list(small_disk.iterdir()) == []


def test_a_read_only_disk_is_refused(zygote: Zygote, flags: list[str], small_disk: Path) -> None:
    """Row 40."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    ended = zygote.run(*flags, "--base_output_dir", small_disk)
    assert ended.returncode == 2
    (error,) = ended.errors
    assert "cannot write to --base_output_dir" in error
    assert "Read-only file system" in error


def test_an_experiment_that_is_removed_while_it_runs_ends_clearly(zygote: Zygote, flags: list[str], run: Path) -> None:
    """Row 40."""
    running = zygote.start(*flags, "--max_steps", 100_000, "--eval_steps", 100_000, "--save_steps", 100)
    running.wait_for("step 5/")
    wait_until(lambda: run.is_dir(), "the directory")
    shutil.rmtree(run.rename(run.with_name("gone")))  # in one blow: no file comes in between
    ended = running.wait()
    assert ended.returncode == 4
    (error,) = ended.errors
    assert f"{run} was removed while this run used it" in error
    assert not run.exists()


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_results_have_the_permissions_of_the_umask(
    zygote: Zygote, flags: list[str], run: Path, umask: int, mode: int
) -> None:
    """Row 48: safetensors would write 0600."""
    ended = zygote.run(*flags, "--max_steps", 2, fault=("set_umask", umask))
    assert ended.returncode == 0, ended.stderr
    files = [f for f in run.rglob("*") if f.is_file() and not f.name.startswith(".")]
    wrong = {f.name: oct(stat.S_IMODE(f.stat().st_mode)) for f in files if stat.S_IMODE(f.stat().st_mode) != mode}
    assert wrong == {}
    assert stage(run)["status"] == "finished"
