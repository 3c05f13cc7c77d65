"""Checkpoints that were cut, changed, emptied or made up (rows 11-15, 44, 46 of the matrix)."""

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flare.checkpoint import __main__ as checkpoint_command
from flare.checkpoint.directory import Checkpoint
from flare.errors import CheckpointError
from tests.faults.conftest import run_flags
from tests.faults.harness import STEPS, complete_steps, digest, stage
from tests.processes import Zygote

SEED = 3


@pytest.fixture(scope="module")
def interrupted(
    zygote: Zygote, base: Path, corpus: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that was killed in step 6: checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("interrupted")
    ended = zygote.run(*run_flags(base, corpus, cache_dir, out), fault=("die_at_step", 6))
    assert ended.returncode == -9
    assert complete_steps(out / "run") == [2, 4]
    return out / "run"


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, where ``flags`` continue it."""
    return Path(shutil.copytree(interrupted, tmp_path / "out" / "run"))


def truncate_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(SEED).randrange(len(content))] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated to nothing": truncate_to_nothing,
    "halved": halve,
    "a bit flipped": flip_a_bit,
    "deleted": Path.unlink,
}
FILES = (
    "config.json", "manifest.json", "model.safetensors", "modeling_nope.py", "optimizer.safetensors",
    "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
)  # fmt: skip
CASES = [(file, damage) for file in FILES for damage in DAMAGES]
MADE_AN_OLDER_ONE_BE_USED = [("optimizer.safetensors", "deleted"), ("model.safetensors", "a bit flipped")]


def test_every_file_of_a_checkpoint_is_tried(run: Path) -> None:
    names = {file.name for file in (run / "checkpoints" / "checkpoint-4").iterdir()}
    assert names - {"generation_config.json"} == set(FILES)


@pytest.mark.parametrize(("file", "damage"), CASES)
def test_damage_is_found_and_named(run: Path, capsys: pytest.CaptureFixture, file: str, damage: str) -> None:
    """Rows 11-13, by ``python -m flare.checkpoint verify``."""
    DAMAGES[damage](run / "checkpoints" / "checkpoint-4" / file)
    if (file, damage) == ("manifest.json", "a bit flipped"):  # may hit a field that says nothing about the files
        return
    with pytest.raises(CheckpointError, match="1 of 2 checkpoints are not complete"):
        checkpoint_command.main(["verify", str(run)])
    table = capsys.readouterr().out
    assert f"NOT COMPLETE: {file}" in table
    assert "complete, every hash is right" in table


def resume_from_the_older(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path, file: str, damage: str
) -> None:
    DAMAGES[damage](run / "checkpoints" / "checkpoint-4" / file)
    ended = zygote.run(*flags)
    assert ended.returncode == 0, ended.stderr
    assert "resumes from checkpoint-2" in ended.stderr
    if (file, damage) != ("manifest.json", "deleted"):  # without a manifest it is not a checkpoint
        assert f"skipped a damaged checkpoint: checkpoint-4: {file}" in ended.stderr
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")
    assert complete_steps(run)[-1] == STEPS


@pytest.mark.parametrize(("file", "damage"), MADE_AN_OLDER_ONE_BE_USED)
def test_the_older_checkpoint_is_used(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path, file: str, damage: str
) -> None:
    resume_from_the_older(zygote, flags, run, uninterrupted, file, damage)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("file", "damage"),
    [case for case in CASES if case not in (*MADE_AN_OLDER_ONE_BE_USED, ("manifest.json", "a bit flipped"))],
)
def test_the_older_checkpoint_is_used_whatever_is_damaged(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path, file: str, damage: str
) -> None:
    resume_from_the_older(zygote, flags, run, uninterrupted, file, damage)


def test_without_a_complete_checkpoint_there_is_no_silent_fresh_start(
    zygote: Zygote, flags: list[str], run: Path
) -> None:
    """Row 13: never new Adam moments, or new weights, silently."""
    for step in (2, 4):
        (run / "checkpoints" / f"checkpoint-{step}" / "optimizer.safetensors").unlink()
    ended = zygote.run(*flags)
    assert ended.returncode == 2
    (error,) = ended.errors
    assert "no valid checkpoint in 'run' (checkpoint-4: optimizer.safetensors is missing)" in error
    assert (run / "checkpoints" / "checkpoint-2").is_dir()


def test_what_only_looks_like_a_checkpoint_is_left_alone(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path
) -> None:
    """Rows 14 and 44: names, not dates, decide; nothing of the user's is deleted."""
    checkpoints = run / "checkpoints"
    (checkpoints / "checkpoint-999").mkdir()
    (checkpoints / "checkpoint-5").write_text("mine")
    shutil.copytree(checkpoints / "checkpoint-2", checkpoints / "checkpoint-2-KEEP")
    os.utime(checkpoints / "checkpoint-2", (time.time() + 86400,) * 2)  # the clock went back a day
    ended = zygote.run(*flags, "--save_total_limit", 1, TZ="Asia/Shanghai")
    assert ended.returncode == 0, ended.stderr
    assert "resumes from checkpoint-4" in ended.stderr
    assert {p.name for p in checkpoints.iterdir()} == {
        "checkpoint-999", "checkpoint-5", "checkpoint-2-KEEP", f"checkpoint-{STEPS}",
    }  # fmt: skip
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")


class Evil:
    """Unpickling this touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", ".metadata"])
def test_pickles_in_a_checkpoint_are_never_opened(
    zygote: Zygote, flags: list[str], run: Path, uninterrupted: Path, tmp_path: Path, name: str
) -> None:
    """Row 15. They are what other trainers keep there; .metadata is that of torch's distributed checkpoints."""
    (run / "checkpoints" / "checkpoint-4" / name).write_bytes(pickle.dumps(Evil(tmp_path / "marker")))
    ended = zygote.run(*flags)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "marker").exists()
    assert digest(run / "final_model") == digest(uninterrupted / "final_model")


