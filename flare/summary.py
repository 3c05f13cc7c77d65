"""What a stage ended with, as aligned lines for people. Standard library only."""

import shlex
from collections.abc import Iterator

from flare.experiment import Experiment
from flare.metrics_file import base_loss

LABEL_WIDTH = 16


def summary_lines(experiment: Experiment, stage: int, history: list[dict], tokens: int) -> list[str]:
    """Results, and what to do next. Args: tokens: trained on in this stage."""
    rows = _rows(experiment, stage, history, tokens)
    return [f"{label:<{LABEL_WIDTH}}{text}" for label, text in rows]


def _rows(experiment: Experiment, stage: int, history: list[dict], tokens: int) -> Iterator[tuple[str, str]]:
    rates = [record["tokens_per_sec"] for record in history if record.get("tokens_per_sec")]
    speed = f", {sum(rates) / len(rates):,.0f} tokens/s" if rates else ""
    yield f"stage {stage}", f"{tokens:,} tokens{speed}"
    losses = [record["eval_loss"] for record in history if "eval_loss" in record]
    if losses:
        yield "held-out loss", f"{losses[0]:.4f} at the start, {losses[-1]:.4f} at the end"
    base = base_loss(history)
    if base is not None:
        yield "the base's", f"{base:.4f}: the same weights with RoPE everywhere, untrained"
    model, board = (shlex.quote(str(path)) for path in (experiment.final_model, experiment.tensorboard))
    yield "final model", model
    yield "curves", f"tensorboard --logdir {board}"
    yield "evaluate", "python evaluate_model_enhanced.py \\"  # two lines: a path may be long, a terminal folds
    yield "", f"    --model_path {model}"
