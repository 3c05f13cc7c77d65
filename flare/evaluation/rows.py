"""One model on one data set, as the comparison's tables and the verdict see it, and which control is a fair one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


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
    stages: tuple[int, ...] | None = ()  # that the model went through; None: not recorded


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
    """The control to hold a trained model against: the last one that went through the same stages, else the last one,
    from which nothing can be concluded."""
    controls = [row for row in rows if row.role == "control"]
    return fair_control(rows, result) or (controls[-1] if controls else None)


def fair_control(rows: list[ComparisonRow], result: ComparisonRow) -> ComparisonRow | None:
    """The last control that went through the same stages as a trained model."""
    alike = (row for row in reversed(rows) if row.role == "control" and same_stages(row.stages, result.stages))
    return next(alike, None)


def same_stages(one: Sequence[int] | None, other: Sequence[int] | None) -> bool:
    """Whether two trainings consisted of the same stages; not when it is not recorded."""
    return bool(one and other) and list(one) == list(other)