def test_a_poisoned_base_model_runs_nothing(zygote: Zygote, flags: list[str], base: Path, tmp_path: Path) -> None:
    """Row 15, pytorch_model.bin."""
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(tmp_path / "marker")}, model / "pytorch_model.bin")
    ended = zygote.run(*flags, "--model_name_or_path", model)
    assert ended.returncode == 2
    (error,) = ended.errors
    assert "holds more than plain tensors, which could run code: it is not opened" in error
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["training.log", "training_metrics.json", "logs", "tensorboard"])
def test_lost_records_are_made_again(zygote: Zygote, flags: list[str], run: Path, name: str) -> None:
    """Row 46: the history is in the checkpoint."""
    (shutil.rmtree if (run / name).is_dir() else Path.unlink)(run / name)
    ended = zygote.run(*flags)
    assert ended.returncode == 0, ended.stderr
    assert_history_is_complete(run)


def test_records_that_a_crash_cut_are_made_again(zygote: Zygote, flags: list[str], run: Path) -> None:
    for name in ("training_metrics.json", "logs/metrics.jsonl"):
        halve(run / name)
    assert zygote.run(*flags).returncode == 0
    assert_history_is_complete(run)


def assert_history_is_complete(run: Path) -> None:
    steps = [record["step"] for record in stage(run)["history"] if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == steps
    assert "finished stage 1" in (run / "training.log").read_text()


# -- the command -------------------------------------------------------------------------------------------------


def test_list_and_verify_report_the_checkpoints(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert checkpoint_command.main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["checkpoint-2", "128"], ["checkpoint-4", "256"]]
    assert all(line.endswith("complete") for line in lines[1:])
    assert checkpoint_command.main(["verify", str(run / "checkpoints")]) == 0
    assert checkpoint_command.main(["verify", str(run / "checkpoints" / "checkpoint-4")]) == 0
    (run / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    assert checkpoint_command.main(["list", str(run)]) == 0
    assert "NOT COMPLETE: manifest.json is missing" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="no checkpoint-N in"):
        checkpoint_command.main(["list", str(run / "logs")])


def test_a_manifest_that_is_changed_is_found(run: Path) -> None:
    """As far as possible: its entries about the files."""
    path = run / "checkpoints" / "checkpoint-4"
    manifest = json.loads((path / "manifest.json").read_text())
    for entry in manifest["files"].values():
        entry["sha256"] = "0" * 64
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        Checkpoint(path, 4).verify()
