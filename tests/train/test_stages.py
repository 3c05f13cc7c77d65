"""Stage 2 starts from the right model, and early stopping exports the best one."""

import json
from pathlib import Path

import torch

from flare.evaluation.report.recovery import held_out_curve, recovery_of
from flare.run.experiment import Experiment
from flare.run.metrics_file import recorded_stages
from flare.train.tensorboard import earlier_stages
from tests.processes import train
from tests.train.test_runs import assert_same_weights, metrics, weights


def test_stage_two_continues_stage_one_of_the_same_name(train_flags: list[str], base: Path, tmp_path: Path) -> None:
    assert train(*train_flags, "--max_steps", 2).returncode == 0
    run = tmp_path / "out" / "run"
    stage1 = weights(run / "final_model")
    without_model = [f for f in train_flags if f not in ("--model_name_or_path", str(base))]
    layers = without_model.index("--no_rope_layers")
    flags = without_model[:layers]
    result = train(*flags, "--stage", 2, "--max_steps", 2)
    assert result.returncode == 0, result.stderr
    result_of_stage_1 = run / "stage1" / "final_model"
    assert f"stage 2 starts from the result of stage 1: {result_of_stage_1}\n" in (run / "training.log").read_text()
    [resolved] = (run / "logs").glob("resolved_config-stage2-*.json")
    assert json.loads(resolved.read_text())["run"]["init_from"] == str(result_of_stage_1)
    assert all(torch.equal(stage1[n], t) for n, t in weights(run / "stage1" / "final_model").items())
    assert (run / "stage1" / "checkpoints" / "checkpoint-2").is_dir()
    config = json.loads((run / "final_model" / "config.json").read_text())
    assert config["nope_layers"] == [1, 3]
    assert config["flare"] == {"stage": 2, "step": 2, "trained_tokens": 4 * 2 * 32}
    assert set(metrics(run)["stages"]) == {"1", "2"}
    changed = [n for n, t in weights(run / "final_model").items() if not torch.equal(t, stage1[n])]
    assert "model.embed_tokens.weight" in changed

    contradiction = train(*flags, "--stage", 2, "--max_steps", 3, "--no_rope_layers", "2")
    assert contradiction.returncode == 2
    assert "contradicts" in contradiction.stderr
    back = train(*flags, "--stage", 1, "--model_name_or_path", base)
    assert back.returncode == 2
    assert "is in stage 2 already" in back.stderr


def test_stage_two_finds_the_sibling_named_stage1(train_flags: list[str], base: Path, tmp_path: Path) -> None:
    assert train(*train_flags, "--max_steps", 1, "--experiment_name", "x_stage1").returncode == 0
    flags = [f for f in train_flags if f not in ("--model_name_or_path", str(base))]
    flags = flags[: flags.index("--no_rope_layers")]
    result = train(*flags, "--stage", 2, "--max_steps", 1, "--experiment_name", "x_stage2")
    assert result.returncode == 0, result.stderr
    assert "x_stage1/final_model" in result.stderr
    assert (tmp_path / "out" / "x_stage1" / "final_model").is_dir()
    stages = recorded_stages(Experiment(tmp_path / "out" / "x_stage2"))  # one curve for report and TensorBoard
    found = recovery_of(stages)
    assert [(p["stage"], p["tokens"]) for p in held_out_curve(stages)] == [(1, 0), (1, 64), (2, 64), (2, 128)]
    assert found.untrained_loss == stages["1"]["history"][0]["eval_loss"]
    assert earlier_stages(stages, 2) == (64, found.base_loss)


def test_stage_two_without_stage_one_warns_and_starts_from_the_base(train_flags: list[str], tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    model = train_flags[train_flags.index("--model_name_or_path") + 1]
    config.write_text(json.dumps({"model_name_or_path": model}))
    flags = [f for f in train_flags if f not in ("--model_name_or_path", model)]
    result = train(*flags, "--stage", 2, "--max_steps", 1, "--config", config)
    assert result.returncode == 0, result.stderr
    assert "no stage 1 result for 'run'; stage 2 starts from the base model" in result.stderr


def test_early_stopping_keeps_and_exports_the_best(train_flags: list[str], tmp_path: Path) -> None:
    result = train(
        *train_flags, "--max_steps", 200, "--eval_steps", 2, "--early_stopping_patience", 2, "--save_total_limit", 1,
        "--learning_rate", "0.05", "--train_layers", "all", "--lr_scheduler_type", "constant",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "(early stop)" in result.stderr
    run = tmp_path / "out" / "run"
    block = metrics(run)["stages"]["1"]
    best = block["best"]["step"]
    assert block["early_stopped"] is True
    assert block["totals"]["steps"] < 200
    evaluations = {r["step"]: r["eval_loss"] for r in block["history"] if "eval_loss" in r}
    assert evaluations[best] == min(evaluations.values())
    assert_same_weights(run / "final_model", run / "checkpoints" / f"checkpoint-{best}")
