"""A stage in TensorBoard: curves over steps, curves of both stages over tokens, settings, and the plan as text.

The groups ``train``, ``eval`` and ``speed`` are over the stage's steps, with one TensorBoard run per stage. The group
``all_stages`` is over tokens: stage 2 begins at the token where stage 1 ended, and the base's loss is a line. Rank 0
only.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flare.nope.layers import format_layers
from flare.run.experiment import Experiment
from flare.run.metrics_file import base_loss, recorded_stages, trained_tokens

if TYPE_CHECKING:
    from flare.run.run import Run

BY_STEP = {
    "loss": "train/loss",
    "perplexity": "train/perplexity",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "epoch": "train/epoch",
    "tokens_per_sec": "speed/tokens_per_sec",
    "mfu": "speed/mfu",
    "executed_flops_use": "speed/executed_flops_use",
    "data_wait": "speed/data_wait",
    "memory_gib": "speed/memory_gib",
    "eval_loss": "eval/loss",
    "eval_perplexity": "eval/perplexity",
    "eval_token_accuracy": "eval/token_accuracy",
}
BY_TOKENS = {
    "loss": "all_stages/train_loss",
    "learning_rate": "all_stages/learning_rate",
    "eval_loss": "all_stages/eval_loss",
}
RESULTS = ("eval/loss", "eval/perplexity", "eval/token_accuracy", "train/loss")
"""Columns of the hyper-parameters tab."""


class TensorBoardWriter:
    """Event files of one stage.

    Args:
        history: records up to the step to resume from. TensorBoard drops later points of a killed run.
    """

    def __init__(self, experiment: Experiment, stage: int, history: Sequence[dict]) -> None:
        self.stage = stage
        self.tokens_before, self.base_loss = earlier_stages(recorded_stages(experiment), stage)
        last = history[-1] if history else None
        root, tokens = experiment.tensorboard, self.tokens_before
        self.steps = SummaryWriter(str(root / f"stage{stage}"), purge_step=last and last["step"] + 1)
        # Separate TensorBoard runs: a resumed run's old points are dropped by step number, and these count tokens.
        purge = last and tokens + last["tokens"] + 1
        self.tokens = SummaryWriter(str(root / "by_tokens" / f"stage{stage}"), purge_step=purge)
        self.base = SummaryWriter(str(root / "by_tokens" / "base"), purge_step=purge or tokens)
        for record in history:
            self.base_loss = record.get("rope_eval_loss", self.base_loss)

    def describe(self, settings: dict[str, str | float], plan: Sequence[str]) -> None:
        """Write this stage's row of the hyper-parameters tab, and the plan in the text tab."""
        columns, values, _ = hparams(settings, dict.fromkeys(RESULTS, 0.0))
        for summary in (columns, values):
            self.steps.file_writer.add_summary(summary)
        self.steps.add_text("plan", "".join(f"    {line}\n" for line in plan))  # Markdown keeps indented lines

    def record(self, record: dict) -> None:
        """Write the numbers of a step or an evaluation. Raises: OSError."""
        tokens = self.tokens_before + record["tokens"]
        for names, writer, place in ((BY_STEP, self.steps, record["step"]), (BY_TOKENS, self.tokens, tokens)):
            for name, tag in names.items():
                if record.get(name) is not None:
                    writer.add_scalar(tag, record[name], place)
        for row in record.get("eval_context_lengths", ()):
            self.steps.add_scalar(f"eval/loss_at_{row['context_length']}", row["loss"], record["step"])
        self.base_loss = record.get("rope_eval_loss", self.base_loss)
        if "eval_loss" in record and self.base_loss is not None:
            self.base.add_scalar(BY_TOKENS["eval_loss"], self.base_loss, tokens)

    def close(self) -> None:
        """Flush and close the files. Raises: OSError."""
        for writer in (self.steps, self.tokens, self.base):
            writer.close()


def earlier_stages(stages: dict[str, dict], stage: int) -> tuple[int, float | None]:
    """(tokens of the stages before this one, the base's held-out loss if they measured it).

    Args:
        stages: the stages in training_metrics.json.
    """
    earlier = [stages[number] for number in sorted(stages) if int(number) < stage]
    records = (record for block in earlier for record in block.get("history", []))
    return sum(map(trained_tokens, earlier)), base_loss(records)


def hyperparameters(run: "Run", global_batch_size: int, max_steps: int) -> dict[str, str | float]:
    """Settings by which runs are compared, named like their flags, with ``auto`` resolved."""
    options = run.options
    facts = {
        "stage": options.stage,
        "model": run.model_name,
        "nope_layers": format_layers(list(run.nope_layers)),
        "trains": str(run.trainable),
        "dataset": str(options.dataset_name),
        "global_batch_size": global_batch_size,
        "max_steps": max_steps,
        "processes": run.hardware.world_size,
        "parallel": run.parallel,
        "precision": run.precision,
        "attn_implementation": run.attention,
        "gradient_checkpointing": str(run.gradient_checkpointing),
    }
    names = (
        "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm",
        "max_seq_length", "packing", "seed",
    )  # fmt: skip
    return facts | {name: getattr(options, name) for name in names if getattr(options, name) is not None}
