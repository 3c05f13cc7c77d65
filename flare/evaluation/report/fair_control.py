"""Whether a control had the same training as a model: what their experiments recorded, side by side.

A control tells what removing RoPE cost only if nothing else differs. Pure functions of training_metrics.json's stages.
"""

import math
from collections.abc import Mapping

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip
"""Options that change what is learned. How the work was shared (GPUs, micro-batch, kernels) does not."""
IDENTITY = ("max_seq_length", "packing", "train_layers")
TOLERANCE = 0.01
"""Relative, of steps and tokens: early stopping and odd last batches are no other training."""

Training = Mapping[str, object]
"""``stages`` and, by what they are called, the facts of each. Empty for a model that was not trained here."""


def training_of(recorded: Mapping[str, dict], last: int) -> Training:
    """The facts of the stages up to ``last``. What an experiment did not record is left out."""
    blocks = {stage: block for stage, block in sorted(recorded.items()) if int(stage) <= last}
    facts: dict[str, object] = {"stages": [int(stage) for stage in blocks]}
    for stage, block in blocks.items():
        found = {"data": block.get("identity", {}).get("data")}
        found |= {name: block.get("identity", {}).get(name) for name in IDENTITY}
        found |= {name: block.get("settings", {}).get(name) for name in SETTINGS}
        found |= {name: block.get("totals", {}).get(name) for name in ("steps", "tokens")}
        facts |= {f"{name} of stage {stage}": value for name, value in found.items() if value is not None}
    return facts


def same_training(one: Training | None, other: Training | None) -> bool:
    """Whether two trainings were alike in all that both recorded; not when one is not known."""
    return bool(one and other) and not differences(one, other)


def differences(control: Training, model: Training) -> list[str]:
    """What a control's training has other than a model's, in words; the control's value first."""
    if control["stages"] != model["stages"]:
        return [f"{stages_in_words(control)} instead of {stages_in_words(model)}"]
    unlike = [name for name in control if name in model and not _alike(control[name], model[name])]
    return [_in_words(name, control[name], model[name]) for name in unlike]


def stages_in_words(training: Training) -> str:
    """'stages 1 and 2'."""
    stages = training["stages"]
    return f"stage{'s' * (len(stages) > 1)} {' and '.join(map(str, stages))}"


def _alike(one: object, other: object) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        exact = isinstance(one, float) or isinstance(other, float)
        return math.isclose(one, other, rel_tol=1e-9 if exact else TOLERANCE)
    return one == other


def _in_words(name: str, one: object, other: object) -> str:
    if name.startswith("data "):  # known by a fingerprint, which tells people nothing
        return f"other {name}"
    one, other = (f"{value:,}" if isinstance(value, int) else value for value in (one, other))
    return f"{name} {one} instead of {other}"
