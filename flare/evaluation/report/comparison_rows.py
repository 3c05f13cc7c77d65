"""One model on one data set, as the comparison's tables and the verdict see it, and which control is a fair one."""

from dataclasses import dataclass, field
from typing import Literal

from flare.evaluation.report.fair_control import Training, same_training


@dataclass(frozen=True)
class ComparisonRow:
    """One model on one data set, a line of the report's comparison table."""

    label: str
    role: Literal["base", "patched", "trained", "control"]
    dataset: str
    loss: float  # nats per token
    perplexity: float | None
    bits_per_byte: float
    tokenizer_sha256: str
    interval: tuple[float, float] | None = None  # 95 %, of the loss minus the first row's; nats, or bits per byte
    training: Training | None = field(default_factory=dict)  # of the model; None: not recorded


def comparison_row(
    label: str, role: str, results: dict, dataset: str, interval: tuple[float, float] | None = None
) -> ComparisonRow:
    """The row of a results dict. Raises: KeyError when the data set was not scored."""
    scored = results["datasets"][dataset]
    return ComparisonRow(
        label=label,
        role=role,
        dataset=dataset,
        loss=scored["loss"],
        perplexity=scored["perplexity"],
        bits_per_byte=scored["bits_per_byte"],
        tokenizer_sha256=results["model"]["tokenizer_sha256"],
        interval=interval,
    )


def control_of(rows: list[ComparisonRow], result: ComparisonRow) -> ComparisonRow | None:
    """The control to hold a trained model against: the last one that had the same training, else the last one, from
    which nothing can be concluded."""
    controls = [row for row in rows if row.role == "control"]
    return fair_control(rows, result) or (controls[-1] if controls else None)


def fair_control(rows: list[ComparisonRow], result: ComparisonRow) -> ComparisonRow | None:
    """The last control that had the same training as a trained model."""
    alike = (r for r in reversed(rows) if r.role == "control" and same_training(r.training, result.training))
    return next(alike, None)
