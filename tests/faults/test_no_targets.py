"""Rows without a target (row 32): a step of such rows is skipped; data with only such rows is refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import write_corpus
from tests.faults.harness import complete_steps, digest, stage
from tests.processes import Zygote


@pytest.fixture
def forgetful(base: Path, tmp_path: Path) -> Path:
    """The base model with a tokenizer that drops every Q: documents of Qs are their end-of-text token alone."""
    model = Path(shutil.copytree(base, tmp_path / "model"))
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "Q"}, "content": ""}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    return model


@pytest.fixture
def odd_flags(flags: list[str], forgetful: Path, tmp_path: Path) -> list[str]:
    """Rows of 8 tokens, one a step: an epoch of them takes less than a second."""
    return [
        *flags, "--model_name_or_path", str(forgetful), "--dataset_name", str(tmp_path / "odd.jsonl"),
        "--cache_dir", str(tmp_path / "cache"), "--max_seq_length", "8", "--per_device_train_batch_size", "1",
        "--eval_steps", "1000", "--save_steps", "1000",
    ]  # fmt: skip


def nothing_but_ends(number: int) -> str:
    return json.dumps({"text": "Q" * (1 + number)}) + "\n"


def test_a_step_without_targets_is_passed_over(
    zygote: Zygote, odd_flags: list[str], run: Path, tmp_path: Path
) -> None:
    """Without an update, and with the same result when the run is killed and resumed."""
    with open(write_corpus(tmp_path / "odd.jsonl", documents=10), "a") as file:
        file.writelines(map(nothing_but_ends, range(60)))
    flags = [*odd_flags, "--max_steps", "90"]
    ended = zygote.run(*flags)
    assert ended.returncode == 0, ended.stderr
    passed = ended.stderr.count("has no target token in its 1 rows and is skipped")
    logged = [record["step"] for record in stage(run)["history"] if "loss" in record]
    assert passed > 0
    assert len(logged) == 90 - passed
    assert (stage(run)["totals"]["steps"], complete_steps(run)[-1]) == (90, 90)
    flags += ["--experiment_name", "again", "--save_steps", "30"]
    dies_at = next(step for step in logged if step > 60)
    assert zygote.run(*flags, fault=("die_at_step", dies_at)).returncode == -9
    assert zygote.run(*flags).returncode == 0
    assert digest(run.with_name("again") / "final_model") == digest(run / "final_model")


def test_data_without_targets_is_refused(zygote: Zygote, odd_flags: list[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text("".join(map(nothing_but_ends, range(300))))
    ended = zygote.run(*odd_flags, "--max_steps", 2)
    assert ended.returncode == 3, ended.stderr
    assert ended.errors == [
        "error: the training documents are single tokens: nothing can be learned; give longer documents"
    ]
    assert not run.exists()
