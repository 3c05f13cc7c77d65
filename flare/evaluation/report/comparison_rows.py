"""One model on one data set: a row of the comparison tables. Also selects the control for a comparison."""

from dataclasses import dataclass, field
from typing import Literal

from flare.evaluation.report.fair_control import Training, same_training


@dataclass(frozen=True)
class ComparisonRow:
    """One model on one data set: a row of the comparison table in the report."""

    label: str
    role: Literal["base", "patched", "trained", "control"]
    dataset: str
    loss: float  # nats per token
    perplexity: float | None
    bits_per_byte: float
    tokenizer_sha256: str
    interval: tuple[float, float] | None = (
        None  # 95 %, loss difference to the first row; nats per token, or bits per byte
    )
    training: Training | None = field(default_factory=dict)  # None: not recorded


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
    """The last control that had the same training as ``result``; otherwise the last control, which allows no
    conclusion; None without controls."""
    controls = [row for row in rows if row.role == "control"]
    return fair_control(rows, result) or (controls[-1] if controls else None)


def fair_control(rows: list[ComparisonRow], result: ComparisonRow) -> ComparisonRow | None:
    """The last control that had the same training as ``result``, or None."""
    matching = (r for r in reversed(rows) if r.role == "control" and same_training(r.training, result.training))
    return next(matching, None)
