"""What must not be lost or confused between runs. Each test is a defect that a review found and reproduced."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flare.checkpoint.directory import list_checkpoints, supersede_newer
from flare.data.token_cache.cache import TokenCache
from flare.nope.load import load_causal_lm
from flare.run.experiment import Experiment
from flare.run.metrics_file import enter_stage, record_status
from tests.processes import train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "out" / "run"


def trained(run: Path) -> dict:
    return json.loads((run / "final_model" / "config.json").read_text())["flare"]


@pytest.mark.parametrize("train_layers", ["nope", "nope_attention"])
def test_stage_one_trains_and_resumes_in_bf16_below_frozen_layers(
    train_flags: list[str], run: Path, train_layers: str
) -> None:
    """Layers 2 and 3 stay frozen in bf16 above the fp32 masters of layer 1, as in the guide."""
    flags = [*train_flags, "--precision", "bf16", "--no_rope_layers", "1", "--train_layers", train_layers]
    first = train(*flags, "--max_steps", 2)
    assert first.returncode == 0, first.stderr
    second = train(*flags, "--max_steps", 4)
    assert second.returncode == 0, second.stderr
    assert "resumes from checkpoint-2" in second.stderr
    assert "time " not in first.stderr  # no rate is known yet
    assert re.search(r"\ntime +1 min for 2 steps at [0-9,]+ tokens/s", second.stderr)


@pytest.mark.parametrize(
    "layout", [(), pytest.param(("--nproc_per_node", 2, "--parallel", "fsdp"), marks=pytest.mark.slow)]
)
def test_fp32_masters_of_a_bf16_model_are_restored_exactly(
    train_flags: list[str], base: Path, tmp_path: Path, layout: tuple
) -> None:
    """A checkpoint can be opened as a bf16 model, but a resumed run must not be rounded to bf16."""
    stored = shutil.copytree(base, tmp_path / "bf16")
    load_causal_lm(base, torch.bfloat16).save_pretrained(stored)
    flags = [*train_flags, "--stage", 2, "--precision", "bf16", "--model_name_or_path", stored, *layout]
    flags += ["--lr_scheduler_type", "constant"]
    for name, steps in (("run", 2), ("run", 4), ("unbroken", 4)):
        result = train(*flags, "--max_steps", steps, "--experiment_name", name)
        assert result.returncode == 0, result.stderr
    ends = [
        tmp_path / "out" / name / "checkpoints" / "checkpoint-4" / "model.safetensors" for name in ("run", "unbroken")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert load_file(ends[0])["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_a_failed_start_of_stage_two_leaves_stage_one_unchanged(train_flags: list[str], run: Path) -> None:
    assert train(*train_flags, "--max_steps", 1).returncode == 0
    record_status(Experiment(run), 2, "failed", error="ended by signal SIGTERM")  # what the launcher writes
    assert Experiment(run).recorded_stage() == 1
    assert Experiment(run).paths_to_overwrite(2) == []
    result = train(*train_flags[:2], *train_flags[4:-3], "--stage", 2, "--max_steps", 1, "--overwrite_output_dir")
    assert result.returncode == 0, result.stderr
    assert "stage 2 starts from the result of stage 1" in result.stderr
    assert (run / "stage1" / "final_model" / "config.json").is_file()


def test_stage_is_known_without_the_metrics_file(train_flags: list[str], run: Path) -> None:
    assert train(*train_flags, "--max_steps", 1).returncode == 0
    (run / "training_metrics.json").unlink()
    assert Experiment(run).recorded_stage() == 1
    enter_stage(Experiment(run), 2)
    assert Experiment(run).recorded_stage() == 2


def test_overwriting_the_model_to_start_from_is_refused(train_flags: list[str], run: Path) -> None:
    assert train(*train_flags, "--max_steps", 1).returncode == 0
    result = train(*train_flags, "--overwrite_output_dir", "--model_name_or_path", run / "final_model")
    assert result.returncode == 2
    assert "would delete" in result.stderr
    assert (run / "final_model" / "config.json").is_file()


def test_a_shorter_runs_final_model_does_not_count_for_the_longer_run(train_flags: list[str], run: Path) -> None:
    assert train(*train_flags, "--max_steps", 2).returncode == 0
    shutil.copytree(run / "final_model", run / "old")
    assert train(*train_flags, "--max_steps", 4).returncode == 0
    shutil.rmtree(run / "final_model")
    (run / "old").rename(run / "final_model")  # as if killed between the last checkpoint and the export
    result = train(*train_flags, "--max_steps", 4)
    assert result.returncode == 0, result.stderr
    assert trained(run)["step"] == 4


def test_stage_two_does_not_start_from_an_unfinished_stage_one(train_flags: list[str], run: Path) -> None:
    assert train(*train_flags, "--max_steps", 1).returncode == 0
    (run / "STOP").touch()
    assert train(*train_flags, "--max_steps", 4).returncode == 0  # extended, and stopped before its end
    flags = [*train_flags[:2], *train_flags[4:-3]]
    result = train(*flags, "--stage", 2, "--max_steps", 1)
    assert result.returncode == 2
    assert "finish it first" in result.stderr


def test_early_stopping_can_be_turned_on_at_resume_and_stays_stopped(train_flags: list[str], run: Path) -> None:
    flags = [*train_flags, "--eval_steps", 1, "--learning_rate", "0.05", "--lr_scheduler_type", "constant"]
    assert train(*flags, "--max_steps", 3).returncode == 0
    flags += ["--max_steps", 40, "--early_stopping_patience", 2]
    result = train(*flags)
    assert result.returncode == 0, result.stderr
    stopped_at = trained(run)["step"]
    again = train(*flags)
    assert "early stop); a larger --early_stopping_patience continues it" in again.stderr
    assert trained(run)["step"] == stopped_at


def test_a_run_killed_right_after_its_first_evaluation_resumes(train_flags: list[str], run: Path) -> None:
    """Its first evaluation is recorded: a second one would count as no gain, and end a run with patience 1."""
    flags = [*train_flags, "--eval_steps", 100, "--early_stopping_patience", 1]
    assert train(*flags, "--max_steps", 1).returncode == 0
    for name in ("checkpoint-1", "../final_model"):
        shutil.rmtree(run / "checkpoints" / name)
    assert [c.step for c in list_checkpoints(run / "checkpoints")] == [0]
    result = train(*flags, "--max_steps", 2)
    assert result.returncode == 0, result.stderr
    assert "resumes from checkpoint-0" in result.stderr
    assert trained(run)["step"] == 2


@pytest.mark.slow
def test_epochs_have_the_same_rows_on_another_number_of_processes(train_flags: list[str], run: Path) -> None:
    steps = train_flags.index("--max_steps")
    flags = [*train_flags[:steps], *train_flags[steps + 2 :], "--num_train_epochs", "0.1", "--save_steps", "2"]
    (run.parent).mkdir()
    first = train(*flags, "--nproc_per_node", 2)
    assert first.returncode == 0, first.stderr
    total = trained(run)["step"]
    shutil.rmtree(run / "final_model")
    for checkpoint in list_checkpoints(run / "checkpoints")[1:]:
        shutil.rmtree(checkpoint.path)
    second = train(*flags)
    assert second.returncode == 0, second.stderr
    assert trained(run)["step"] == total


def test_resuming_an_older_checkpoint_sets_newer_ones_aside(train_flags: list[str], run: Path) -> None:
    flags = [*train_flags, "--save_steps", 2, "--save_total_limit", 1]
    assert train(*flags, "--save_total_limit", 9).returncode == 0
    elsewhere = shutil.copytree(run / "checkpoints" / "checkpoint-2", run.parent / "checkpoint-2")
    result = train(*flags, "--max_steps", 4, "--resume", run / "checkpoints" / "checkpoint-2")
    assert result.returncode == 0, result.stderr
    assert "superseded-checkpoint-6" in result.stderr
    assert trained(run)["step"] == 4
    assert (run / "checkpoints" / "superseded-checkpoint-6").is_dir()
    assert supersede_newer(run / "checkpoints", 4) == []
    result = train(*flags, "--max_steps", 3, "--resume", elsewhere)
    assert result.returncode == 0, result.stderr
    assert (run / "checkpoints" / "superseded-checkpoint-4").is_dir()


def test_changed_options_are_logged_at_resume(train_flags: list[str], run: Path) -> None:
    assert train(*train_flags, "--max_steps", 1).returncode == 0
    result = train(*train_flags, "--max_steps", 2, "--learning_rate", "5e-4")
    assert result.returncode == 0
    assert "resumes with changes: learning_rate 0.001 -> 0.0005, max_steps 1 -> 2" in result.stderr


def test_a_damaged_token_cache_is_built_again(train_flags: list[str], run: Path, tmp_path: Path) -> None:
    flags = [*train_flags, "--cache_dir", tmp_path / "cache", "--max_steps", 1]
    assert train(*flags).returncode == 0
    (directory,) = (tmp_path / "cache").glob("tokens-*")
    with open(directory / "tokens.bin", "r+b") as file:
        file.truncate(100)
    assert not TokenCache(directory).is_complete
    result = train(*flags, "--experiment_name", "again")
    assert result.returncode == 0, result.stderr
    assert "is damaged and is built again" in result.stderr
    assert TokenCache(directory).is_complete


def test_plausible_mistakes_end_in_one_line(train_flags: list[str], base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    for name in ("no_tokenizer", "empty_weights", "no_depth"):
        shutil.copytree(base, tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no_tokenizer" / file).unlink()
    (tmp_path / "empty_weights" / "model.safetensors").write_bytes(b"")
    config = json.loads((base / "config.json").read_text())
    del config["num_hidden_layers"]
    (tmp_path / "no_depth" / "config.json").write_text(json.dumps(config))
    for changes, words in (
        (["--experiment_name", "file"], "out/file"),
        (["--experiment_name", "./"], "must stay inside"),
        (["--experiment_name", "x" * 300], "at most 200"),
        (["--cache_dir", tmp_path / "out" / "file"], "--cache_dir"),
        (["--seed", "20250101123456"], "--seed must be <="),
        (["--model_name_or_path", tmp_path / "no_tokenizer"], "has no tokenizer"),
        (["--model_name_or_path", tmp_path / "empty_weights"], "cannot be loaded"),
        (["--model_name_or_path", tmp_path / "no_depth"], "num_hidden_layers must be"),
    ):
        result = train(*train_flags, *changes)
        assert result.returncode in (2, 4), (changes, result.stderr)
        assert len(result.errors) == 1, (changes, result.stderr)
        assert words in result.errors[0], changes


def test_warm_up_on_the_command_line_overrides_the_file() -> None:
    from flare.config.parse import resolve

    options = resolve(["--warmup_steps", "10"]).options  # training_config.json sets warmup_ratio
    assert (options.warmup_steps, options.warmup_ratio) == (10, 0)
