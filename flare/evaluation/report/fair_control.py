"""Whether a control had the same training as the evaluated model, according to training_metrics.json.

A control measures the cost of removing RoPE only if nothing else differs. Pure functions of the recorded stages.
"""

import math
from collections.abc import Mapping

SETTINGS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm",
)  # fmt: skip
"""Options that change what is learned. GPUs, micro-batch size and kernels do not."""
IDENTITY = ("max_seq_length", "packing", "train_layers")
TOLERANCE = 0.01
"""Relative tolerance for steps and tokens, because of early stopping and incomplete last batches."""

Training = Mapping[str, object]
"""``stages`` (their numbers) and ``"NAME of stage N"`` -> value. Empty for a model that was not trained by Flare."""


def training_of(recorded: Mapping[str, dict], last: int) -> Training:
    """Settings, data and length of the stages up to ``last``, as far as the experiment recorded them."""
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
    """Whether two trainings agree in everything that both recorded. False if one of them is unknown."""
    return bool(one and other) and not differences(one, other)


def differences(control: Training, model: Training) -> list[str]:
    """Differences between the training of a control and of a model, as text; the value of the control comes first."""
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
    if name.startswith("data "):  # its value is a hash, which is of no use to a reader
        return f"different {name}"
    one, other = (f"{value:,}" if isinstance(value, int) else value for value in (one, other))
    return f"{name} {one} instead of {other}"
